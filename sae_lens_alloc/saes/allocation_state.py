"""The running statistics of an allocation, and the allocation of each training batch."""

import math
from dataclasses import replace
from typing import Literal

import torch
from typing_extensions import override

from sae_lens_alloc.allocation.density import density_ranks, fit_floor
from sae_lens_alloc.allocation.margin import Margin, split_at_budget
from sae_lens_alloc.allocation.quotas import most_whole_quotas, take_whole_quotas
from sae_lens_alloc.allocation.sparse_activations import SparseActivations
from sae_lens_alloc.allocation.thresholds import follow_cut, track_threshold
from sae_lens_alloc.allocation.zipf import ZipfLaw, zipf_quotas
from sae_lens_alloc.ops.encode_select import (
    Encoder,
    KnownAffinities,
    encode_feature_choice,
    encode_mutual_choice,
)
from sae_lens_alloc.saes.density_state import DensityState

Rule = Literal["mutual", "feature"]

# Law of the quotas where no Mutual Choice came before. Densities that Mutual Choice finds by
# itself are flat for about 16 ranks and then fall with an exponent of about 1.
NATURAL_LAW = ZipfLaw(alpha=1.0, beta=16.0, scale=1.0)

# About the ratio of the margin's smallest affinity to the cut, where the last is not known.
MARGIN_CUT_GUESS = 0.5

# Under Mutual Choice the threshold of a feature is the cut, or lower such that it fires at least
# at this share of the mean density: on 1 token in 5,000 with k = 16 and 3,072 features.
MIN_DENSITY_SHARE = 0.04
# No threshold is a smaller share of the cut.
LOWEST_THRESHOLD = 0.01

# Features that fired less often in a sample of tokens say nothing about the law's tail.
MIN_EVENTS = 10


class AllocationState(DensityState):
    """
    Thresholds, densities and quota remainders: everything that a checkpoint needs besides
    the weights. The densities are those of the demand: the rate at which an affinity exceeds
    the cut.

    Args:
        d_sae: Number of features F.
        density_window_tokens: Averaging window of the densities in tokens.
        max_density: Largest share of a batch's tokens for one feature.
        min_tokens_per_feature: Smallest quota of a feature in tokens per batch.
        device: Device of the buffers.
    """

    threshold: torch.Tensor  # (F,) inference threshold of each feature
    cut: torch.Tensor  # () running cut of Mutual Choice, 0 before the first batch
    quota_carry: torch.Tensor  # (F,) remainders of the fractional quotas
    quota_law: torch.Tensor  # (2,) alpha and beta of the law that sets the quotas

    def __init__(
        self,
        d_sae: int,
        density_window_tokens: int,
        max_density: float,
        min_tokens_per_feature: float,
        device: torch.device,
    ) -> None:
        super().__init__(d_sae, density_window_tokens, device)
        self.max_density = max_density
        self.min_tokens_per_feature = min_tokens_per_feature
        self.register_buffer("threshold", torch.zeros(d_sae, device=device))
        self.register_buffer("cut", torch.zeros((), device=device))
        # random, or all rare features would be paid out in the same batch
        self.register_buffer("quota_carry", torch.rand(d_sae, device=device))
        self.register_buffer(
            "quota_law",
            torch.tensor([NATURAL_LAW.alpha, NATURAL_LAW.beta], device=device),
        )

    @override
    def _forget_derived(self) -> None:
        super()._forget_derived()
        self._cut_is_known: bool | None = None
        self._rank_quotas: tuple[int, int, torch.Tensor, int] | None = None
        self._bounds: torch.Tensor | None = None
        self._margin_cut: torch.Tensor | None = None

    @torch.no_grad()
    def allocate(
        self,
        encoder: Encoder | KnownAffinities,
        x: torch.Tensor,
        budget: int,
        rule: Rule,
        previous_rule: Rule | None,
        n_margin: int = 0,
    ) -> tuple[SparseActivations, Margin | None]:
        """
        Allocates the budget of a training batch and updates the statistics.

        Args:
            encoder: What gives the affinities.
            x: Encoder inputs of shape (B, d_in).
            budget: Number of pairs M.
            rule: Rule of this step.
            previous_rule: Rule of the step before, None at the first step.
            n_margin: Pairs of the margin below the cut of Mutual Choice.

        Returns:
            The active pairs, and the margin, None if there is none.

        Raises:
            ValueError: if min_tokens_per_feature does not fit into the budget.
        """
        after_mutual = previous_rule == "mutual"
        if rule == "mutual":
            return self._allocate_mutual(encoder, x, budget, n_margin, after_mutual)
        if after_mutual:
            self._anchor_quota_law(fit_floor(len(x)))
        return self._allocate_feature(encoder, x, budget, after_mutual), None

    def _allocate_mutual(
        self,
        encoder: Encoder | KnownAffinities,
        x: torch.Tensor,
        budget: int,
        n_margin: int,
        after_mutual: bool,
    ) -> tuple[SparseActivations, Margin | None]:
        guess = self._likely_cut(n_margin) if self._knows_cut() else None
        if n_margin == 0:
            pairs = encode_mutual_choice(encoder, x, budget, guess)
            self._track_cut(pairs)
            self.threshold.copy_(self.cut.expand_as(self.threshold))
            self.update_density(pairs.feature_counts(), len(x))
            return pairs, None
        # 1, and less for features that would hardly fire: thresholds relative to the cut
        lowered = torch.ones_like(self.threshold)
        if after_mutual:
            lowered = (self.threshold / self.cut).nan_to_num(1.0)
            lowered = lowered.clamp(LOWEST_THRESHOLD, 1.0)
        # twice the room that features at their least density take
        n_spare = math.ceil(2 * MIN_DENSITY_SHARE * budget)
        relative = encode_mutual_choice(
            encoder.scaled(1 / lowered), x, budget + n_margin + n_spare, guess
        )
        if len(relative.values) == 0:
            self.update_density(relative.feature_counts(), len(x))
            return relative, None
        smallest = relative.smallest_value()
        self._margin_cut = smallest.float()
        affinities = relative.values * lowered[relative.feature_indices]
        # of features whose threshold is the cut, nothing is known below that
        known = affinities >= smallest
        pairs, margin = split_at_budget(
            replace(relative, values=affinities).only(known), budget, n_margin
        )
        self._track_cut(pairs)
        at_least = MIN_DENSITY_SHARE * budget / len(lowered)
        above = relative.only(relative.values > self.cut).feature_counts()
        lowered = track_threshold(lowered, above, at_least).clamp(max=1.0)
        self.threshold.copy_(lowered * self.cut)
        self.update_density(pairs.feature_counts(), len(x))
        return pairs, margin

    def _allocate_feature(
        self,
        encoder: Encoder | KnownAffinities,
        x: torch.Tensor,
        budget: int,
        after_mutual: bool,
    ) -> SparseActivations:
        if not self._knows_cut():
            self._track_cut(encode_mutual_choice(encoder, x, budget, None))
        # never tracked from 0, which a factor would not leave
        restart = self.threshold <= (math.inf if after_mutual else 0.0)
        self.threshold.copy_(self.cut.where(restart, self.threshold))
        quotas, max_pairs = self._quotas(len(x), budget)
        selection = encode_feature_choice(
            encoder,
            x,
            take_whole_quotas(quotas, self.quota_carry, max_pairs),
            self.threshold,
            self.cut,
            self._likely_bounds(),
            max_pairs,
        )
        self._bounds = selection.bounds
        self.threshold.copy_(track_threshold(self.threshold, selection.above, quotas))
        self.cut.copy_(track_threshold(self.cut, selection.demand.sum(), budget))
        self.update_density(selection.demand, len(x))
        return selection.pairs

    @torch.no_grad()
    def start_from(
        self,
        encoder: Encoder | KnownAffinities,
        x: torch.Tensor,
        budget: int,
        keep_law: bool,
    ) -> None:
        """
        Takes the cut, the densities and the law of the quotas from tokens, as if these had
        been trained on already. Thresholds stay as they are.

        Args:
            encoder: What gives the affinities.
            x: Encoder inputs of shape (T, d_in), allocated as one batch.
            budget: Number of pairs M for all of them.
            keep_law: Whether the law of the quotas stays, as it should where the densities
                were shaped by it.
        """
        pairs = encode_mutual_choice(encoder, x, budget, None)
        self.cut.zero_()
        self._forget_derived()
        self._track_cut(pairs)
        self.density_tokens.zero_()
        self.update_density(pairs.feature_counts(), len(x))
        if not keep_law:
            self._anchor_quota_law(MIN_EVENTS / len(x))

    @torch.no_grad()
    def preview(
        self,
        encoder: Encoder | KnownAffinities,
        x: torch.Tensor,
        budget: int,
        rule: Rule,
    ) -> SparseActivations:
        """The allocation that a batch would get, without any change of the statistics."""
        if rule == "mutual":
            cut = self.cut if self._knows_cut() else None
            return encode_mutual_choice(encoder, x, budget, cut).without_padding()
        quotas, max_pairs = self._quotas(len(x), budget)
        return encode_feature_choice(
            encoder,
            x,
            take_whole_quotas(quotas, self.quota_carry.clone(), max_pairs),
            self.threshold,
            self.cut,
            self._likely_bounds(),
            max_pairs,
        ).pairs.without_padding()

    def _likely_cut(self, n_margin: int) -> torch.Tensor:
        """Guess of the smallest affinity of the budget and its margin, scalar tensor."""
        if n_margin == 0:
            return self.cut
        if self._margin_cut is None:
            return self.cut * MARGIN_CUT_GUESS
        return self._margin_cut

    def _likely_bounds(self) -> torch.Tensor:
        """Guesses of a lower bound of each feature's cut, shape (F,)."""
        return self.threshold * 0.9 if self._bounds is None else self._bounds

    def _quotas(self, n_tokens: int, budget: int) -> tuple[torch.Tensor, int]:
        """
        Fractional quotas m_j of shape (F,), the law at the rank of each feature's demand, and
        the limit for their whole parts.
        """
        if self._rank_quotas is None or self._rank_quotas[:2] != (n_tokens, budget):
            alpha, beta = self.quota_law.tolist()
            by_rank = zipf_quotas(
                ZipfLaw(alpha, beta, scale=1.0),
                len(self.density),
                budget,
                self.max_density * n_tokens,
                self.min_tokens_per_feature,
            )
            max_pairs = most_whole_quotas(float(by_rank.sum()), len(by_rank))
            self._rank_quotas = (
                n_tokens,
                budget,
                by_rank.to(self.density),
                max_pairs,
            )
        *_, by_rank, max_pairs = self._rank_quotas
        return by_rank[density_ranks(self.density)], max_pairs

    def _anchor_quota_law(self, floor: float) -> None:
        """Takes the law of the quotas from what Mutual Choice found, once and for all."""
        law = self.fit_above(floor)
        if law is not None:
            self.quota_law.copy_(torch.tensor([law.alpha, law.beta]))
            self._rank_quotas = None

    def _knows_cut(self) -> bool:
        if not self._cut_is_known:
            self._cut_is_known = bool(self.cut > 0)
        return self._cut_is_known

    def _track_cut(self, pairs: SparseActivations) -> None:
        """Moves the running cut towards the batch's own, its smallest selected affinity."""
        if len(pairs.values) == 0:
            return
        batch_cut = pairs.smallest_value().float()
        if self._knows_cut():
            batch_cut = follow_cut(self.cut, batch_cut)
        # infinite where all the pairs are padding
        self.cut.copy_(torch.where(batch_cut.isinf(), self.cut, batch_cut))
