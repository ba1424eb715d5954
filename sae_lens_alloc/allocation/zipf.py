"""The Zipf-Mandelbrot law of feature densities, and the quotas that follow from it."""

import math
from dataclasses import dataclass

import numpy as np
import torch

# A free beta runs to beta >> F, an exponential in disguise, so it is searched on a grid.
BETA_GRID = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
N_FIT_RANKS = 80
# Steeper laws, as a handful of features gives them, overflow.
MAX_ALPHA = 100.0


@dataclass(frozen=True)
class ZipfLaw:
    """
    Zipf-Mandelbrot law of densities over ranks: f(r) = scale * (r + beta) ** -alpha.

    Args:
        alpha: Exponent, from 0 to 100.
        beta: Flattening of the head, in ranks.
        scale: Factor in front.
        r2: R^2 of log density over all fitted ranks; NaN for a law that was not fitted.
        r2_middle: The same over the middle 10% to 90% of the fitted ranks.
    """

    alpha: float
    beta: float
    scale: float
    r2: float = float("nan")
    r2_middle: float = float("nan")

    def density(self, ranks: torch.Tensor) -> torch.Tensor:
        """Density at `ranks` (any shape, rank 1 is the most frequent feature)."""
        # on logarithms, since scale and power may be out of range where their product is not
        log_density = self.log_shape(ranks.double()) + math.log(self.scale)
        return log_density.exp().to(torch.promote_types(ranks.dtype, torch.float32))

    def log_shape(self, ranks: torch.Tensor) -> torch.Tensor:
        """log f(ranks) for a scale of 1."""
        return -self.alpha * (ranks + self.beta).log()

    @classmethod
    def fit(cls, densities: torch.Tensor, min_density: float = 0.0) -> "ZipfLaw":
        """
        Fits log density by least squares over about 80 log-spaced ranks of the features
        denser than `min_density`, with beta on the grid 0, 1, 2, 4, ..., 256.

        Args:
            densities: Firing rates per token in any order, shape (F,).
            min_density: Features at or below it are left out, since a rate that was
                measured from a handful of events is noise.

        Raises:
            ValueError: if fewer than 3 features are denser than `min_density`.
        """
        dense = densities[densities > min_density].detach().cpu().double().numpy()
        if len(dense) < 3:
            raise ValueError(
                f"a Zipf law needs at least 3 features denser than {min_density:.2g}, "
                f"got {len(dense)}."
            )
        log_p = np.log(np.sort(dense)[::-1])
        ranks = np.arange(1, len(dense) + 1, dtype=np.float64)
        sampled = np.unique(
            np.geomspace(1, len(dense), num=min(N_FIT_RANKS, len(dense))).round()
        ).astype(np.int64)
        fits = [
            (beta, *_fit_line(np.log(sampled + beta), log_p[sampled - 1]))
            for beta in BETA_GRID
        ]
        beta, slope, intercept, _ = min(fits, key=lambda fit: fit[3])
        predicted = intercept + slope * np.log(ranks + beta)
        tenth = len(dense) // 10
        middle = slice(tenth, len(dense) - tenth)
        return cls(
            alpha=-slope,
            beta=beta,
            scale=float(np.exp(intercept)),
            r2=_r2(log_p, predicted),
            r2_middle=_r2(log_p[middle], predicted[middle]),
        )


def _fit_line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Slope, intercept and sum of squared residuals of the least-squares line."""
    deviation = x - x.mean()
    slope = float(deviation @ y / (deviation @ deviation))
    slope = min(max(slope, -MAX_ALPHA), 0.0)
    intercept = float(y.mean() - slope * x.mean())
    return slope, intercept, float(np.sum((y - intercept - slope * x) ** 2))


def _r2(actual: np.ndarray, predicted: np.ndarray) -> float:
    if np.ptp(actual) < 1e-12:
        return float("nan")
    variance = np.sum((actual - actual.mean()) ** 2)
    return float(1 - np.sum((actual - predicted) ** 2) / variance)


def zipf_quotas(
    law: ZipfLaw,
    n_features: int,
    budget: float,
    max_quota: float,
    min_quota: float = 0.0,
) -> torch.Tensor:
    """
    Quotas m_r of the features ranked r = 1 ... F: proportional to the law, clamped to
    [min_quota, max_quota], and renormalised so that they sum to the budget. The sum is
    smaller only where even max_quota for every feature does not use the budget up.

    Args:
        law: The law whose shape the quotas follow; its scale does not matter.
        n_features: Number of features F.
        budget: Tokens to give out per batch, M.
        max_quota: Largest quota, in tokens per batch.
        min_quota: Smallest quota, in tokens per batch.

    Returns:
        float64 tensor of shape (F,), from the first rank to the last.

    Raises:
        ValueError: if min_quota for every feature exceeds the budget.
    """
    if min_quota * n_features > budget:
        raise ValueError(
            f"min_tokens_per_feature = {min_quota} for {n_features} features needs "
            f"{min_quota * n_features:.0f} pairs per batch, more than the budget of "
            f"{budget:.0f}: lower it, or raise k or the batch size."
        )
    log_shape = law.log_shape(torch.arange(1, n_features + 1, dtype=torch.float64))
    return proportional_quotas(log_shape, budget, max_quota, min_quota)


def proportional_quotas(
    log_weights: torch.Tensor,
    budget: float,
    max_quota: float | torch.Tensor,
    min_quota: float = 0.0,
) -> torch.Tensor:
    """
    Quotas in proportion to weights, clamped to [min_quota, max_quota], and renormalised so
    that they sum to the budget. The sum is smaller only where even max_quota for every
    feature does not use the budget up.

    Args:
        log_weights: Logarithms of the weights, finite, float64 of shape (F,).
        budget: Tokens to give out, M.
        max_quota: Largest quota, in tokens; one number, or one for each feature, shape (F,).
        min_quota: Smallest quota, in tokens.

    Returns:
        float64 tensor of shape (F,).
    """
    caps = torch.as_tensor(
        max_quota, dtype=log_weights.dtype, device=log_weights.device
    ).expand_as(log_weights)
    if budget == 0:
        return torch.zeros_like(log_weights)
    if caps.sum() <= budget:
        return caps.clone()

    def quotas(log_factor: float) -> torch.Tensor:
        return (log_weights + log_factor).exp().clamp(min=min_quota).minimum(caps)

    # The clamped sum grows with the factor, so bisection on its logarithm finds it.
    low = math.log(budget / len(log_weights)) - float(log_weights.max()) - 1
    high = math.log(budget) - float(log_weights.min()) + 1
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if quotas(middle).sum() < budget else (low, middle)
    return quotas(high)
