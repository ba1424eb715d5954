"""What must be finite before a batch changes anything."""

from collections.abc import Sequence

import torch

from sae_lens_alloc.ops.block_encoder import Encoder
from sae_lens_alloc.ops.device_checks import DeviceChecks


def require_finite(
    checks: DeviceChecks,
    encoder: Encoder,
    others: Sequence[torch.Tensor],
    sae_in: torch.Tensor,
    x: torch.Tensor,
    is_normalized: bool,
    step: int,
) -> None:
    """
    Requires weights and activations to be finite.

    Args:
        checks: Where the requirements are put.
        encoder: The encoder.
        others: Weights that belong to no feature, such as the decoder bias.
        sae_in: Activations of shape (..., d_in), with the output if they are a transcoder's.
        x: The encoder inputs that they became, shape (B, d_in).
        is_normalized: Whether they are normalized on the way, which may overflow.
        step: Number of the training step.

    Raises:
        ValueError: at once, if they are on the CPU and not finite; see `DeviceChecks`.
    """
    # first, since the inputs are NaN where b_dec is, too
    weights = [encoder.W_enc, encoder.b_enc, *others]
    if encoder.scale is not None:
        weights.append(encoder.scale)
    checks.require(
        _are_finite(weights),
        "The weights contain NaN or Inf at training step {step}: they have diverged; "
        "lower the learning rate or add warm-up steps.",
        step,
    )
    # a GPU is not waited for, and has learned from the batch by the time it is known
    outcome = "" if x.is_cuda else "; nothing was learned from this batch"
    activations = "The activations of training step {step}"
    checks.require(
        _are_finite([sae_in]),
        f"{activations} contain NaN or Inf: check the language model and its dtype{outcome}.",
        step,
    )
    if x.dtype != sae_in.dtype or is_normalized:
        checks.require(
            _are_finite([x]),
            f"{activations} contain numbers beyond {x.dtype}, the dtype of the SAE: give "
            f"it another, such as float32 or bfloat16{outcome}.",
            step,
        )


def require_finite_loss(
    checks: DeviceChecks, mse_loss: torch.Tensor, step: int
) -> None:
    """Requires the reconstruction loss, of shape (), to be finite; raises as above."""
    checks.require(
        mse_loss.abs() < torch.inf,
        "The reconstruction loss became NaN or Inf at training step {step}: the "
        "weights have diverged; lower the learning rate or add warm-up steps.",
        step,
    )


def _are_finite(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Whether tensors that are not empty, of one dtype, hold finite numbers alone; of shape ()."""
    # a sum would overflow in float16 where no number is out of range; NaN is an extreme, too
    extremes = torch.stack([e for t in tensors for e in torch.aminmax(t)])
    return (extremes.abs() < torch.inf).all()
