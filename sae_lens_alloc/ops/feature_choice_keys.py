"""What the selection of Feature Choice asks of the kernels that give it keys."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from typing_extensions import Self, override

from sae_lens_alloc.ops.encoder_tensors import EncoderTensors
from sae_lens_alloc.ops.pair_keys import VALUE_BITS, bits_for

# The bits of no number: a key that none reaches.
ABOVE_ALL = 2**VALUE_BITS - 1


@dataclass(frozen=True)
class FeatureKeyEncoder(EncoderTensors, ABC):
    """
    The keys of positive affinities by feature: inverted feature, float32 bits, inverted token.
    F and B, rounded up to powers of two, multiply to 2^32 at most.

    Args:
        thresholds: Inference thresholds of shape (F,).
        cut: Running cut of Mutual Choice, scalar tensor.
    """

    thresholds: torch.Tensor
    cut: torch.Tensor

    @override
    def part(self, features: slice) -> Self:
        part = super().part(features)
        return replace(part, thresholds=self.thresholds[features])

    @property
    def token_bits(self) -> int:
        return bits_for(self.shape[0])

    @property
    def token_mask(self) -> int:
        return 2**self.token_bits - 1

    @property
    def least_key(self) -> int:
        """A bound that all keys reach."""
        return 1 << self.token_bits

    @property
    def above_all(self) -> int:
        """A bound that no key reaches."""
        return ABOVE_ALL << self.token_bits

    def bounds_of(self, affinities: torch.Tensor) -> torch.Tensor:
        """Bounds that positive affinities reach if they are as large, of shape (F,)."""
        bits = affinities.float().view(torch.int32).long().clamp(min=1)
        return bits << self.token_bits

    def affinities_of(self, keys: torch.Tensor) -> torch.Tensor:
        """Affinities of keys or bounds."""
        bits = (keys >> self.token_bits) & ABOVE_ALL
        return bits.int().view(torch.float32)

    def features_of(self, keys: torch.Tensor) -> torch.Tensor:
        """Features of keys. The last one for padding, which is 0."""
        return self.shape[1] - 1 - (keys >> (VALUE_BITS + self.token_bits))

    def tokens_of(self, keys: torch.Tensor) -> torch.Tensor:
        """Tokens of keys."""
        return self.token_mask - (keys & self.token_mask)

    @abstractmethod
    def collect(
        self,
        bounds: torch.Tensor,
        keys: torch.Tensor,
        count: torch.Tensor,
        features: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        Collects the keys that reach their feature's bound, in any order.

        Args:
            bounds: Keys without the feature, int64 of shape (F,).
            keys: Buffer of shape (capacity,), int64. Changed in place.
            count: How many of its places are taken, int64 of shape (). Grows in place by the
                number of keys that reach the bound, also where they do not fit.
            features: Boolean mask of the features to look at, shape (F,), or None for all.

        Returns:
            int64 of shape (4, F): tokens whose affinity reaches the feature's bound, is
            positive, exceeds the threshold, exceeds the cut; 0 for other features.
        """

    @abstractmethod
    def find_bounds(
        self, features: torch.Tensor, fewest: torch.Tensor, most: torch.Tensor
    ) -> torch.Tensor:
        """
        Bounds that no fewer and no more keys reach than wanted.

        Args:
            features: Boolean mask of the features to look at, shape (F,).
            fewest: Shape (F,), at most as many as the feature has positive affinities.
            most: Shape (F,), at least `fewest`.

        Returns:
            int64 of shape (F,). For other features, a bound that all keys reach.
        """
