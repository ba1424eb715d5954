"""Saved SAEs of other architectures as the JumpReLU SAEs that they equal."""

import copy
from dataclasses import fields
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.gated_sae import GatedSAE, GatedTrainingSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig

from sae_lens_alloc.saes.refined_jumprelu_sae import RefinedJumpReLUSAE


@torch.no_grad()
def jumprelu_form(sae: SAE[Any]) -> JumpReLUSAE:
    """
    A copy of an inference SAE as a JumpReLU SAE, whose activations are its affinities.

    A standard SAE has thresholds of 0, a gated one those of `gate_as_thresholds`. So has a
    topk SAE: with them it activates all its positive affinities, until they are set.

    Args:
        sae: An inference SAE of SAELens' jumprelu, topk, standard or gated architecture, or one of
            refined_jumprelu, which stays that. Not changed.
    """
    if isinstance(sae, RefinedJumpReLUSAE):
        return copy.deepcopy(sae)
    settings: dict[str, Any] = sae.cfg.to_dict()
    names = {field.name for field in fields(JumpReLUSAEConfig)}
    settings = {name: value for name, value in settings.items() if name in names}
    settings["metadata"] = copy.deepcopy(sae.cfg.metadata)
    weights = {name: value.clone() for name, value in sae.state_dict().items()}
    if isinstance(sae, GatedSAE):
        gain = weights.pop("r_mag").exp()
        weights["threshold"] = gate_as_thresholds(sae)
        weights["W_enc"] *= gain
        weights["b_enc"] = weights.pop("b_mag")
        del weights["b_gate"]
    weights.setdefault("threshold", torch.zeros_like(weights["b_enc"]))
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        norms = sae.get_W_dec_norm()
        weights["W_enc"] *= norms
        weights["b_enc"] *= norms
        weights["W_dec"] /= norms[:, None]
    jumprelu = JumpReLUSAE(JumpReLUSAEConfig(**settings))
    jumprelu.load_state_dict(weights)
    if not sae.hook_z_reshaping_mode:
        jumprelu.turn_off_forward_pass_hook_z_reshaping()
    return jumprelu


def gate_as_thresholds(sae: GatedSAE | GatedTrainingSAE) -> torch.Tensor:
    """
    Thresholds of the magnitudes x W_enc exp(r_mag) + b_mag at which the gate opens, which
    shares their weights (arXiv 2404.16014, section 3.2): x W_enc + b_gate > 0 where they
    exceed b_mag - exp(r_mag) b_gate. Shape (d_sae,), float32 or float64.
    """
    b_mag, r_mag, b_gate = (
        value.detach().to(torch.promote_types(value.dtype, torch.float32))
        for value in (sae.b_mag, sae.r_mag, sae.b_gate)
    )
    return b_mag - r_mag.exp() * b_gate
