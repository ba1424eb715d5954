"""Gradients of the features that a batch selected, and of no others."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RowGradient:
    """
    The gradient of a matrix whose rows are features, at the rows that have one.

    Args:
        features: Ascending, int64 of shape (U,).
        rows: Shape (U, d).
    """

    features: torch.Tensor
    rows: torch.Tensor


@dataclass
class RowGradients:
    """
    What the last backward pass left, by weight: the gradients of W_enc.T, b_enc[:, None] and
    W_dec. `pair_pre_acts` and `decode_pairs` put them here where they are given one of these,
    and give autograd none for these weights.
    """

    W_enc: RowGradient | None = None
    b_enc: RowGradient | None = None
    W_dec: RowGradient | None = None

    def put(self, **gradients: RowGradient) -> None:
        """
        Keeps gradients by the names of their weights.

        Raises:
            ValueError: if there is one already: those of two backward passes are not added.
        """
        for name, gradient in gradients.items():
            if getattr(self, name) is not None:
                raise ValueError(
                    f"There are two gradients of {name} in one training step, and "
                    "row_sparse_adam takes one: use the optimizer adam to add up gradients."
                )
            setattr(self, name, gradient)

    def take(self) -> dict[str, RowGradient]:
        """Hands out the gradients there are, once."""
        taken = {
            name: gradient
            for name, gradient in vars(self).items()
            if gradient is not None
        }
        self.W_enc = self.b_enc = self.W_dec = None
        return taken


def rows_of(
    sorted_features: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The features that occur, and for each pair the place of its feature among them.

    Args:
        sorted_features: Whole numbers of shape (N,), ascending.

    Returns:
        Ascending features, int64 of shape (U,), which asks a GPU how many there are, and places of
        shape (N,).
    """
    return torch.unique_consecutive(sorted_features.long(), return_inverse=True)
