"""The quotas of Feature Choice: the law that sets them, and what they are for a batch."""

import torch
from typing_extensions import override

from sae_lens_alloc.allocation.density import density_ranks
from sae_lens_alloc.allocation.quota_curve import QuotaCurve
from sae_lens_alloc.allocation.quotas import most_whole_quotas
from sae_lens_alloc.allocation.zipf import (
    FittedLaw,
    ZipfLaw,
    in_float64,
    log_shape,
    require_smallest_quota,
)
from sae_lens_alloc.saes.density_statistics import kept_in_place
from sae_lens_alloc.saes.settling_clock import SettlingState

# Law of the quotas where no Mutual Choice came before. Densities that Mutual Choice finds by
# itself are flat for about 16 ranks and then fall with an exponent of about 1.
NATURAL_LAW = ZipfLaw(alpha=1.0, beta=16.0, scale=1.0)


class QuotaState(SettlingState):
    """
    Densities, flags and losses, and the law and the remainders of the quotas. The host is told
    nothing of the quotas, and knows what they sum to.

    Args:
        d_sae: Number of features F.
        density_window_tokens: Averaging window of the densities in tokens.
        max_density: Largest share of a batch's tokens for one feature.
        min_tokens_per_feature: Smallest quota of a feature in tokens per batch.
        device: Device of the buffers.
    """

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
        # random, or all rare features would be paid out in the same batch
        self.register_buffer("quota_carry", torch.rand(d_sae, device=device))
        self.register_buffer(
            "quota_law",
            torch.tensor([NATURAL_LAW.alpha, NATURAL_LAW.beta], device=device),
        )

    @override
    def _forget_derived(self) -> None:
        super()._forget_derived()
        # kept in place
        self._quota_curve: QuotaCurve | None = None
        self._rank_quotas: torch.Tensor | None = None
        # what they hold for: the tokens of a batch, and tokens and budget
        self._curve_tokens: int | None = None
        self._quotas_for: tuple[int, int] | None = None

    def _quotas(
        self, density: torch.Tensor, n_tokens: int, budget: int
    ) -> tuple[torch.Tensor, int]:
        """
        Fractional quotas m_j of shape (F,), the law at the rank of each feature's demand, and
        the limit for their whole parts.
        """
        n_features, by_rank = len(density), self._rank_quotas
        require_smallest_quota(self.min_tokens_per_feature, n_features, budget)
        if by_rank is None or self._quotas_for != (n_tokens, budget):
            # of a preview, which changes nothing
            by_rank = self._curve(n_tokens).quotas(budget).to(density)
        # what the quotas sum to, without asking them
        total = min(budget, self.max_density * n_tokens * n_features)
        return by_rank[density_ranks(density)], most_whole_quotas(total, n_features)

    def _prepare_quotas(self, n_tokens: int, budget: int) -> None:
        """
        Brings the quotas by rank up to date, in place. For another budget they are read off
        the curve of the law, and for another law or size of batch that is made anew.
        """
        require_smallest_quota(self.min_tokens_per_feature, len(self.density), budget)
        if self._quotas_for == (n_tokens, budget):
            return
        if self._quota_curve is None or self._curve_tokens != n_tokens:
            curve = self._curve(n_tokens)
            if self._quota_curve is None:
                self._quota_curve = curve
            else:
                self._quota_curve.copy_(curve)
            self._curve_tokens = n_tokens
        quotas = self._quota_curve.quotas(budget).to(self.density)
        self._rank_quotas = kept_in_place(self._rank_quotas, quotas)
        self._quotas_for = (n_tokens, budget)

    def _curve(self, n_tokens: int) -> QuotaCurve:
        """What the quotas of a batch of this many tokens sum to, by the law as it is."""
        n_features, max_quota = len(self.density), self.max_density * n_tokens
        alpha, beta = in_float64(self.quota_law)
        ranks = torch.arange(1, n_features + 1, device=alpha.device).double()
        return QuotaCurve.of(
            log_shape(ranks, alpha, beta),
            max_quota,
            min(self.min_tokens_per_feature, max_quota),
        )

    def _anchor_quota_law(self, floor: float) -> None:
        """
        Takes the law of the quotas from what Mutual Choice found, once and for all. It stays
        where too few features have fired.
        """
        law = FittedLaw.fit(self.density, floor)
        fitted = torch.stack([law.alpha, law.beta])
        known = law.known.to(self.quota_law.device)
        self.quota_law.copy_(fitted.to(self.quota_law).where(known, self.quota_law))
        self._curve_tokens = self._quotas_for = None
