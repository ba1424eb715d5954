"""The one currency: the token-feature pairs that are active, and nothing else."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from typing_extensions import override


class Pairs(ABC):
    """
    Token-feature pairs of a batch in row order (by token, then by feature): either all of
    them are real (`SparseActivations`), or some places are padding (`PaddedActivations`).

    Code that must not ask a GPU how many pairs there are works on `places` and leaves out
    what `real` says is none. All other code takes `without_padding()`.
    """

    @property
    @abstractmethod
    def places(self) -> "SparseActivations":
        """All places, padding included."""

    @property
    @abstractmethod
    def real(self) -> torch.Tensor | None:
        """Boolean mask of shape (N,), false where a place is padding. None if none is."""

    @abstractmethod
    def without_padding(self) -> "SparseActivations":
        """The real pairs alone, which asks a GPU how many there are."""

    @property
    def batch_shape(self) -> tuple[int, int]:
        """(number of tokens B, number of features F)."""
        return self.places.shape

    def token_counts(self) -> torch.Tensor:
        """Active features of each token, int64 of shape (B,)."""
        return self._count(self.places.token_indices, self.batch_shape[0])

    def feature_counts(self) -> torch.Tensor:
        """Active tokens of each feature, int64 of shape (F,)."""
        return self._count(self.places.feature_indices, self.batch_shape[1])

    def _count(self, indices: torch.Tensor, n: int) -> torch.Tensor:
        # bincount would ask a GPU for the largest index
        ones = torch.ones_like(indices) if self.real is None else self.real.long()
        return indices.new_zeros(n).scatter_add_(0, indices, ones)

    def smallest_value(self) -> torch.Tensor:
        """Scalar tensor, infinite if no pair is real."""
        values = self.places.values
        if self.real is not None:
            values = values.where(self.real, torch.inf)
        return torch.cat([values, values.new_full((1,), torch.inf)]).min()

    def at(self, indices: torch.Tensor) -> "Pairs":
        """The pairs at ascending places, int64 of shape (n,)."""
        places = self.places
        taken = SparseActivations(
            places.token_indices[indices],
            places.feature_indices[indices],
            places.values[indices],
            places.shape,
        )
        return (
            taken if self.real is None else PaddedActivations(taken, self.real[indices])
        )

    def only(self, kept: torch.Tensor) -> "Pairs":
        """
        The pairs for which a bool of shape (N,) is true. On a GPU, which would have to be
        asked how many there are, the others become padding.
        """
        if self.places.values.is_cuda or self.real is not None:
            return self.masked(kept)
        return self.at(kept.nonzero().squeeze(1))

    def masked(self, kept: torch.Tensor) -> "Pairs":
        """The pairs for which a bool of shape (N,) is true. The others become padding."""
        places = self.places
        return PaddedActivations(
            replace(places, values=places.values * kept),
            kept if self.real is None else kept & self.real,
        )

    def of_first_features(self, width: int) -> "Pairs":
        """The pairs of the features below `width`, as `only` gives them."""
        return self.only(self.places.feature_indices < width)

    def to_dense(self) -> torch.Tensor:
        """Activations of shape (B, F), zero where a pair is not active."""
        pairs = self.without_padding()
        dense = pairs.values.new_zeros(pairs.shape)
        dense[pairs.token_indices, pairs.feature_indices] = pairs.values
        return dense

    def to_coo(self, leading_shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
        """
        Activations as a sparse COO tensor of shape (*leading_shape, F), coalesced, where
        the leading dimensions flatten to the B tokens. Padding is stored as zeros.
        """
        places = self.places
        if len(leading_shape) == 1:
            leading = (places.token_indices,)
        elif len(leading_shape) == 0:
            leading = ()
        else:
            leading = torch.unravel_index(places.token_indices, tuple(leading_shape))
        return torch.sparse_coo_tensor(
            torch.stack([*leading, places.feature_indices]),
            places.values,
            (*leading_shape, places.shape[1]),
            # padding repeats a pair
            is_coalesced=self.real is None,
            check_invariants=False,
        )


@dataclass(frozen=True)
class SparseActivations(Pairs):
    """
    Active token-feature pairs of a batch, in row order (by token, then by feature).

    Args:
        token_indices: int64 tensor of shape (N,).
        feature_indices: int64 tensor of shape (N,).
        values: Affinities of the pairs, shape (N,).
        shape: (number of tokens B, number of features F).
    """

    token_indices: torch.Tensor
    feature_indices: torch.Tensor
    values: torch.Tensor
    shape: tuple[int, int]

    @classmethod
    def from_unordered(
        cls,
        token_indices: torch.Tensor,
        feature_indices: torch.Tensor,
        values: torch.Tensor,
        shape: tuple[int, int],
    ) -> "SparseActivations":
        """Sorts pairs, given in any order and each at most once, into row order."""
        order = (token_indices * shape[1] + feature_indices).argsort()
        return cls(token_indices[order], feature_indices[order], values[order], shape)

    @property
    @override
    def places(self) -> "SparseActivations":
        return self

    @property
    @override
    def real(self) -> None:
        return None

    @override
    def without_padding(self) -> "SparseActivations":
        return self


@dataclass(frozen=True)
class PaddedActivations(Pairs):
    """
    A fixed number of places, some of which hold no pair: what a GPU gives that is not asked
    how many pairs there are. It has no `values` and no indices of its own, so that padding
    cannot be read as pairs by mistake.

    Args:
        padded: The places. One without a pair has the value 0 and repeats some position.
        is_real: Boolean mask of shape (N,), false where a place holds no pair: it must not
            count or learn.
    """

    padded: SparseActivations
    is_real: torch.Tensor

    @property
    @override
    def places(self) -> SparseActivations:
        return self.padded

    @property
    @override
    def real(self) -> torch.Tensor:
        return self.is_real

    @override
    def without_padding(self) -> SparseActivations:
        found = self.padded.at(self.is_real.nonzero().squeeze(1))
        return found.without_padding()
