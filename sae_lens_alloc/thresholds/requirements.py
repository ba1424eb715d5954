"""What activations and a wanted L0 must be for an SAE's thresholds to be set by them."""

from typing import Any

import torch
from sae_lens import SAE

from sae_lens_alloc.saes.rows import row_width


def require_activations(sae: SAE[Any], activations: torch.Tensor) -> None:
    """
    Raises ValueError if activations are not finite and of shape (tokens, d_in), or (tokens,
    d_in + d_out) for a transcoder.
    """
    width = row_width(sae.cfg)
    if activations.ndim != 2 or activations.shape[1] != width:
        raise ValueError(
            f"activations must have shape (tokens, {width}), got "
            f"{tuple(activations.shape)}."
        )
    if not torch.isfinite(activations).all():
        raise ValueError(
            "activations contain NaN or Inf: check the language model and its dtype."
        )


def require_target_l0(sae: SAE[Any], target_l0: float) -> None:
    """Raises ValueError if an L0 is not above 0 and at most the number of features."""
    if not 0 < target_l0 <= sae.cfg.d_sae:
        raise ValueError(
            f"no thresholds give an L0 of {target_l0:g}: it must be above 0 and at most "
            f"{sae.cfg.d_sae}, the number of features."
        )
