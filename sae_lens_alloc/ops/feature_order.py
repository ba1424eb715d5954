"""Pairs in the order of their features, sorted once for the gradients of both weights."""

from functools import cached_property

import torch

from sae_lens_alloc.ops.backend import uses_triton


class FeatureOrder:
    """
    The order of pairs by feature; pairs of a feature stay in their order.

    Args:
        features: int64 of shape (N,).
        real: Boolean mask of shape (N,), false at padding, or None if there is none. Triton's kernels
            get padding behind all rows.
        n_features: Number of features F.
    """

    def __init__(
        self, features: torch.Tensor, real: torch.Tensor | None, n_features: int
    ) -> None:
        self._features = features
        self._real = real
        self._n_features = n_features

    @cached_property
    def _keys(self) -> torch.Tensor:
        features = self._features
        if uses_triton(features.device):
            if self._real is not None:
                features = features.where(self._real, self._n_features)
            features = features.int()  # which a GPU sorts in half the passes
        return features

    @cached_property
    def of_all(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sorted features and the places of the pairs in that order, both of shape (N,)."""
        return self._keys.sort(stable=True)

    def of_first(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of the first n pairs alone, both of shape (n,)."""
        features, places = self.of_all
        if n == len(places):
            return features, places
        kept = places < n
        # the others go to a place of their own before the first
        targets = kept.cumsum(0) * kept
        places = places.new_empty(n + 1).scatter_(0, targets, places)[1:]
        return self._keys[places], places
