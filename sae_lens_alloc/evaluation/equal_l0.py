"""Comparing SAEs at equal sparsity: thresholds of a saved SAE moved to a wanted L0."""

from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE

from sae_lens_alloc.allocation.mutual_choice import budget_for
from sae_lens_alloc.ops.encode_select import Encoder, encode_mutual_choice


@torch.no_grad()
def mean_l0(sae: SAE[Any], activations: torch.Tensor, batch_size: int = 2048) -> float:
    """Mean number of active features per token on activations of shape (T, d_in)."""
    n_pairs = sum(
        int((sae.encode(batch).to_dense() != 0).sum())
        for batch in activations.split(batch_size)
    )
    return n_pairs / len(activations)


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
    if not (sae.threshold > 0).all():
        raise ValueError("all thresholds must be positive to be moved by one factor.")
    budget = budget_for(target_l0, len(activations))
    encoder = Encoder(sae.W_enc, sae.b_enc, 1 / sae.threshold)
    sae_in = sae.process_sae_in(activations)
    pairs = encode_mutual_choice(encoder, sae_in, budget, torch.ones(()).to(sae_in))
    if budget == 0 or len(pairs.values) < budget:
        raise ValueError(
            f"no thresholds give an L0 of {target_l0} on these {len(activations)} tokens."
        )
    # a feature is active where it exceeds its threshold, and the last of the pairs must be
    sae.threshold.mul_(pairs.values.min() * (1 - 1e-6))
