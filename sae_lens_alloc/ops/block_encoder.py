"""What gives the affinities of a batch, block by block of its features."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from typing_extensions import override

from sae_lens_alloc.allocation.candidates import candidate_positions

# Elements of a block of affinities: small enough for the caches of a CPU, large enough to
# fill a GPU.
_BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
# A block takes at most one part in so many of a GPU's free memory.
_BLOCK_MEMORY_SHARE = 16


class BlockEncoder(ABC):
    """What gives the affinities of a batch by blocks of features."""

    @property
    @abstractmethod
    def n_features(self) -> int:
        """Number of features F."""

    @abstractmethod
    def part(self, features: slice | torch.Tensor) -> "BlockEncoder":
        """The encoder of some of the features."""

    @abstractmethod
    def products(self, x: torch.Tensor) -> torch.Tensor:
        """Of shape (B, F), from which the other methods take what they need."""

    @abstractmethod
    def affinities_of(self, products: torch.Tensor) -> torch.Tensor:
        """All affinities, of shape (B, F)."""

    @abstractmethod
    def candidates(
        self, products: torch.Tensor, bound: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Positive affinities that reach a bound, by token and then by feature.

        Args:
            products: What `products` gave for the tokens.
            bound: Lower bound, scalar or of shape (F,), or None for 0.

        Returns:
            Tokens, features and affinities, all of shape (n,).
        """

    @abstractmethod
    def blocks(self, n_tokens: int) -> Iterator[slice]:
        """The features in blocks, such that a block of affinities stays small."""


@dataclass(frozen=True)
class Encoder(BlockEncoder):
    """
    What turns inputs into affinities: a_ij = (x_i W_enc + b_enc)_j * scale_j.

    Args:
        W_enc: Shape (d_in, F).
        b_enc: Shape (F,).
        scale: Decoder norms of shape (F,), or None where affinities are pre-activations.
    """

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    scale: torch.Tensor | None

    @property
    @override
    def n_features(self) -> int:
        return self.W_enc.shape[1]

    @override
    def part(self, features: slice | torch.Tensor) -> "Encoder":
        scale = None if self.scale is None else self.scale[features]
        return Encoder(self.W_enc[:, features], self.b_enc[features], scale)

    @override
    def products(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.W_enc

    @override
    def candidates(
        self, products: torch.Tensor, bound: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        b_enc = self.b_enc.to(_precise(products))
        limits = -b_enc
        if bound is not None:
            # One comparison of the bare products, instead of a pass each for the bias and
            # the scale. These round differently: what passes by the slack is dropped below.
            slack = 8 * torch.finfo(products.dtype).eps
            scaled = bound if self.scale is None else bound / self.scale
            limits = scaled.to(limits) * (1 - slack) - b_enc
            limits = torch.maximum(limits - slack * b_enc.abs(), -b_enc)
        tokens, features = candidate_positions(products, limits)
        values = products[tokens, features].to(b_enc.dtype) + b_enc[features]
        if self.scale is not None:
            values *= self.scale[features]
        if bound is None:
            return tokens, features, values
        reach = values >= (bound if bound.ndim == 0 else bound[features])
        return tokens[reach], features[reach], values[reach]

    @override
    def affinities_of(self, products: torch.Tensor) -> torch.Tensor:
        affinities = products.to(_precise(products)) + self.b_enc
        return affinities if self.scale is None else affinities.mul_(self.scale)

    def affinities(self, x: torch.Tensor) -> torch.Tensor:
        """All affinities, of shape (B, F)."""
        return self.affinities_of(self.products(x))

    @override
    def blocks(self, n_tokens: int) -> Iterator[slice]:
        width = block_width(n_tokens, self.W_enc.device)
        for start in range(0, self.n_features, width):
            yield slice(start, min(start + width, self.n_features))

    def pre_acts(
        self, affinities: torch.Tensor, features: torch.Tensor
    ) -> torch.Tensor:
        """Pre-activations of affinities of the given features, 0 where they are 0; shape (N,)."""
        return affinities if self.scale is None else affinities / self.scale[features]


@dataclass(frozen=True)
class KnownAffinities(BlockEncoder):
    """Stands in for an Encoder where the affinities, of shape (B, F), exist already."""

    known: torch.Tensor

    @property
    @override
    def n_features(self) -> int:
        return self.known.shape[1]

    @override
    def part(self, features: slice | torch.Tensor) -> "KnownAffinities":
        return KnownAffinities(self.known[:, features])

    @override
    def products(self, x: torch.Tensor) -> torch.Tensor:
        return self.known

    @override
    def affinities_of(self, products: torch.Tensor) -> torch.Tensor:
        return products

    @override
    def candidates(
        self, products: torch.Tensor, bound: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens, features = candidate_positions(products, 0.0)
        return tokens, features, products[tokens, features]

    @override
    def blocks(self, n_tokens: int) -> Iterator[slice]:
        yield slice(0, self.n_features)


@dataclass(frozen=True)
class WatchedEncoder(BlockEncoder):
    """
    An encoder whose products serve for something else as well.

    Args:
        encoder: The encoder.
        watch: Told of the products of each block: the slice of features, and what `products`
            gave for it. Of a block that has to be encoded again, it is told again.
    """

    encoder: Encoder
    watch: Callable[[slice, torch.Tensor], None]
    features: slice | None = None

    @property
    @override
    def n_features(self) -> int:
        return self.encoder.n_features

    @override
    def part(self, features: slice | torch.Tensor) -> BlockEncoder:
        part = self.encoder.part(features)
        return (
            WatchedEncoder(part, self.watch, features)
            if isinstance(features, slice)
            else part
        )

    @override
    def products(self, x: torch.Tensor) -> torch.Tensor:
        products = self.encoder.products(x)
        if self.features is not None:
            self.watch(self.features, products)
        return products

    @override
    def affinities_of(self, products: torch.Tensor) -> torch.Tensor:
        return self.encoder.affinities_of(products)

    @override
    def candidates(
        self, products: torch.Tensor, bound: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.encoder.candidates(products, bound)

    @override
    def blocks(self, n_tokens: int) -> Iterator[slice]:
        return self.encoder.blocks(n_tokens)


def block_width(n_tokens: int, device: torch.device) -> int:
    """Features per block, a multiple of 64."""
    elements = _BLOCK_ELEMENTS.get(device.type, _BLOCK_ELEMENTS["cpu"])
    if device.type == "cuda" and torch.cuda.is_available():
        elements = min(elements, _free_elements(device))
    return max(64, elements // max(n_tokens, 1) // 64 * 64)


@cache
def _free_elements(device: torch.device) -> int:
    """
    Elements of a block that leaves most of the free memory free. Asked once, as products of
    other shapes may round differently: the blocks of a run must not change.
    """
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return free_bytes // (_BLOCK_MEMORY_SHARE * 4)


def _precise(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
