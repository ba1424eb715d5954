"""The best pairs of a batch whose features are spread over ranks, exactly and without a wait."""

import torch

from sae_lens_alloc.allocation.margin import Margin
from sae_lens_alloc.allocation.sparse_activations import Pairs
from sae_lens_alloc.distributed.feature_shard import FeatureShard
from sae_lens_alloc.distributed.largest import nth_largest
from sae_lens_alloc.ops.pair_keys import bits_for

# Floating-point numbers as whole numbers that order like them, where they are positive.
_WHOLE_NUMBERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def split_over_ranks(
    candidates: Pairs, budget: int, n_margin: int, shard: FeatureShard
) -> tuple[Pairs, Margin]:
    """
    `split_at_budget` where each rank has the candidates of its features. All ranks together take
    the pairs that one process would, ties included: of equal affinities the lower token goes
    first, then the lower feature.

    Args:
        candidates: Pairs of this rank with positive affinities, in row order. Those of all ranks
            hold the `budget + n_margin` largest affinities of the batch, or all positive ones.
        budget: Number of pairs M of all ranks.
        n_margin: Pairs of the margin of all ranks.
        shard: The features of this rank.

    Returns:
        This rank's pairs within the budget, and its part of the margin below it. The width of the
        margin is that of all ranks.
    """
    places, real = candidates.places, candidates.real
    values, ranks = places.values, shard.ranks
    counts = torch.ones_like(values, dtype=torch.bool) if real is None else real
    # the limits of the budget, and of budget and margin together
    taken = torch.stack(
        [
            torch.full((), n, dtype=torch.int64, device=values.device)
            for n in (budget, budget + n_margin)
        ]
    )
    n_value_bits = 8 * values.element_size() - 1
    order = values.detach().view(_WHOLE_NUMBERS[values.dtype]).long()
    counts = counts.expand(len(taken), -1)
    least, n_above = nth_largest(order, counts, taken, n_value_bits, ranks)
    # of equal affinities, the first positions
    n_positions = places.shape[0] * shard.n_features
    features = shard.ids(values.device)[places.feature_indices]
    from_last = n_positions - 1 - (places.token_indices * shard.n_features + features)
    is_tied = counts & (order == least[:, None])
    last_tie, _ = nth_largest(
        from_last, is_tied, taken - n_above, bits_for(n_positions), ranks
    )
    inside = (counts & (order > least[:, None])) | (
        is_tied & (from_last >= last_tie[:, None])
    )
    selected, below = (
        candidates.only(inside[0]),
        candidates.only(inside[1] & ~inside[0]),
    )
    zero = values.new_zeros(1)
    largest = torch.cat([_real_values(below), zero]).max()
    # negative where no rank has a pair in the margin
    width = ranks.largest(largest) - ranks.smallest(below.smallest_value())
    return selected, Margin(below, width.clamp(min=0))


def _real_values(pairs: Pairs) -> torch.Tensor:
    values = pairs.places.values
    return values if pairs.real is None else values.where(pairs.real, 0.0)
