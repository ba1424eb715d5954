"""What goes past the features of a transcoder: W_skip x."""

from typing import Any

import torch
from sae_lens.saes.sae import SAE


def past_features(sae: SAE[Any], x: torch.Tensor) -> torch.Tensor | None:
    """
    The share of the output that no feature has a part in, shape (..., d_out). None for SAEs, and
    for transcoders without a skip connection.

    Args:
        sae: Any SAE or transcoder, ours or SAELens'.
        x: Activations as it takes them, shape (..., d_in), not normalized.
    """
    W_skip: torch.Tensor | None = getattr(sae, "W_skip", None)
    if W_skip is None:
        return None
    with torch.autocast(x.device.type, enabled=False):  # as the features are decoded
        return x.to(W_skip.dtype) @ W_skip.T


def with_past(sae: SAE[Any], output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The output of the features, shape (..., d_out), with what goes past them."""
    past = past_features(sae, x)
    return output if past is None else output + past
