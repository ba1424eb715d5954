"""The one currency: the token-feature pairs that are active, and nothing else."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class SparseActivations:
    """
    Active token-feature pairs of a batch, in row order (by token, then by feature).

    Args:
        token_indices: int64 tensor of shape (N,).
        feature_indices: int64 tensor of shape (N,).
        values: Affinities of the pairs, shape (N,).
        shape: (number of tokens B, number of features F).
        real: Boolean mask of shape (N,), false where a pair only fills up the last places of
            a fixed number of pairs: its value is 0, and it must not count or learn. None if
            all pairs are real.
    """

    token_indices: torch.Tensor
    feature_indices: torch.Tensor
    values: torch.Tensor
    shape: tuple[int, int]
    real: torch.Tensor | None = None

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

    def token_counts(self) -> torch.Tensor:
        """Active features of each token, int64 of shape (B,)."""
        return self._count(self.token_indices, self.shape[0])

    def feature_counts(self) -> torch.Tensor:
        """Active tokens of each feature, int64 of shape (F,)."""
        return self._count(self.feature_indices, self.shape[1])

    def _count(self, indices: torch.Tensor, n: int) -> torch.Tensor:
        # bincount would ask a GPU for the largest index
        ones = torch.ones_like(indices) if self.real is None else self.real.long()
        return indices.new_zeros(n).scatter_add_(0, indices, ones)

    def smallest_value(self) -> torch.Tensor:
        """Scalar tensor, infinite if no pair is real. Needs at least one place."""
        if self.real is None:
            return self.values.min()
        return self.values.where(self.real, torch.inf).min()

    def without_padding(self) -> "SparseActivations":
        """The real pairs alone, which asks a GPU how many there are."""
        if self.real is None:
            return self
        return SparseActivations(
            self.token_indices[self.real],
            self.feature_indices[self.real],
            self.values[self.real],
            self.shape,
        )

    def at(self, places: torch.Tensor) -> "SparseActivations":
        """The pairs at ascending places, int64 of shape (n,)."""
        return SparseActivations(
            self.token_indices[places],
            self.feature_indices[places],
            self.values[places],
            self.shape,
            None if self.real is None else self.real[places],
        )

    def only(self, kept: torch.Tensor) -> "SparseActivations":
        """
        The pairs for which a bool of shape (N,) is true. On a GPU, which would have to be
        asked how many there are, the others become padding.
        """
        if not self.values.is_cuda and self.real is None:
            return self.at(kept.nonzero().squeeze(1))
        return replace(
            self,
            values=self.values * kept,
            real=kept if self.real is None else kept & self.real,
        )

    def of_first_features(self, width: int) -> "SparseActivations":
        """The pairs of the features below `width`, as `only` gives them."""
        return self.only(self.feature_indices < width)

    def to_dense(self) -> torch.Tensor:
        """Activations of shape (B, F), zero where a pair is not active."""
        dense = self.values.new_zeros(self.shape)
        pairs = self.without_padding()
        dense[pairs.token_indices, pairs.feature_indices] = pairs.values
        return dense

    def to_coo(self, leading_shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
        """
        Activations as a sparse COO tensor of shape (*leading_shape, F), coalesced, where
        the leading dimensions flatten to the B tokens.
        """
        if len(leading_shape) == 1:
            leading = (self.token_indices,)
        elif len(leading_shape) == 0:
            leading = ()
        else:
            leading = torch.unravel_index(self.token_indices, tuple(leading_shape))
        return torch.sparse_coo_tensor(
            torch.stack([*leading, self.feature_indices]),
            self.values,
            (*leading_shape, self.shape[1]),
            # padding repeats a pair
            is_coalesced=self.real is None,
            check_invariants=False,
        )
