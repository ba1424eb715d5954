"""Comparing SAEs at equal sparsity: thresholds of a saved SAE moved to a wanted L0."""

import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE

from sae_lens_alloc.allocation.mutual_choice import budget_for
from sae_lens_alloc.ops.encode_select import Encoder, encode_mutual_choice


@torch.no_grad()
def threshold_factor(
    encoder: Encoder, x: torch.Tensor, thresholds: torch.Tensor, target_l0: float
) -> torch.Tensor:
    """
    The factor by which to multiply all thresholds such that `target_l0` features per token
    are active, scalar tensor. It is the last affinity of a Mutual Choice among the
    affinities relative to their threshold.

    Args:
        encoder: What gives the affinities.
        x: Encoder inputs of shape (T, d_in).
        thresholds: Positive thresholds of shape (F,).
        target_l0: Wanted features per token.

    Raises:
        ValueError: if a threshold is not positive, or no factor gives the wanted L0.
    """
    if not (thresholds > 0).all():
        raise ValueError(
            "all thresholds must be positive to be moved by one factor: set them one by one, "
            "per feature."
        )
    scale = 1 / thresholds if encoder.scale is None else encoder.scale / thresholds
    relative = Encoder(encoder.W_enc, encoder.b_enc, scale)
    budget = budget_for(target_l0, len(x))
    guess = torch.ones((), dtype=scale.dtype, device=scale.device)
    pairs = encode_mutual_choice(relative, x, budget, guess)
    if budget == 0 or len(pairs.values) < budget:
        raise ValueError(
            f"no thresholds give an L0 of {target_l0} on these {len(x)} tokens: "
            f"{len(pairs.values) / len(x):.3g} affinities per token are positive."
        )
    # a pair is active where it exceeds the threshold, and the last of the pairs must be
    return pairs.values.min() * (1 - 1e-6)


@torch.no_grad()
def set_l0(sae: JumpReLUSAE, activations: torch.Tensor, target_l0: float) -> None:
    """
    Multiplies all thresholds of a JumpReLU SAE by one factor such that `target_l0` features
    per token are active on the given activations.

    Args:
        sae: An inference SAE, as batchtopk, jumprelu and our own architectures are saved.
            Its thresholds are changed in place.
        activations: Activations as the SAE takes them, shape (T, d_in).

    Raises:
        ValueError: if a threshold is not positive, or no factor gives the wanted L0.
    """
    encoder = Encoder(sae.W_enc, sae.b_enc, None)
    x = sae.process_sae_in(activations)
    sae.threshold.mul_(threshold_factor(encoder, x, sae.threshold, target_l0))
