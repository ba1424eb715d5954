"""
Mutual Choice without a question to the device: exact, in a fixed number of launches of fixed
size, so that the host never waits for a count.

Every positive affinity has a unique key (see pair_keys.py), and the M largest keys are the
selection, ties included.

1. Collect the keys that reach a guess into a buffer of fixed capacity, and count them.
2. Where there are M of them and they fit, the guess was good. Otherwise find, digit by digit
   from the top, a lower bound that at least M keys and at most a bufferful reach, and collect
   again. All of these launches are always made; they look at a flag on the device and end at
   once where the guess was good.
3. The M largest of the buffer, in row order. Where fewer than M affinities are positive, the
   last places hold padding.

More than 2^32 affinities are gone through in groups of features. One guess serves all of them;
where it was not good, each group finds its own M largest, of which the M largest are taken.
"""

from functools import reduce

import torch

from sae_lens_alloc.allocation.sparse_activations import PaddedActivations
from sae_lens_alloc.distributed.ranks import ALONE, Ranks
from sae_lens_alloc.ops.encoder_tensors import tensors_for_kernels
from sae_lens_alloc.ops.mutual_choice_keys import (
    SHIFTS,
    CollectedKeys,
    KeyEncoder,
)
from sae_lens_alloc.ops.pair_keys import (
    LEAST_KEY,
    feature_groups,
    joined,
    pairs_of_keys,
)

# Places for candidates per pair of the budget.
CAPACITY_FACTOR = 4
MIN_CAPACITY = 1024


def key_encoder(
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    scale: torch.Tensor | None,
    x: torch.Tensor,
) -> KeyEncoder | None:
    """The kernels that encode to keys, None where the backend has none for such tensors."""
    tensors = tensors_for_kernels(W_enc, b_enc, scale, x)
    if tensors is None:
        return None
    # imported where it is used, since Triton need not be installed
    from sae_lens_alloc.ops.triton_mutual_choice import TritonKeyEncoder
    from sae_lens_alloc.ops.triton_prefilter import PrefilterKeyEncoder, can_prefilter

    kind = PrefilterKeyEncoder if can_prefilter(tensors) else TritonKeyEncoder
    return kind(tensors.x, tensors.W_enc, tensors.b_enc, tensors.scale)


def select_by_keys(
    encoder: KeyEncoder,
    budget: int,
    guess: torch.Tensor | None,
    thresholds: torch.Tensor | None = None,
    ranks: Ranks = ALONE,
) -> tuple[PaddedActivations, torch.Tensor | None]:
    """
    Selects the `budget` largest positive affinities, as `encode_and_count` does.

    Args:
        encoder: What gives the keys.
        budget: Number of pairs M, at least 1.
        guess: Guess of a lower bound of the smallest selected affinity, positive scalar
            tensor, or None. It only makes the selection faster.
        thresholds: Shape (F,), or None not to count.
        ranks: The ranks that share the features.

    Returns:
        min(M, B * F) places for pairs, with padding where fewer affinities are positive; and
        on how many tokens each feature exceeds its threshold, int64 of shape (F,), or None.
    """
    groups = feature_groups(*encoder.shape)
    parts = [encoder.part(group) for group in groups]
    limits = [None if thresholds is None else thresholds[group] for group in groups]
    capacities = [_capacity(part, budget) for part in parts]
    firsts = [
        part.collect_guess(guess, capacity, limit)
        for part, capacity, limit in zip(parts, capacities, limits, strict=True)
    ]
    n_reached = reduce(torch.add, [first.n_reached for first in firsts])
    good = reduce(torch.logical_and, [first.is_complete for first in firsts])
    n_places = min(budget, encoder.shape[0] * encoder.shape[1])
    if ranks.is_alone:
        good = good & (n_reached >= n_places)
    else:
        totals = [n_reached, torch.full_like(n_reached, n_places), (~good).long()]
        n_reached, n_wanted, n_incomplete = ranks.sum(torch.stack(totals))
        good = (n_incomplete == 0) & (n_reached >= n_wanted.clamp(max=budget))

    best, counts = [], []
    for part, first, capacity, limit in zip(
        parts, firsts, capacities, limits, strict=True
    ):
        n_best = min(budget, capacity)
        second = _collect_best(part, n_best, capacity, good, limit)
        keys = torch.where(good, first.keys, second.keys)
        best.append(keys.topk(n_best, sorted=False).values)
        if first.above is not None and second.above is not None:
            counts.append(torch.where(good, first.above, second.above))
    pairs = pairs_of_keys(best, groups, encoder.shape, n_places)
    return pairs, joined(counts) if counts else None


def _capacity(encoder: KeyEncoder, budget: int) -> int:
    n_positions = encoder.shape[0] * encoder.shape[1]
    return min(max(CAPACITY_FACTOR * budget, MIN_CAPACITY), n_positions)


def _collect_best(
    encoder: KeyEncoder,
    n_best: int,
    capacity: int,
    done: torch.Tensor,
    thresholds: torch.Tensor | None,
) -> CollectedKeys:
    """
    Collects the `n_best` largest keys and at most a bufferful, by a search for their bound.

    Args:
        encoder: What gives the keys.
        n_best: Number of keys wanted.
        capacity: Places for keys, at least `n_best`.
        done: Boolean of shape (). Where it is true nothing is collected.
        thresholds: Thresholds of the features, shape (F,), or None not to count.
    """
    bound = torch.zeros((), dtype=torch.int64, device=done.device)
    rank = torch.full_like(bound, n_best)
    found = done.clone()
    for shift in SHIFTS:
        counts = encoder.histogram(bound, shift, found)
        encoder.find_digit(counts, bound, rank, found, shift, capacity - n_best)
    return encoder.collect(bound.clamp(min=LEAST_KEY), done, capacity, thresholds)
