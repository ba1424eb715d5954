"""The running statistics of an allocation, and the allocation of each training batch."""

from typing import ClassVar, Literal, get_args

import torch
from typing_extensions import override

from sae_lens_alloc.allocation.density import fit_floor
from sae_lens_alloc.allocation.margin import Margin, split_at_budget
from sae_lens_alloc.allocation.quotas import take_whole_quotas
from sae_lens_alloc.allocation.sparse_activations import Pairs, SparseActivations
from sae_lens_alloc.allocation.thresholds import follow_cut, track_threshold
from sae_lens_alloc.ops.backend import Backend
from sae_lens_alloc.ops.block_encoder import BlockEncoder
from sae_lens_alloc.ops.encode_select import (
    encode_and_count,
    encode_feature_choice,
    encode_mutual_choice,
)
from sae_lens_alloc.saes.batch_quotas import QuotaState
from sae_lens_alloc.saes.density_statistics import kept_in_place
from sae_lens_alloc.saes.settling_clock import UNKNOWN

Rule = Literal["mutual", "feature"]

# About the ratio of the margin's smallest affinity to the cut, where the last is not known.
MARGIN_CUT_GUESS = 0.5

# Under Mutual Choice the threshold of a feature is the cut, or lower such that it fires at least
# at this share of the mean density: on 1 token in 5,000 with k = 16 and 3,072 features.
MIN_DENSITY_SHARE = 0.04
# No threshold is a smaller share of the cut.
LOWEST_THRESHOLD = 0.01

# Features that fired less often in a sample of tokens say nothing about the law's tail.
MIN_EVENTS = 10


class AllocationState(QuotaState):
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

    tracked: ClassVar[tuple[str, ...]] = (*QuotaState.tracked, "threshold", "cut")
    added_later: ClassVar[tuple[str, ...]] = (*QuotaState.added_later, "backend")

    threshold: torch.Tensor  # (F,) inference threshold of each feature
    cut: torch.Tensor  # () running cut of Mutual Choice, 0 before the first batch
    backend: torch.Tensor  # () index of the backend that was found fastest, or UNKNOWN

    def __init__(
        self,
        d_sae: int,
        density_window_tokens: int,
        max_density: float,
        min_tokens_per_feature: float,
        device: torch.device,
    ) -> None:
        super().__init__(
            d_sae, density_window_tokens, max_density, min_tokens_per_feature, device
        )
        self.register_buffer("threshold", torch.zeros(d_sae, device=device))
        self.register_buffer("cut", torch.zeros((), device=device))
        self.register_buffer("backend", torch.full((), UNKNOWN, device=device))

    @override
    def _forget_derived(self) -> None:
        super()._forget_derived()
        self._backend_name: Backend | None = None
        self._cut_is_known: bool | None = None
        # kept in place
        self._bounds: torch.Tensor | None = None
        self._margin_cut: torch.Tensor | None = None
        self._lowered: torch.Tensor | None = None

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
    ) -> tuple[Pairs, Margin | None]:
        """
        Allocates the budget of a training batch, or of a part of it, and updates the
        statistics.

        Args:
            encoder: What gives the affinities.
            x: Encoder inputs of shape (B, d_in).
            budget: Number of pairs M.
            rule: Rule of this step.
            previous_rule: Rule of the step before, None at the first step.
            n_margin: Pairs of the margin below the cut of Mutual Choice.
            continues: Whether this is another part of the last call's step.

        Returns:
            The active pairs, and the margin, None if there is none.

        Raises:
            ValueError: if min_tokens_per_feature does not fit into the budget.
        """
        after_mutual = previous_rule == "mutual"
        if rule == "feature":
            self.prepare_feature_choice(
                encoder, x, budget, after_mutual and not continues
            )
        if not continues:
            if rule == "feature":
                self._restart_thresholds()
            self.begin_totals()
            if rule == "mutual":
                self._begin_mutual_step(after_mutual)
        if rule == "mutual":
            return self._allocate_mutual(encoder, x, budget, n_margin)
        return self._allocate_feature(encoder, x, budget), None

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
        if begins:
            self._anchor_quota_law(fit_floor(len(x)))
        if not self._knows_cut():
            self.begin_totals()
            self._follow_cut(encode_mutual_choice(encoder, x, budget, None), len(x))
        if begins:
            self.threshold.copy_(self.cut)
        self._prepare_quotas(len(x), budget)

    def _begin_mutual_step(self, after_mutual: bool) -> None:
        """Thresholds relative to the cut: 1, and less for features that would hardly fire."""
        lowered = torch.ones_like(self.threshold)
        if after_mutual:
            lowered = (self.threshold / self.cut).nan_to_num(1.0)
            lowered = lowered.clamp(LOWEST_THRESHOLD, 1.0)
        self._lowered = kept_in_place(self._lowered, lowered)

    def _allocate_mutual(
        self,
        encoder: BlockEncoder,
        x: torch.Tensor,
        budget: int,
        n_margin: int,
    ) -> tuple[Pairs, Margin | None]:
        cut, lowered = self._totals.start["cut"], self._lowered
        assert lowered is not None  # of the step's beginning
        knows_cut = self._knows_cut()
        # without a margin all thresholds are the cut, and nothing has to be counted
        thresholds = lowered * cut if n_margin > 0 and knows_cut else None
        best, above = encode_and_count(
            encoder,
            x,
            budget + n_margin,
            self._likely_cut(n_margin) if knows_cut else None,
            thresholds,
        )
        if len(best.places.values) == 0:
            self.update_density(best.feature_counts(), len(x))
            return best, None
        pairs, margin = best, None
        if n_margin > 0:
            self._margin_cut = kept_in_place(
                self._margin_cut, best.smallest_value().float()
            )
            pairs, margin = split_at_budget(best, budget, n_margin)
        self._follow_cut(pairs, len(x))
        if above is not None:
            at_least = MIN_DENSITY_SHARE * budget / len(lowered)
            lowered = track_threshold(
                lowered,
                self._totals.add("above", above),
                self._totals.add("at_least", at_least),
            ).clamp(max=1.0)
        self.threshold.copy_(lowered * self.cut if n_margin > 0 else self.cut)
        self.update_density(pairs.feature_counts(), len(x))
        return pairs, margin

    def _restart_thresholds(self) -> None:
        """
        Puts to the cut what is never tracked from: 0, or infinity, as a source's silenced
        features have. A factor would not leave them.
        """
        restart = ~(self.threshold > 0) | self.threshold.isinf()
        self.threshold.copy_(self.cut.where(restart, self.threshold))

    def _allocate_feature(
        self, encoder: BlockEncoder, x: torch.Tensor, budget: int
    ) -> Pairs:
        totals = self._totals
        start = totals.start
        quotas, max_pairs = self._quotas(start["density"], len(x), budget)
        selection = encode_feature_choice(
            encoder,
            x,
            take_whole_quotas(quotas, self.quota_carry, max_pairs),
            start["threshold"],
            start["cut"],
            self._likely_bounds(),
            max_pairs,
        )
        self._bounds = kept_in_place(self._bounds, selection.bounds)
        self.threshold.copy_(
            track_threshold(
                start["threshold"],
                totals.add("above", selection.above),
                totals.add("quotas", quotas),
            )
        )
        self.cut.copy_(
            track_threshold(
                start["cut"],
                totals.add("demand", selection.demand.sum()),
                totals.add("budget", budget),
            )
        )
        self.update_density(selection.demand, len(x))
        return selection.pairs

    @torch.no_grad()
    def start_from(
        self,
        encoder: BlockEncoder,
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
        self.begin_totals()
        self._follow_cut(pairs, len(x))
        self.density_tokens.zero_()
        self.begin_totals()
        self.update_density(pairs.feature_counts(), len(x))
        if not keep_law:
            self._anchor_quota_law(MIN_EVENTS / len(x))

    @torch.no_grad()
    def preview(
        self,
        encoder: BlockEncoder,
        x: torch.Tensor,
        budget: int,
        rule: Rule,
    ) -> SparseActivations:
        """The allocation that a batch would get, without any change of the statistics."""
        if rule == "mutual":
            cut = self.cut if self._knows_cut() else None
            return encode_mutual_choice(encoder, x, budget, cut).without_padding()
        quotas, max_pairs = self._quotas(self.density, len(x), budget)
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

    @property
    def backend_name(self) -> Backend | None:
        """The backend that was found fastest, None if none was tried."""
        if self._backend_name is None:
            index = int(self.backend)
            self._backend_name = None if index < 0 else get_args(Backend)[index]
        return self._backend_name

    def record_backend(self, backend: Backend) -> None:
        """Keeps the backend for the steps to come, and for those after a checkpoint."""
        self.backend.fill_(get_args(Backend).index(backend))
        self._backend_name = backend

    def _knows_cut(self) -> bool:
        if not self._cut_is_known:
            self._cut_is_known = bool(self.cut > 0)
        return self._cut_is_known

    def _follow_cut(self, pairs: Pairs, n_tokens: int) -> None:
        """
        Moves the running cut towards that of the step: the smallest selected affinity, of
        several calls their mean over tokens.
        """
        if len(pairs.places.values) == 0:
            return
        smallest = pairs.smallest_value().float()
        n_seen = self._totals.add("n_cut_tokens", n_tokens)
        total = self._totals.add("cuts", smallest * n_tokens)
        if n_seen > n_tokens:
            smallest = total / n_seen
        start = self._totals.start["cut"]
        # a first cut is taken as it is
        followed = torch.where(start > 0, follow_cut(start, smallest), smallest)
        # infinite where all the pairs are padding
        self.cut.copy_(torch.where(smallest.isinf(), self.cut, followed))
