"""What can be said of a feature in a few numbers."""

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE

from sae_lens_alloc.allocation.sparse_activations import SparseActivations
from sae_lens_alloc.features.ragged import offsets_of

N_BINS = 40
# Edges of the bands that examples are taken from, as shares of a feature's active tokens.
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, eq=False)
class FeatureFigures:
    """
    Figures of n features on some text.

    Args:
        firings: Number of tokens on which each is active, int64 of shape (n,).
        mean: Mean activation where it is active, 0 of a dead feature, shape (n,).
        quantiles: Activations at QUANTILES, from the smallest to the largest, 0 of a dead
            feature, shape (n, 5).
        histogram: Number of tokens whose activation is in each of N_BINS equal parts of 0 to the
            largest activation, int64 of shape (n, N_BINS).
    """

    firings: torch.Tensor
    mean: torch.Tensor
    quantiles: torch.Tensor
    histogram: torch.Tensor

    @property
    def largest(self) -> torch.Tensor:
        """Largest activation of each feature, 0 of a dead one, shape (n,)."""
        return self.quantiles[:, -1]


def measure_figures(pairs: SparseActivations) -> FeatureFigures:
    """
    Figures of the features of some pairs.

    Args:
        pairs: Active pairs with positive values.
    """
    n = pairs.shape[1]
    firings = pairs.feature_counts()
    totals = torch.zeros(n, dtype=torch.float64)
    totals.scatter_add_(0, pairs.feature_indices, pairs.values.double())
    order = strongest_last(pairs)
    values, starts = pairs.values[order], offsets_of(firings)[:-1]
    quantiles = torch.zeros(n, len(QUANTILES))
    alive = firings > 0
    for i, quantile in enumerate(QUANTILES):
        places = starts + ((firings - 1) * quantile).round().long()
        quantiles[alive, i] = values[places[alive]]
    largest = quantiles[:, -1][pairs.feature_indices]
    bins = (pairs.values / largest * N_BINS).long().clamp(max=N_BINS - 1)
    histogram = (pairs.feature_indices * N_BINS + bins).bincount(minlength=n * N_BINS)
    return FeatureFigures(
        firings,
        (totals / firings.clamp(min=1)).float(),
        quantiles,
        histogram.view(n, N_BINS),
    )


def strongest_last(pairs: SparseActivations) -> torch.Tensor:
    """
    An order of the pairs: by feature, and those of a feature by activation, the smallest first
    and among equals the last token first. int64 of shape (N,).
    """
    by_value = pairs.values.flip(0).argsort(stable=True)
    order = len(pairs.values) - 1 - by_value
    return order[pairs.feature_indices[order].argsort(stable=True)]


def decoder_directions(sae: SAE[Any]) -> torch.Tensor:
    """What one unit of activation of each feature adds to the reconstruction, shape (d_sae, d_in)."""
    directions = sae.W_dec.detach().float()
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        # their activations are multiplied by the norm, and divided by it again to decode
        return directions / sae.get_W_dec_norm().detach().float()[:, None]
    return directions
