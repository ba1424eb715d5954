"""Quotas in proportion to weights for any budget, without a search."""

from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class QuotaCurve:
    """
    The sum of clamped quotas as a function of their common factor c:
    S(c) = sum over features of clip(c * w, min_quota, cap).

    S is piecewise linear. It bends where a feature leaves the smallest quota or reaches its
    cap, and its value at these points is stored. So a budget is looked up between two of
    them, and its factor follows from one division. Weights and factors are logarithms,
    because those of steep laws would overflow. All tensors are float64. The host waits for
    none of them.

    Args:
        log_weights: Logarithms of the weights w, shape (F,).
        caps: Largest quotas, shape () or (F,).
        smallest: Smallest quota min_quota, shape ().
        cap_points: Ascending log c at which the features reach their caps, shape (F,).
        cap_sums: S there, shape (F,).
        sums_of_caps: Sum of the first n caps in that order, for n = 0 ... F, shape (F + 1,).
        below_caps: Logarithm of the sum of all weights but the first n in that order, shape
            (F + 1,).
        floor_points: Ascending log c at which the features leave the smallest quota, the
            largest weight first, and then infinity, shape (F + 1,).
        floor_sums: S there, shape (F,).
        at_floor: Logarithm of the sum of all weights but the first n in that order, shape
            (F + 1,).
    """

    log_weights: torch.Tensor
    caps: torch.Tensor
    smallest: torch.Tensor
    cap_points: torch.Tensor
    cap_sums: torch.Tensor
    sums_of_caps: torch.Tensor
    below_caps: torch.Tensor
    floor_points: torch.Tensor
    floor_sums: torch.Tensor
    at_floor: torch.Tensor

    @classmethod
    def of(
        cls,
        log_weights: torch.Tensor,
        max_quota: float | torch.Tensor,
        min_quota: float = 0.0,
    ) -> "QuotaCurve":
        """
        The curve of some weights: two sorts and a fixed number of other steps.

        Args:
            log_weights: Logarithms of the weights, finite, float64 of shape (F,), F >= 1.
            max_quota: Largest quota: one number, or one for each feature, shape (F,).
            min_quota: Smallest quota, at most the smallest of `max_quota`.
        """
        n_features = len(log_weights)
        if isinstance(max_quota, torch.Tensor):
            caps = max_quota.to(log_weights)
        else:
            caps = log_weights.new_full((), max_quota)
        smallest = log_weights.new_full((), min_quota)
        cap_points, by_cap = (caps.log() - log_weights).sort(stable=True)
        by_weight = log_weights.argsort(descending=True, stable=True)
        below_caps = _logs_of_rests(log_weights[by_cap])
        at_floor = _logs_of_rests(log_weights[by_weight])
        floor_points = smallest.log() - log_weights[by_weight]
        numbers = torch.arange(n_features + 1, device=log_weights.device)
        if caps.ndim == 0:
            sums_of_caps = numbers * caps
        else:
            sums_of_caps = torch.cat([caps.new_zeros(1), caps[by_cap].cumsum(0)])

        def sums(
            points: torch.Tensor, n_capped: torch.Tensor, n_above: torch.Tensor
        ) -> torch.Tensor:
            between = (points + below_caps[n_capped]).exp()
            between = between - (points + at_floor[n_above]).exp()
            floors = (n_features - n_above) * smallest
            return sums_of_caps[n_capped] + floors + between.clamp(min=0)

        return cls(
            log_weights,
            caps,
            smallest,
            cap_points,
            sums(
                cap_points, numbers[1:], torch.searchsorted(floor_points, cap_points)
            ).minimum(sums_of_caps[-1:]),
            sums_of_caps,
            below_caps,
            torch.cat([floor_points, floor_points.new_full((1,), torch.inf)]),
            sums(
                floor_points,
                torch.searchsorted(cap_points, floor_points, right=True),
                numbers[:-1],
            ),
            at_floor,
        )

    def quotas(self, budget: float) -> torch.Tensor:
        """
        Quotas that sum to a budget. The sum is smaller only if even the caps sum to less. This
        takes about 30 launches: four go over all features, the others over one number.

        Args:
            budget: Tokens to give out, at least what the smallest quotas sum to.

        Returns:
            float64 tensor of shape (F,).
        """
        total = torch.full_like(self.smallest, budget)
        n_capped = torch.searchsorted(self.cap_sums, total, right=True)
        n_above = torch.searchsorted(self.floor_sums, total)
        # `take`, since indexing by a scalar tensor would wait for the device
        floors = (len(self.log_weights) - n_above) * self.smallest
        between = total - self.sums_of_caps.take(n_capped) - floors
        below_caps = self.below_caps.take(n_capped)
        share = -(self.at_floor.take(n_above) - below_caps).exp()
        log_factor = between.clamp(min=0).log() - (below_caps + share.log1p())
        # rounding must not move the factor before the last point
        last_point = self.cap_points.take((n_capped - 1).clamp(min=0))
        log_factor = log_factor.maximum(last_point.where(n_capped > 0, -torch.inf))
        # if no feature is between its smallest and its largest quota
        log_factor = torch.where(
            n_capped < n_above, log_factor, self.floor_points.take(n_above)
        )
        shares = (self.log_weights + log_factor).exp()
        return shares.maximum(self.smallest).minimum(self.caps)

    def copy_(self, other: "QuotaCurve") -> None:
        """Copies a curve of the same number of features into this one, in place."""
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name))


def _logs_of_rests(log_weights: torch.Tensor) -> torch.Tensor:
    """Logarithm of the sum of all weights but the first n, for n = 0 ... F; shape (F + 1,)."""
    rests = log_weights.flip(0).logcumsumexp(0).flip(0)
    return torch.cat([rests, rests.new_full((1,), -torch.inf)])
