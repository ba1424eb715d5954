"""The allocation of each training batch, which goes by the running statistics and moves them."""

from dataclasses import dataclass
from typing import Literal

import torch

from sae_lens_alloc.allocation.density import fit_floor
from sae_lens_alloc.allocation.margin import Margin, split_at_budget
from sae_lens_alloc.allocation.quotas import take_whole_quotas
from sae_lens_alloc.allocation.sparse_activations import Pairs, SparseActivations
from sae_lens_alloc.allocation.token_share import unscaled, unscaled_margin
from sae_lens_alloc.distributed.feature_shard import FeatureShard
from sae_lens_alloc.ops.block_encoder import BlockEncoder
from sae_lens_alloc.ops.encode_select import (
    encode_and_count,
    encode_feature_choice,
    encode_mutual_choice,
)
from sae_lens_alloc.ops.pair_keys import BOUND_SHARE
from sae_lens_alloc.ops.split_over_ranks import split_over_ranks
from sae_lens_alloc.ops.token_share import relative_to_tokens
from sae_lens_alloc.saes.allocation_statistics import AllocationStatistics
from sae_lens_alloc.saes.batch_quotas import BatchQuotas
from sae_lens_alloc.saes.running_statistics import Derived, kept_in_place

Rule = Literal["mutual", "feature"]

# About the ratio of the margin's smallest affinity to the cut, where the last is not known.
MARGIN_CUT_GUESS = 0.5

# Features that fired less often in a sample of tokens say nothing about the law's tail.
MIN_EVENTS = 10


@dataclass
class Guesses:
    """
    What one step leaves to the next. It makes selections faster and changes nothing of them,
    so that no checkpoint keeps it. The tensors are kept in place.

    Args:
        cut_is_known: Whether there was a first cut.
        bounds: Lower bound of each feature's cut under Feature Choice, shape (F,).
        margin_cut: Smallest affinity of the budget and its margin, of shape ().
        lowered: Thresholds relative to the cut as the running step began, shape (F,).
    """

    cut_is_known: bool = False
    bounds: torch.Tensor | None = None
    margin_cut: torch.Tensor | None = None
    lowered: torch.Tensor | None = None

    def knows_cut(self, cut: torch.Tensor) -> bool:
        """Whether there was a first cut, for which the device is asked until there was."""
        if not self.cut_is_known:
            self.cut_is_known = bool(cut > 0)
        return self.cut_is_known

    def likely_cut(self, cut: torch.Tensor, n_margin: int) -> torch.Tensor:
        """Guess of the smallest affinity of the budget and its margin, scalar tensor."""
        if n_margin == 0:
            return cut
        return cut * MARGIN_CUT_GUESS if self.margin_cut is None else self.margin_cut

    def likely_bounds(self, thresholds: torch.Tensor) -> torch.Tensor:
        """Guesses of a lower bound of each feature's cut, shape (F,)."""
        return thresholds * BOUND_SHARE if self.bounds is None else self.bounds


class Allocator:
    """
    Gives out the budget of each batch.

    Args:
        statistics: The running statistics.
        max_density: Largest share of a batch's tokens for one feature, under Feature Choice.
        min_tokens_per_feature: Smallest quota of a feature in tokens per batch.
    """

    def __init__(
        self,
        statistics: AllocationStatistics,
        max_density: float,
        min_tokens_per_feature: float,
    ) -> None:
        self.statistics = statistics
        self.quotas = BatchQuotas(statistics, max_density, min_tokens_per_feature)
        self._guesses = Derived(statistics, Guesses)

    @property
    def guesses(self) -> Guesses:
        """What the last step left, or none after the statistics were loaded or moved."""
        return self._guesses.get()

    @torch.no_grad()
    def allocate(
        self,
        encoder: BlockEncoder,
        x: torch.Tensor,
        budget: int,
        rule: Rule,
        previous_rule: Rule | None,
        n_margin: int = 0,
        continues: bool = False,
        topk_share: float = 0.0,
    ) -> tuple[Pairs, Margin | None]:
        """
        Allocates the budget of a training batch, or of a part of it, and moves the statistics.

        Args:
            encoder: What gives the affinities.
            x: Encoder inputs of shape (B, d_in).
            budget: Number of pairs M.
            rule: Rule of this step.
            previous_rule: Rule of the step before, None at the first step.
            n_margin: Pairs of the margin below the cut of Mutual Choice.
            continues: Whether this is another part of the last call's step.
            topk_share: What is left of TopK under Mutual Choice (`allocation/token_share.py`).

        Returns:
            The active pairs, and the margin, None if there is none.

        Raises:
            ValueError: if min_tokens_per_feature does not fit into the budget.
        """
        statistics, after_mutual = self.statistics, previous_rule == "mutual"
        if rule == "feature":
            self.prepare_feature_choice(
                encoder, x, budget, after_mutual and not continues
            )
        if not continues:
            if rule == "feature":
                statistics.restart_thresholds()
            statistics.begin_totals()
            if rule == "mutual":
                self._begin_mutual_step(after_mutual)
        if rule == "feature":
            return self._allocate_feature(encoder, x, budget), None
        encoder, x, factors = relative_to_tokens(encoder, x, budget, topk_share)
        pairs, margin = self._allocate_mutual(encoder, x, budget, n_margin)
        return unscaled(pairs, factors), unscaled_margin(margin, factors)

    @torch.no_grad()
    def prepare_feature_choice(
        self,
        encoder: BlockEncoder,
        x: torch.Tensor,
        budget: int,
        begins: bool,
    ) -> None:
        """
        What the host does before Feature Choice allocates a batch, and does not do where the
        batch is like the one before: a change of rule, a first cut, and the quotas of another
        budget. The rest of a step is the same launches at every step.

        Args:
            encoder: What gives the affinities.
            x: Encoder inputs of shape (B, d_in).
            budget: Number of pairs M.
            begins: Whether Feature Choice takes over from Mutual Choice.

        Raises:
            ValueError: if min_tokens_per_feature does not fit into the budget.
        """
        statistics = self.statistics
        if begins:
            self.quotas.anchor_law(fit_floor(len(x)))
        if not self.guesses.knows_cut(statistics.cut):
            statistics.begin_totals()
            pairs = encode_mutual_choice(encoder, x, budget, None, statistics.shard)
            statistics.follow_cut(pairs, len(x))
        if begins:
            statistics.threshold.copy_(statistics.cut)
        self.quotas.prepare(len(x), budget)

    def _begin_mutual_step(self, after_mutual: bool) -> None:
        """Thresholds relative to the cut: 1, and less for features that would hardly fire."""
        guesses, statistics = self.guesses, self.statistics
        lowered = torch.ones_like(statistics.threshold)
        if after_mutual:
            lowered = statistics.relative_thresholds()
        guesses.lowered = kept_in_place(guesses.lowered, lowered)

    def _allocate_mutual(
        self,
        encoder: BlockEncoder,
        x: torch.Tensor,
        budget: int,
        n_margin: int,
    ) -> tuple[Pairs, Margin | None]:
        guesses, statistics = self.guesses, self.statistics
        cut, lowered = statistics.totals.start["cut"], guesses.lowered
        assert lowered is not None  # of the step's beginning
        knows_cut = guesses.knows_cut(statistics.cut)
        # without a margin all thresholds are the cut, and nothing has to be counted
        thresholds = lowered * cut if n_margin > 0 and knows_cut else None
        shard = statistics.shard
        best, above = encode_and_count(
            encoder,
            x,
            budget + n_margin,
            guesses.likely_cut(statistics.cut, n_margin) if knows_cut else None,
            thresholds,
            shard.ranks,
        )
        if shard.is_whole and len(best.places.values) == 0:
            statistics.update_density(best.feature_counts(), len(x))
            return best, None
        pairs, margin = _split(best, budget, n_margin, shard)
        if margin is not None:
            smallest = pairs.smallest_value().minimum(margin.pairs.smallest_value())
            guesses.margin_cut = kept_in_place(
                guesses.margin_cut, shard.ranks.smallest(smallest.float())
            )
        statistics.follow_cut(pairs, len(x))
        if above is not None:
            lowered = statistics.lower_thresholds(lowered, above, budget)
        statistics.threshold.copy_(
            lowered * statistics.cut if n_margin > 0 else statistics.cut
        )
        statistics.update_density(pairs.feature_counts(), len(x))
        return pairs, margin

    def _allocate_feature(
        self, encoder: BlockEncoder, x: torch.Tensor, budget: int
    ) -> Pairs:
        guesses, statistics = self.guesses, self.statistics
        start = statistics.totals.start
        quotas, max_pairs = self.quotas.of(start["density"], len(x), budget)
        selection = encode_feature_choice(
            encoder,
            x,
            take_whole_quotas(quotas, statistics.quota_carry, max_pairs),
            start["threshold"],
            start["cut"],
            guesses.likely_bounds(statistics.threshold),
            max_pairs,
        )
        guesses.bounds = kept_in_place(guesses.bounds, selection.bounds)
        statistics.track_quotas(selection.above, quotas, selection.demand, budget)
        statistics.update_density(selection.demand, len(x))
        return selection.pairs

    @torch.no_grad()
    def preview(
        self,
        encoder: BlockEncoder,
        x: torch.Tensor,
        budget: int,
        rule: Rule,
        topk_share: float = 0.0,
    ) -> SparseActivations:
        """The allocation that a batch would get, without any change of the statistics."""
        statistics = self.statistics
        if rule == "mutual":
            cut = statistics.cut if self.guesses.knows_cut(statistics.cut) else None
            encoder, x, factors = relative_to_tokens(encoder, x, budget, topk_share)
            pairs = encode_mutual_choice(encoder, x, budget, cut, statistics.shard)
            return unscaled(pairs, factors).without_padding()
        quotas, max_pairs = self.quotas.of(statistics.density, len(x), budget)
        return encode_feature_choice(
            encoder,
            x,
            take_whole_quotas(quotas, statistics.quota_carry.clone(), max_pairs),
            statistics.threshold,
            statistics.cut,
            self.guesses.likely_bounds(statistics.threshold),
            max_pairs,
        ).pairs.without_padding()


def _split(
    best: Pairs, budget: int, n_margin: int, shard: FeatureShard
) -> tuple[Pairs, Margin | None]:
    """The pairs within the budget and the margin, None without one, of this rank's candidates."""
    if shard.is_whole:
        return split_at_budget(best, budget, n_margin) if n_margin else (best, None)
    pairs, margin = split_over_ranks(best, budget, n_margin, shard)
    return pairs, margin if n_margin else None


@torch.no_grad()
def start_from_tokens(
    allocator: Allocator,
    encoder: BlockEncoder,
    x: torch.Tensor,
    budget: int,
    keep_law: bool,
) -> None:
    """
    Takes the cut, the densities and the law of the quotas from tokens, as if these had been
    trained on already. Thresholds stay as they are.

    Args:
        allocator: What allocates, with the statistics to start.
        encoder: What gives the affinities.
        x: Encoder inputs of shape (T, d_in), allocated as one batch.
        budget: Number of pairs M for all of them.
        keep_law: Whether the law of the quotas stays, as it should where the densities were
            shaped by it.
    """
    statistics = allocator.statistics
    pairs = encode_mutual_choice(encoder, x, budget, None, statistics.shard)
    statistics.cut.zero_()
    statistics.forget_derived()
    statistics.begin_totals()
    statistics.follow_cut(pairs, len(x))
    statistics.density_tokens.zero_()
    statistics.begin_totals()
    statistics.update_density(pairs.feature_counts(), len(x))
    if not keep_law:
        allocator.quotas.anchor_law(MIN_EVENTS / len(x))
