"""How an SAE does on activations that it is not trained on."""

from typing import Any

import torch
from sae_lens.saes.sae import SAE

from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE


@torch.no_grad()
def held_out_metrics(
    sae: SAE[Any], activations: torch.Tensor, batch_size: int
) -> dict[str, float]:
    """
    Measures an SAE as it is in evaluation mode, by its thresholds; changes nothing about it
    (SAELens #446).

    Args:
        sae: Any SAE, in training or saved.
        activations: Activations as the SAE takes them, shape (n_tokens, d_in).
        batch_size: Tokens to run at once.

    Returns:
        `explained_variance` (1 - squared error / variance about the mean, over all tokens and
        dimensions), `l0` (features per token) and `dead_features` (active on no token).
    """
    was_training = sae.training
    sae.eval()
    firings = torch.zeros(sae.cfg.d_sae, dtype=torch.long, device=sae.device)
    squared_error = 0.0
    for batch in activations.split(batch_size):
        batch = batch.to(sae.device)
        batch_firings, sae_out = _autoencode(sae, batch)
        firings += batch_firings
        squared_error += float((sae_out - batch).pow(2).sum(dtype=torch.float64))
    sae.train(was_training)
    centred = activations - activations.mean(0)
    variance = float(centred.pow(2).sum(dtype=torch.float64))
    return {
        "explained_variance": 1 - squared_error / variance,
        "l0": firings.sum().item() / len(activations),
        "dead_features": int((firings == 0).sum()),
    }


def _autoencode(sae: SAE[Any], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of tokens on which each feature is active, and the reconstruction."""
    if isinstance(sae, AllocationTrainingSAE):
        pairs, sae_out = sae.autoencode_pairs(x, by_threshold=True)
        return pairs.feature_counts(), sae_out
    feature_acts = sae.encode(x)
    return (feature_acts.to_dense() != 0).sum(0), sae.decode(feature_acts)
