"""What the training of an allocating SAE keeps beside the weights."""

from typing import ClassVar

import torch

from sae_lens_alloc.allocation.settling import MAX_WINDOWS
from sae_lens_alloc.allocation.sparse_activations import Pairs
from sae_lens_alloc.allocation.thresholds import follow_cut, track_threshold
from sae_lens_alloc.allocation.zipf import NATURAL_LAW
from sae_lens_alloc.saes.density_statistics import DensityStatistics
from sae_lens_alloc.saes.running_statistics import StepTotals

# Under Mutual Choice the threshold of a feature is the cut, or lower such that it fires at least
# at this share of the mean density: on 1 token in 5,000 with k = 16 and 3,072 features.
MIN_DENSITY_SHARE = 0.04
# No threshold is a smaller share of the cut.
LOWEST_THRESHOLD = 0.01

# What a number is before it is known: neither a step, nor a loss, nor the index of anything.
UNKNOWN = -1.0


class AllocationStatistics(DensityStatistics):
    """
    Thresholds, cut, densities, and what the quotas and the schedule go by: everything that a
    checkpoint needs besides the weights. The densities are those of the demand: the rate at
    which an affinity exceeds the cut.

    Args:
        d_sae: Number of features F.
        density_window_tokens: Averaging window of the densities in tokens.
        device: Device of the buffers.
    """

    tracked: ClassVar[tuple[str, ...]] = (
        *DensityStatistics.tracked,
        "threshold",
        "cut",
    )
    by_feature: ClassVar[tuple[str, ...]] = (
        *DensityStatistics.by_feature,
        "threshold",
        "quota_carry",
    )
    added_later: ClassVar[tuple[str, ...]] = (
        "window_losses",
        "open_window",
        "settled",
        "backend",
    )

    threshold: torch.Tensor  # (F,) inference threshold of each feature
    cut: torch.Tensor  # () running cut of Mutual Choice, 0 before the first batch
    quota_carry: torch.Tensor  # (F,) remainders of the fractional quotas
    quota_law: torch.Tensor  # (2,) alpha and beta of the law that sets the quotas
    window_losses: torch.Tensor  # (MAX_WINDOWS,) mean losses, UNKNOWN for those to come
    open_window: torch.Tensor  # (2,) sum and number of the losses of the running window
    settled: torch.Tensor  # () first step of Mutual Choice, UNKNOWN until it is decided
    backend: torch.Tensor  # () index of the backend that was found fastest, or UNKNOWN

    def __init__(
        self, d_sae: int, density_window_tokens: int, device: torch.device
    ) -> None:
        super().__init__(d_sae, density_window_tokens, device)
        for name, values in {
            "threshold": torch.zeros(d_sae, device=device),
            "cut": torch.zeros((), device=device),
            # random, or all rare features would be paid out in the same batch
            "quota_carry": torch.rand(d_sae, device=device),
            "quota_law": torch.tensor([NATURAL_LAW.alpha, NATURAL_LAW.beta]),
            "window_losses": torch.full((MAX_WINDOWS,), UNKNOWN),
            "open_window": torch.zeros(2),
            "settled": torch.full((), UNKNOWN),
            "backend": torch.full((), UNKNOWN),
        }.items():
            self.register_buffer(name, values.to(device))

    def follow_cut(self, pairs: Pairs, n_tokens: int) -> None:
        """
        Moves the running cut towards that of the step: the smallest selected affinity, of
        several calls their mean over tokens.

        Args:
            pairs: The pairs that Mutual Choice selects.
            n_tokens: Tokens in the call.
        """
        self.follow("cut", self.totals, pairs, n_tokens)

    def follow(
        self, name: str, totals: StepTotals, pairs: Pairs, n_tokens: int
    ) -> None:
        """`follow_cut` of a cut by its name, whose step began in `totals`."""
        if len(pairs.places.values) == 0 and self.shard.is_whole:
            return
        smallest = self.shard.ranks.smallest(pairs.smallest_value().float())
        n_seen = totals.add("n_cut_tokens", n_tokens)
        total = totals.add("cuts", smallest * n_tokens)
        if n_seen > n_tokens:
            smallest = total / n_seen
        start, cut = totals.start[name], self.get_buffer(name)
        # a first cut is taken as it is
        followed = torch.where(start > 0, follow_cut(start, smallest), smallest)
        # infinite where all the pairs are padding
        cut.copy_(torch.where(smallest.isinf(), cut, followed))

    def relative_thresholds(self) -> torch.Tensor:
        """Thresholds relative to the cut, at most 1, shape (F,)."""
        lowered = (self.threshold / self.cut).nan_to_num(1.0)
        return lowered.clamp(LOWEST_THRESHOLD, 1.0)

    def lower_thresholds(
        self, lowered: torch.Tensor, above: torch.Tensor, budget: int
    ) -> torch.Tensor:
        """
        Moves relative thresholds such that every feature fires at least now and then.

        Args:
            lowered: Thresholds relative to the cut as the step began, shape (F,).
            above: Tokens of the call on which each feature exceeded its threshold, shape (F,).
            budget: Number of pairs M.

        Returns:
            The thresholds relative to the cut, shape (F,).
        """
        at_least = MIN_DENSITY_SHARE * budget / self.shard.n_features
        return track_threshold(
            lowered,
            self.totals.add("above", above),
            self.totals.add("at_least", at_least),
        ).clamp(max=1.0)

    def restart_thresholds(self) -> None:
        """
        Puts to the cut what is never tracked from: 0, or infinity, as a source's silenced
        features have. A factor would not leave them.
        """
        restart = ~(self.threshold > 0) | self.threshold.isinf()
        self.threshold.copy_(self.cut.where(restart, self.threshold))

    def track_quotas(
        self,
        above: torch.Tensor,
        quotas: torch.Tensor,
        demand: torch.Tensor,
        budget: int,
    ) -> None:
        """
        Moves the thresholds towards those that let as many tokens through as the quotas, and
        the cut towards the one that the demand for the budget exceeds.

        Args:
            above: Tokens of the call on which each feature exceeded its threshold, shape (F,).
            quotas: Fractional quotas, shape (F,).
            demand: Tokens of the call on which each feature exceeded the cut, shape (F,).
            budget: Number of pairs M.
        """
        totals = self.totals
        self.threshold.copy_(
            track_threshold(
                totals.start["threshold"],
                totals.add("above", above),
                totals.add("quotas", quotas),
            )
        )
        self.cut.copy_(
            track_threshold(
                totals.start["cut"],
                totals.add("demand", self.shard.ranks.sum(demand.sum())),
                totals.add("budget", budget),
            )
        )
