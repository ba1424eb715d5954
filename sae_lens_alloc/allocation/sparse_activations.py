"""The one currency: the token-feature pairs that are active, and nothing else."""

from dataclasses import dataclass

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

    def token_counts(self) -> torch.Tensor:
        """Active features of each token, int64 of shape (B,)."""
        return torch.bincount(self.token_indices, minlength=self.shape[0])

    def feature_counts(self) -> torch.Tensor:
        """Active tokens of each feature, int64 of shape (F,)."""
        return torch.bincount(self.feature_indices, minlength=self.shape[1])

    def to_dense(self) -> torch.Tensor:
        """Activations of shape (B, F), zero where a pair is not active."""
        dense = self.values.new_zeros(self.shape)
        dense[self.token_indices, self.feature_indices] = self.values
        return dense

    def to_coo(self, leading_shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
        """
        Activations as a coalesced sparse COO tensor of shape (*leading_shape, F), where
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
            is_coalesced=True,
            check_invariants=False,
        )
