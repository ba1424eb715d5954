"""Encoding block by block, so that no dense tokens x features matrix outlives a block."""

from dataclasses import dataclass

import torch

from sae_lens_alloc.allocation.candidates import candidate_positions
from sae_lens_alloc.allocation.feature_choice import RankedCandidates, rank_candidates
from sae_lens_alloc.allocation.margin import split_at_budget
from sae_lens_alloc.allocation.mutual_choice import MutualChoiceCollector
from sae_lens_alloc.allocation.sparse_activations import Pairs, SparseActivations
from sae_lens_alloc.distributed.feature_shard import FeatureShard
from sae_lens_alloc.distributed.ranks import ALONE, Ranks
from sae_lens_alloc.ops.block_encoder import BlockEncoder, Encoder
from sae_lens_alloc.ops.candidate_buffer import CandidateBuffer, asking_costs_a_wait
from sae_lens_alloc.ops.feature_choice_selection import (
    FeatureChoiceSelection,
    feature_key_encoder,
    moved_bounds,
    select_by_feature_keys,
)
from sae_lens_alloc.ops.mutual_choice_selection import key_encoder, select_by_keys
from sae_lens_alloc.ops.pair_keys import BOUND_SHARE
from sae_lens_alloc.ops.split_over_ranks import split_over_ranks

# Of a buffer of candidates: about two are wanted per pair, and a feature has a few more.
PLACES_PER_PAIR = 4
PLACES_PER_FEATURE = 8
MIN_PLACES = 1024


@torch.no_grad()
def encode_mutual_choice(
    encoder: BlockEncoder,
    x: torch.Tensor,
    budget: int,
    cut: torch.Tensor | None,
    shard: FeatureShard | None = None,
) -> Pairs:
    """
    Selects the `budget` largest positive affinities of the tokens x: all of them where
    there are fewer, and always the same whatever `cut` is.

    Args:
        encoder: The encoder.
        x: Encoder inputs of shape (B, d_in).
        budget: Number of pairs M.
        cut: Cut of the last steps, scalar tensor, or None if there was none. A good guess
            makes the selection fast; a bad one costs a second pass, in which the backend
            `triton_prefilter` rounds differently (see triton_prefilter.py).
        shard: The features of this rank, where the encoder has no others; None for all.

    Returns:
        The pairs, padded to min(budget, B * F) by the Triton backend. Of a shard, its part of
        those that all ranks together select.
    """
    if shard is None or shard.is_whole:
        return encode_and_count(encoder, x, budget, cut, None)[0]
    candidates, _ = encode_and_count(encoder, x, budget, cut, None, shard.ranks)
    return split_over_ranks(candidates, budget, 0, shard)[0]


@torch.no_grad()
def encode_and_count(
    encoder: BlockEncoder,
    x: torch.Tensor,
    budget: int,
    cut: torch.Tensor | None,
    thresholds: torch.Tensor | None,
    ranks: Ranks = ALONE,
) -> tuple[Pairs, torch.Tensor | None]:
    """
    `encode_mutual_choice`, and in the same pass on how many tokens each feature's affinity is
    positive and exceeds its threshold.

    Args:
        encoder: The encoder.
        x: Encoder inputs of shape (B, d_in).
        budget: Number of pairs M.
        cut: As in `encode_mutual_choice`.
        thresholds: Shape (F,), or None not to count.
        ranks: The ranks that share the features, of which the encoder has this rank's.

    Returns:
        The pairs, and the counts, int64 of shape (F,), None without thresholds. With other ranks
        the pairs are candidates: those of all ranks hold the `budget` largest affinities, for
        `split_over_ranks` to choose.
    """
    bound = None if cut is None else cut * BOUND_SHARE
    if isinstance(encoder, Encoder):
        keys = key_encoder(encoder.W_enc, encoder.b_enc, encoder.scale, x)
        if keys is not None and budget > 0:
            return select_by_keys(keys, budget, bound, thresholds, ranks)
    if bound is not None and budget > 0 and asking_costs_a_wait(x.device):
        found = _largest_above(encoder, x, budget, bound, thresholds, ranks)
        if found is not None:
            return found
    collector = MutualChoiceCollector((len(x), encoder.n_features), budget, bound)
    counts: list[torch.Tensor] = []
    for block in encoder.blocks(len(x)):
        part = encoder.part(block)
        lowest = collector.bound
        if thresholds is not None and lowest is not None:
            lowest = torch.fmin(thresholds[block], lowest)  # a NaN bounds nothing
        tokens, features, values = part.candidates(part.products(x), lowest)
        if thresholds is not None:
            # few, unlike under Feature Choice: no threshold is above the cut
            exceeding = features[values > thresholds[block][features]]
            counts.append(torch.bincount(exceeding, minlength=part.n_features))
            if collector.bound is not None:
                reach = values >= collector.bound
                tokens, features, values = tokens[reach], features[reach], values[reach]
        collector.add(tokens, features + block.start, values)
    above = torch.cat(counts) if counts else None
    if cut is not None and _too_few(collector.n_candidates, budget, ranks, x.device):
        return encode_mutual_choice(encoder, x, budget, None), above
    return collector.finish(), above


def _too_few(
    n_candidates: int, budget: int, ranks: Ranks, device: torch.device
) -> bool:
    """Whether all ranks together have fewer candidates than the budget."""
    if not ranks.is_alone:
        n_candidates = int(ranks.sum(torch.tensor(n_candidates, device=device)))
    return n_candidates < budget


def _largest_above(
    encoder: BlockEncoder,
    x: torch.Tensor,
    budget: int,
    bound: torch.Tensor,
    thresholds: torch.Tensor | None,
    ranks: Ranks,
) -> tuple[Pairs, torch.Tensor | None] | None:
    """
    `encode_and_count` with one question to the device, or more where fewer than `budget`
    affinities reach the bound. None where on some rank more reach it than there are places for.
    """
    shape = (len(x), encoder.n_features)
    capacity = min(max(PLACES_PER_PAIR * budget, MIN_PLACES), len(x) * shape[1])
    buffer: CandidateBuffer | None = None
    counts: list[torch.Tensor] = []
    for block in encoder.blocks(len(x)):
        part = encoder.part(block)
        affinities = part.affinities_of(part.products(x))
        if buffer is None:
            buffer = CandidateBuffer(capacity, shape, affinities)
        buffer.add(affinities, _just_below(bound.to(affinities)), block.start)
        if thresholds is not None:
            counts.append(_count_above(affinities, thresholds[block]))
    assert buffer is not None
    above = torch.cat(counts) if counts else None
    counted = torch.stack([buffer.count, (buffer.count > capacity).long()])
    n_found, n_in_all, n_overflows = torch.cat(
        [counted[:1], ranks.sum(counted)]
    ).tolist()
    if n_in_all < budget:
        return encode_mutual_choice(encoder, x, budget, None), above
    if n_overflows > 0:
        return None
    found = SparseActivations.from_unordered(*buffer.first(n_found), shape)
    best, _ = split_at_budget(found, budget, 0)
    return best, above


@torch.no_grad()
def encode_feature_choice(
    encoder: BlockEncoder,
    x: torch.Tensor,
    quotas: torch.Tensor,
    thresholds: torch.Tensor,
    cut: torch.Tensor,
    bounds: torch.Tensor,
    max_pairs: int,
) -> FeatureChoiceSelection:
    """
    Selects for each feature its `quotas[j]` largest positive affinities among the tokens x,
    and counts what the statistics need in the same pass.

    Args:
        encoder: The encoder.
        x: Encoder inputs of shape (B, d_in).
        quotas: Integer quotas of shape (F,).
        thresholds: Inference thresholds of shape (F,).
        cut: Running cut of Mutual Choice, scalar tensor.
        bounds: Guesses of a lower bound of each feature's cut, shape (F,), 0 for none. They
            make the selection fast and do not change it.
        max_pairs: What the quotas sum to at most.

    Returns:
        The selection, whose pairs are padded to min(max_pairs, B * F) by the Triton backend.
    """
    if isinstance(encoder, Encoder):
        keys = feature_key_encoder(
            encoder.W_enc, encoder.b_enc, encoder.scale, x, thresholds, cut
        )
        if keys is not None and max_pairs > 0:
            return select_by_feature_keys(keys, quotas, max_pairs, bounds)
    shape = (len(x), encoder.n_features)
    if asking_costs_a_wait(x.device):
        found = _best_by_feature(encoder, x, quotas, thresholds, cut, bounds, max_pairs)
        if found is not None:
            return found
    kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    counts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for block in encoder.blocks(len(x)):
        look = _look(encoder.part(block), x, quotas[block], bounds[block])
        tokens, features = candidate_positions(look.affinities, look.limits)
        ranked = rank_candidates(
            tokens, features, look.affinities[tokens, features], len(look.limits)
        )
        best = ranked.best(quotas[block])
        kept.append((best.tokens, best.features + block.start, best.values))
        counts.append(
            (
                _count_above(look.affinities, cut),
                _count_above(look.affinities, thresholds[block]),
                _next_bounds(bounds[block], ranked, quotas[block]),
            )
        )
    tokens, features, values = map(torch.cat, zip(*kept, strict=True))
    pairs = SparseActivations.from_unordered(tokens, features, values, shape)
    demand, above, next_bounds = map(torch.cat, zip(*counts, strict=True))
    return FeatureChoiceSelection(pairs, demand, above, next_bounds)


def _best_by_feature(
    encoder: BlockEncoder,
    x: torch.Tensor,
    quotas: torch.Tensor,
    thresholds: torch.Tensor,
    cut: torch.Tensor,
    bounds: torch.Tensor,
    max_pairs: int,
) -> FeatureChoiceSelection | None:
    """
    `encode_feature_choice` with one question to the device, None where there are more
    candidates than places.
    """
    shape = (len(x), encoder.n_features)
    capacity = PLACES_PER_PAIR * max_pairs + PLACES_PER_FEATURE * shape[1]
    capacity = min(capacity, len(x) * shape[1])
    buffer: CandidateBuffer | None = None
    counts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for block in encoder.blocks(len(x)):
        look = _look(encoder.part(block), x, quotas[block], bounds[block])
        if buffer is None:
            buffer = CandidateBuffer(capacity, shape, look.affinities)
        buffer.add(look.affinities, look.limits, block.start)
        counts.append(
            (
                _count_above(look.affinities, cut),
                _count_above(look.affinities, thresholds[block]),
                _count_above(look.affinities, look.limits),
            )
        )
    assert buffer is not None
    demand, above, n_candidates = map(torch.cat, zip(*counts, strict=True))
    n_best = n_candidates.minimum(quotas).sum()
    n_found, n_best = torch.stack([buffer.count, n_best]).tolist()
    if n_found > capacity:
        return None
    ranked = rank_candidates(*buffer.first(n_found), shape[1])
    best = ranked.best(quotas, n_best)
    return FeatureChoiceSelection(
        best.in_row_order(shape), demand, above, _next_bounds(bounds, ranked, quotas)
    )


@dataclass(frozen=True)
class _Look:
    """
    The affinities of a block of features, and what a candidate exceeds.

    Args:
        affinities: Shape (B, f).
        limits: Shape (f,), none negative.
    """

    affinities: torch.Tensor
    limits: torch.Tensor


def _look(
    part: BlockEncoder, x: torch.Tensor, quotas: torch.Tensor, bounds: torch.Tensor
) -> _Look:
    """
    Encodes a block. Candidates are what reaches the feature's bound, or, where that is less
    than its quota, all that is positive.
    """
    affinities = part.affinities_of(part.products(x))
    limits = _just_below(bounds.to(affinities))
    enough = _count_above(affinities, limits) >= quotas
    return _Look(affinities, limits.where(enough, 0.0))


def _count_above(affinities: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """
    On how many tokens each feature's affinity is positive and exceeds its limit, int64 of
    shape (f,), of affinities of shape (B, f). Where most of them do, as in the first steps of
    a training, this is many times faster than a list of these.
    """
    # ones and zeros, which torch adds up faster than booleans, and exactly up to 2^24 of them
    exceeds = torch.empty_like(affinities)
    torch.gt(affinities, limits.clamp(min=0), out=exceeds)
    return exceeds.sum(0).long()


def _just_below(bounds: torch.Tensor) -> torch.Tensor:
    """What a positive number exceeds exactly if it reaches the bound, of any shape."""
    return bounds.nextafter(torch.zeros_like(bounds)).clamp(min=0)


def _next_bounds(
    bounds: torch.Tensor, candidates: RankedCandidates, quotas: torch.Tensor
) -> torch.Tensor:
    """Moves each bound towards one that lets about twice the feature's quota pass."""
    at_wanted = candidates.ranks == 2 * quotas[candidates.features] + 3
    # the others go to a place behind the last, as a GPU would be asked how many there are
    places = candidates.features.where(at_wanted, len(bounds))
    right = bounds.new_full((len(bounds) + 1,), torch.nan)
    right.scatter_(0, places, candidates.values.to(bounds.dtype))
    return moved_bounds(bounds, right[:-1])
