"""
Refinement: the encoder sees its input a second time, moved towards what a first pass left
unexplained (one step of LISTA, Gregor and LeCun 2010; docs/method.md).
"""

import torch

REFINEMENT = 0.3


def unexplained_share(
    inputs: torch.Tensor,
    first_recons: torch.Tensor,
    is_explained: torch.Tensor,
    b_dec: torch.Tensor | None,
    refinement: float,
) -> torch.Tensor:
    """
    What the second pass adds to the encoder inputs x: refinement * (x - what the first pass
    reconstructs), shape (..., d_in). Nothing for a token without an active feature in the first
    pass.

    Args:
        inputs: Encoder inputs x of the first pass, shape (..., d_in).
        first_recons: What its active features reconstruct, without b_dec, shape (..., d_in).
        is_explained: Whether the first pass activates a feature for a token, shape (...).
        b_dec: The decoder bias where it was not subtracted from x, shape (d_in,); None where it
            was.
        refinement: The share.
    """
    unexplained = inputs - first_recons.to(inputs.dtype)
    if b_dec is not None:
        unexplained = unexplained - b_dec
    return refinement * unexplained * is_explained.unsqueeze(-1)


def require_refinement(refinement: float) -> None:
    """Raises ValueError for a share outside of (0, 1], beyond which the second pass overshoots."""
    if not 0 < refinement <= 1:
        raise ValueError(f"refinement must be in (0, 1], got {refinement!r}.")
