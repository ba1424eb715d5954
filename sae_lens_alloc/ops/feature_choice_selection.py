"""
Feature Choice without a question to the device: exact, in a fixed number of launches of fixed
size, so that the host never waits for a count.

Within a feature every positive affinity has a key, its float32 bits above its inverted token:
the larger key goes first, ties included. Above the inverted feature, keys of a whole batch
sort by feature and from the best token on.

1. Collect the keys that reach a guess for their feature into a buffer of fixed capacity, and
   count those that the statistics need.
2. Features that got fewer than their quota, though more are positive, are gone through again.
   As a rule they are few, and all their positive affinities fit into the buffer. Otherwise a
   search finds a bound for each that its quota reaches, and not many more. If the first keys
   overflowed the buffer, all features are gone through again. Both launches are always made;
   which features to look at is on the device, and they end at once where there is none.
3. Sort the keys, take each feature's best and bring them into row order. Quotas that cannot be
   filled leave padding in the last places.

Features do not compete with each other: where B and F are too large for the keys, groups of
them are allocated one after the other.
"""

from dataclasses import dataclass

import torch

from sae_lens_alloc.allocation.sparse_activations import Pairs
from sae_lens_alloc.ops.encoder_tensors import tensors_for_kernels
from sae_lens_alloc.ops.feature_choice_keys import FeatureKeyEncoder
from sae_lens_alloc.ops.pair_keys import (
    BOUND_SHARE,
    feature_groups,
    joined,
    pair_keys,
    pairs_of_keys,
)

# Candidates wanted per feature beyond twice its quota: with 8 for a quota of 1, about one
# feature in 3000 comes out short by chance.
SPARE_CANDIDATES = 6
# Places in the buffer per candidate wanted.
CAPACITY_FACTOR = 1.5


@dataclass(frozen=True)
class FeatureChoiceSelection:
    """
    Args:
        pairs: The selected pairs.
        demand: Tokens on which each feature's affinity exceeds the cut, shape (F,).
        above: Tokens on which each feature's affinity exceeds its threshold, shape (F,).
        bounds: Bounds for the next batch, shape (F,).
    """

    pairs: Pairs
    demand: torch.Tensor
    above: torch.Tensor
    bounds: torch.Tensor


def feature_key_encoder(
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    scale: torch.Tensor | None,
    x: torch.Tensor,
    thresholds: torch.Tensor,
    cut: torch.Tensor,
) -> FeatureKeyEncoder | None:
    """The kernels that encode to keys, None where the backend has none for such tensors."""
    tensors = tensors_for_kernels(W_enc, b_enc, scale, x)
    if tensors is None:
        return None
    # imported where it is used, since Triton need not be installed
    from sae_lens_alloc.ops.triton_feature_choice import TritonFeatureKeyEncoder

    return TritonFeatureKeyEncoder(
        tensors.x, tensors.W_enc, tensors.b_enc, tensors.scale, thresholds, cut
    )


def select_by_feature_keys(
    encoder: FeatureKeyEncoder,
    quotas: torch.Tensor,
    max_pairs: int,
    guesses: torch.Tensor,
) -> FeatureChoiceSelection:
    """
    Selects each feature's `quotas[j]` largest positive affinities, as `encode_feature_choice`
    does.

    Args:
        encoder: What gives the keys.
        quotas: Integer quotas of shape (F,), whose sum is at most `max_pairs`.
        max_pairs: At least 1.
        guesses: Guesses of a lower bound of each feature's cut, shape (F,). They only make
            the selection faster.

    Returns:
        The selection, with padding up to min(max_pairs, B * F) pairs.
    """
    n_positions = encoder.shape[0] * encoder.shape[1]
    groups = feature_groups(*encoder.shape)
    found = [
        _select_group(
            encoder.part(group),
            quotas[group],
            min(max_pairs, n_positions),
            guesses[group],
        )
        for group in groups
    ]
    return FeatureChoiceSelection(
        pairs_of_keys(
            [part.keys for part in found],
            groups,
            encoder.shape,
            min(max_pairs, n_positions),
        ),
        joined([part.demand for part in found]),
        joined([part.above for part in found]),
        joined([part.bounds for part in found]),
    )


@dataclass(frozen=True)
class _GroupSelection:
    """
    Args:
        keys: Keys of the selected pairs within the group, and padding, int64 of shape (N,).
        demand: As in FeatureChoiceSelection, as the others are.
    """

    keys: torch.Tensor
    demand: torch.Tensor
    above: torch.Tensor
    bounds: torch.Tensor


def _select_group(
    encoder: FeatureKeyEncoder,
    quotas: torch.Tensor,
    max_pairs: int,
    guesses: torch.Tensor,
) -> _GroupSelection:
    """`select_by_feature_keys` for as many features as keys hold."""
    n_positions = encoder.shape[0] * encoder.shape[1]
    n_places = min(max_pairs, n_positions)
    capacity = min(_capacity(n_places, encoder.shape[1]), n_positions)
    has_quota = quotas > 0
    wanted = (2 * quotas + SPARE_CANDIDATES) * has_quota

    keys = quotas.new_zeros(capacity)
    n_taken = quotas.new_zeros(())
    bounds = encoder.bounds_of(guesses).where(has_quota, encoder.above_all)
    reached, positive, above, demand = encoder.collect(bounds, keys, n_taken, None)

    fewest, most = quotas.minimum(positive), wanted.minimum(positive)
    again = reached < fewest
    overflows = n_taken + (most * again).sum() > capacity
    again = again | (overflows & has_quota)
    n_taken = n_taken * ~overflows
    # where all their positive affinities do not fit
    searched = again & ((positive * again).sum() > capacity - n_taken)
    bounds = encoder.find_bounds(searched, fewest, most)
    keys.masked_fill_(again[encoder.features_of(keys)], 0)
    reached_again, *_ = encoder.collect(bounds, keys, n_taken, again)

    counts = torch.where(again, reached_again, reached)
    keys = keys.sort(descending=True).values
    # where the guess did not serve, as many as there are
    ranks = torch.where(again, wanted.minimum(counts), wanted) - 1
    right_bounds = _affinities_at(encoder, keys, counts, ranks)
    next_bounds = moved_bounds(guesses, right_bounds, was_wrong=again)
    return _GroupSelection(
        _best_keys(encoder, keys, counts, quotas, n_places),
        demand,
        above,
        next_bounds.where(has_quota, guesses),
    )


def _capacity(n_pairs: int, n_features: int) -> int:
    wanted = 2 * n_pairs + SPARE_CANDIDATES * min(n_features, n_pairs)
    return int(CAPACITY_FACTOR * wanted)


def _best_keys(
    encoder: FeatureKeyEncoder,
    keys: torch.Tensor,
    counts: torch.Tensor,
    quotas: torch.Tensor,
    n_places: int,
) -> torch.Tensor:
    """
    The first `quotas[j]` keys of each feature j as keys by position (see pair_keys.py), and
    padding, int64 of shape (n_places,).

    Args:
        encoder: What gave the keys.
        keys: In descending order, int64 of shape (capacity,).
        counts: How many there are of each feature, shape (F,).
        quotas: Shape (F,).
        n_places: Number of pairs, of which the last ones are padding.
    """
    n_features = len(counts)
    taken = counts.minimum(quotas)
    ends = taken.cumsum(0)
    skipped = (counts - taken).cumsum(0) - (counts - taken)
    places = torch.arange(n_places, device=keys.device)
    features = torch.searchsorted(ends, places, right=True).clamp(max=n_features - 1)
    chosen = keys[(places + skipped[features]).clamp(max=len(keys) - 1)]
    positions = encoder.tokens_of(chosen) * n_features + features
    by_position = pair_keys(encoder.affinities_of(chosen), positions)
    return by_position * (places < ends[-1])


def _affinities_at(
    encoder: FeatureKeyEncoder,
    keys: torch.Tensor,
    counts: torch.Tensor,
    ranks: torch.Tensor,
) -> torch.Tensor:
    """Affinity of each feature's key at a rank from 0 on, NaN where there is none; shape (F,)."""
    places = counts.cumsum(0) - counts + ranks
    found = keys[places.clamp(0, len(keys) - 1)]
    return encoder.affinities_of(found).where(
        (ranks >= 0) & (ranks < counts), torch.nan
    )


def moved_bounds(
    bounds: torch.Tensor, right: torch.Tensor, was_wrong: torch.Tensor | bool = False
) -> torch.Tensor:
    """
    Moves each bound towards the one that gives the candidates wanted.

    Args:
        bounds: The guesses, shape (F,), 0 where there was none.
        right: What would have been right for this batch, NaN where not known, shape (F,).
        was_wrong: Where the guess did not serve, boolean of shape (F,).
    """
    moved = torch.where((bounds == 0) | was_wrong, right, (bounds + right) / 2)
    return torch.where(right.isnan(), bounds * BOUND_SHARE, moved)
