"""Which text shows a feature: the tokens of its largest activations, and some of all sizes."""

from dataclasses import dataclass

import torch

from sae_lens_alloc.allocation.sparse_activations import SparseActivations
from sae_lens_alloc.features.figures import QUANTILES, strongest_last
from sae_lens_alloc.features.ragged import offsets_of, places_of_runs

N_TOP = 8
N_PER_BAND = 3
N_BANDS = len(QUANTILES) - 1
# With fewer active tokens, the bands would show the same few again.
MIN_FIRINGS = 24


@dataclass(frozen=True, eq=False)
class Examples:
    """
    Tokens that show what n features are active on, by feature, then by band, then by activation,
    the largest first.

    Args:
        features: The feature of each example, int64 of shape (E,).
        bands: 0 for the largest activations, one of each context; 1 for the upper quarter of the
            active tokens to 4 for the lowest quarter; int64 of shape (E,).
        tokens: Its token, numbered through all contexts, int64 of shape (E,).
        values: The activation there, shape (E,).
        n_active: How often the feature is active in the context, int64 of shape (E,).
        active_positions: At which positions of the context, for one example after the other,
            int64 of shape (sum of n_active,).
        active_values: The activations there, of the same shape.
    """

    features: torch.Tensor
    bands: torch.Tensor
    tokens: torch.Tensor
    values: torch.Tensor
    n_active: torch.Tensor
    active_positions: torch.Tensor
    active_values: torch.Tensor


def take_examples(pairs: SparseActivations, length: int) -> Examples:
    """
    Takes up to N_TOP examples of the largest activations of each feature, and N_PER_BAND from
    each quarter of its active tokens, evenly spaced by rank. No token is shown twice.

    Args:
        pairs: Active pairs in row order, of tokens numbered through contexts.
        length: Tokens of a context.
    """
    order = strongest_last(pairs).flip(0)  # features come in falling order
    features, tokens = pairs.feature_indices[order], pairs.token_indices[order]
    counts = pairs.feature_counts()
    starts = len(order) - offsets_of(counts)[1:]
    top = _largest_of_contexts(features, tokens // length, starts)
    places, bands = _places_in_bands(starts, counts)
    taken = torch.zeros(len(order), dtype=torch.bool)
    taken[top] = True
    new = ~taken[places]
    places = torch.cat([top, places[new]])
    bands = torch.cat([torch.zeros_like(top), bands[new]])
    by = ((features[places] * (N_BANDS + 1) + bands) * len(order) + places).argsort()
    places, bands = places[by], bands[by]
    chosen = order[places]
    return Examples(
        features[places],
        bands,
        tokens[places],
        pairs.values[chosen],
        *_activations_in_context(pairs, features[places], tokens[places], length),
    )


def _largest_of_contexts(
    features: torch.Tensor, contexts: torch.Tensor, starts: torch.Tensor
) -> torch.Tensor:
    """Places of the N_TOP first pairs of each feature, where each context counts once."""
    keys = features * (int(contexts.max()) + 1 if len(contexts) else 1) + contexts
    by_key = keys.argsort(stable=True)
    first = torch.ones(len(keys), dtype=torch.bool)
    first[1:] = keys[by_key].diff() != 0
    places = by_key[first].sort().values
    # rank among those of the feature
    n_before = torch.searchsorted(places, starts)
    ranks = torch.arange(len(places)) - n_before[features[places]]
    return places[ranks < N_TOP]


def _places_in_bands(
    starts: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places and bands of N_PER_BAND pairs of each band of each feature that has enough."""
    enough = counts >= MIN_FIRINGS
    n = N_BANDS * N_PER_BAND
    middles = (torch.arange(n) + 0.5) / n
    ranks = (counts[enough, None] * middles).long()
    bands = torch.arange(1, N_BANDS + 1).repeat_interleave(N_PER_BAND).expand_as(ranks)
    return (starts[enough, None] + ranks).flatten(), bands.flatten()


def _activations_in_context(
    pairs: SparseActivations, features: torch.Tensor, tokens: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Number, positions and values of a feature's activations in the context of each token."""
    n_tokens = pairs.shape[0]
    by_feature = pairs.feature_indices.argsort(stable=True)
    keys = (pairs.feature_indices * n_tokens + pairs.token_indices)[by_feature]
    first = features * n_tokens + tokens // length * length
    starts = torch.searchsorted(keys, first)
    n_active = torch.searchsorted(keys, first + length) - starts
    chosen = by_feature[places_of_runs(starts, n_active)]
    return n_active, pairs.token_indices[chosen] % length, pairs.values[chosen]
