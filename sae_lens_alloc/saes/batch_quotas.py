"""The quotas of Feature Choice: what the law that sets them gives each feature of a batch."""

from dataclasses import dataclass

import torch

from sae_lens_alloc.allocation.density import density_ranks
from sae_lens_alloc.allocation.quota_curve import QuotaCurve
from sae_lens_alloc.allocation.quotas import most_whole_quotas
from sae_lens_alloc.allocation.zipf import (
    FittedLaw,
    in_float64,
    log_shape,
    require_smallest_quota,
)
from sae_lens_alloc.saes.allocation_statistics import AllocationStatistics
from sae_lens_alloc.saes.running_statistics import Derived, kept_in_place


@dataclass
class _Prepared:
    """
    Quotas by rank, kept in place, and what they hold for.

    Args:
        curve: What the quotas sum to, by the law.
        by_rank: Quotas from the first rank to the last, shape (F,).
        curve_tokens: Tokens of the batch that the curve is for.
        tokens_and_budget: Those that the quotas are for.
    """

    curve: QuotaCurve | None = None
    by_rank: torch.Tensor | None = None
    curve_tokens: int | None = None
    tokens_and_budget: tuple[int, int] | None = None


class BatchQuotas:
    """
    The fractional quotas of a batch. The host is told nothing of them, and knows what they sum
    to.

    Args:
        statistics: The statistics, of which the quotas go by `quota_law` and the densities.
        max_density: Largest share of a batch's tokens for one feature.
        min_tokens_per_feature: Smallest quota of a feature in tokens per batch.
    """

    def __init__(
        self,
        statistics: AllocationStatistics,
        max_density: float,
        min_tokens_per_feature: float,
    ) -> None:
        self._statistics = statistics
        self._max_density = max_density
        self._min_tokens_per_feature = min_tokens_per_feature
        self._prepared = Derived(statistics, _Prepared)

    @property
    def by_rank(self) -> torch.Tensor | None:
        """The quotas that were prepared, from the first rank to the last, shape (F,)."""
        return self._prepared.get().by_rank

    @property
    def curve(self) -> QuotaCurve | None:
        """The curve that they were read off."""
        return self._prepared.get().curve

    def of(
        self, density: torch.Tensor, n_tokens: int, budget: int
    ) -> tuple[torch.Tensor, int]:
        """
        Fractional quotas m_j of shape (F,), the law at the rank of each feature's demand, and
        the limit for their whole parts.

        Args:
            density: Densities of the demand, shape (F,).
            n_tokens: Tokens B of the batch.
            budget: Number of pairs M.

        Raises:
            ValueError: if min_tokens_per_feature does not fit into the budget.
        """
        shard = self._statistics.shard
        prepared, n_features = self._prepared.get(), shard.n_features
        require_smallest_quota(self._min_tokens_per_feature, n_features, budget)
        by_rank = prepared.by_rank
        if by_rank is None or prepared.tokens_and_budget != (n_tokens, budget):
            # of a preview, which changes nothing
            by_rank = self._curve(n_tokens).quotas(budget).to(density)
        # what the quotas sum to, without asking them
        total = min(budget, self._max_density * n_tokens * n_features)
        ranks = shard.own(density_ranks(shard.gather(density)))
        return by_rank[ranks], most_whole_quotas(total, n_features)

    def prepare(self, n_tokens: int, budget: int) -> None:
        """
        Brings the quotas by rank up to date, in place. For another budget they are read off
        the curve of the law, and for another law or size of batch that is made anew.

        Args:
            n_tokens: Tokens B of the batch.
            budget: Number of pairs M.

        Raises:
            ValueError: if min_tokens_per_feature does not fit into the budget.
        """
        prepared, density = self._prepared.get(), self._statistics.density
        n_features = self._statistics.shard.n_features
        require_smallest_quota(self._min_tokens_per_feature, n_features, budget)
        if prepared.tokens_and_budget == (n_tokens, budget):
            return
        if prepared.curve is None or prepared.curve_tokens != n_tokens:
            curve = self._curve(n_tokens)
            if prepared.curve is None:
                prepared.curve = curve
            else:
                prepared.curve.copy_(curve)
            prepared.curve_tokens = n_tokens
        quotas = prepared.curve.quotas(budget).to(density)
        prepared.by_rank = kept_in_place(prepared.by_rank, quotas)
        prepared.tokens_and_budget = (n_tokens, budget)

    def _curve(self, n_tokens: int) -> QuotaCurve:
        """What the quotas of a batch of this many tokens sum to, by the law as it is."""
        n_features = self._statistics.shard.n_features
        max_quota = self._max_density * n_tokens
        alpha, beta = in_float64(self._statistics.quota_law)
        ranks = torch.arange(1, n_features + 1, device=alpha.device).double()
        return QuotaCurve.of(
            log_shape(ranks, alpha, beta),
            max_quota,
            min(self._min_tokens_per_feature, max_quota),
        )

    def anchor_law(self, floor: float) -> None:
        """
        Takes the law of the quotas from what Mutual Choice found, once and for all. It stays
        where too few features have fired.

        Args:
            floor: Density at or below which a feature is left out of the fit.
        """
        statistics, prepared = self._statistics, self._prepared.get()
        law = FittedLaw.fit(statistics.shard.gather(statistics.density), floor)
        fitted = torch.stack([law.alpha, law.beta])
        known = law.known.to(statistics.quota_law.device)
        statistics.quota_law.copy_(
            fitted.to(statistics.quota_law).where(known, statistics.quota_law)
        )
        prepared.curve_tokens = prepared.tokens_and_budget = None
