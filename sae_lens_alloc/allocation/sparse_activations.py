"""The active token-feature pairs of a batch: what all parts of a step exchange."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from typing_extensions import override


class Pairs(ABC):
    """
    Token-feature pairs of a batch in row order (by token, then by feature). Either all of
    them are real (`SparseActivations`), or some places are padding (`PaddedActivations`).

    Code that must not wait for a GPU to count the pairs works on `places`, and uses `real`
    to leave out the padding. All other code uses `without_padding()`.
    """

    @property
    @abstractmethod
    def places(self) -> "SparseActivations":
        """All places, padding included."""

    @property
    @abstractmethod
    def real(self) -> torch.Tensor | None:
        """Boolean mask of shape (N,), false where a place is padding. None if there is no padding."""

    @abstractmethod
    def without_padding(self) -> "SparseActivations":
        """The real pairs alone. The host waits for a GPU to count them."""

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
        # bincount would wait for a GPU to find the largest index
        ones = torch.ones_like(indices) if self.real is None else self.real.long()
        return indices.new_zeros(n).scatter_add_(0, indices, ones)

    def smallest_value(self) -> torch.Tensor:
        """Smallest affinity, a scalar tensor, infinite if no pair is real."""
        return self._smallest_value

    @cached_property
    def _smallest_value(self) -> torch.Tensor:
        # a step asks for it several times
        values = self.places.values
        if len(values) == 0:
            return values.new_full((), torch.inf)
        if self.real is not None:
            values = values.where(self.real, torch.inf)
        return values.amin()

    @abstractmethod
    def with_values(self, values: torch.Tensor) -> "Pairs":
        """The same places with other values, shape (N,)."""

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
        The pairs for which `kept`, a bool of shape (N,), is true. On a GPU the others become
        padding, since the host would have to wait for the number of the kept ones.
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

    def followed_by(self, other: "Pairs") -> "Pairs":
        """These pairs and, as if their tokens came after all of these, those of another batch."""
        (n_tokens, n_features), (n_others, _) = self.batch_shape, other.batch_shape
        mine, others = self.places, other.places
        both = SparseActivations(
            torch.cat([mine.token_indices, others.token_indices + n_tokens]),
            torch.cat([mine.feature_indices, others.feature_indices]),
            torch.cat([mine.values, others.values]),
            (n_tokens + n_others, n_features),
        )
        real = real_places((self, other))
        return both if real is None else PaddedActivations(both, real)

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
    def with_values(self, values: torch.Tensor) -> "SparseActivations":
        return replace(self, values=values)

    @override
    def without_padding(self) -> "SparseActivations":
        return self


@dataclass(frozen=True)
class PaddedActivations(Pairs):
    """
    A fixed number of places, some of which are padding and hold no pair. A GPU gives these if
    the host does not wait for the number of pairs. The class has no `values` and no indices
    of its own, so that padding cannot be read as pairs by mistake.

    Args:
        padded: The places. Padding has the value 0 and repeats some position.
        is_real: Boolean mask of shape (N,), false where a place is padding. Padding must not
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
    def with_values(self, values: torch.Tensor) -> "PaddedActivations":
        return PaddedActivations(self.padded.with_values(values), self.is_real)

    @override
    def without_padding(self) -> SparseActivations:
        found = self.padded.at(self.is_real.nonzero().squeeze(1))
        return found.without_padding()


def real_places(sets: Sequence[Pairs]) -> torch.Tensor | None:
    """Which places of all the sets are no padding, None if there is none."""
    if all(pairs.real is None for pairs in sets):
        return None
    return torch.cat(
        [
            torch.ones_like(pairs.places.values, dtype=torch.bool)
            if pairs.real is None
            else pairs.real
            for pairs in sets
        ]
    )
