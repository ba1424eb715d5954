"""The Zipf-Mandelbrot law of feature densities, and the quotas that follow from it."""

import math
from dataclasses import dataclass

import torch

from sae_lens_alloc.allocation.quota_curve import QuotaCurve

# A free beta can grow far beyond F, where the law is nearly an exponential. So it is taken from a grid.
BETA_GRID = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
N_FIT_RANKS = 80
# Steeper laws, which a fit to very few features can give, overflow.
MAX_ALPHA = 100.0
MIN_FEATURES = 3


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
        # as logarithms, since scale and power may be out of range where their product is not
        log_density = self.log_shape(ranks.double()) + math.log(self.scale)
        return log_density.exp().to(torch.promote_types(ranks.dtype, torch.float32))

    def log_shape(self, ranks: torch.Tensor) -> torch.Tensor:
        """log f(ranks) for a scale of 1."""
        return log_shape(ranks, self.alpha, self.beta)

    @classmethod
    def fit(cls, densities: torch.Tensor, min_density: float = 0.0) -> "ZipfLaw":
        """
        Fits log density by least squares over about 80 log-spaced ranks of the features
        denser than `min_density`, with beta on the grid 0, 1, 2, 4, ..., 256.

        Args:
            densities: Firing rates per token in any order, shape (F,).
            min_density: Features at or below it are left out, since a rate measured from very
                few events is noise.

        Raises:
            ValueError: if fewer than 3 features are denser than `min_density`.
        """
        dense = densities[densities > min_density].detach().cpu()
        if len(dense) < MIN_FEATURES:
            raise ValueError(
                f"a Zipf law needs at least {MIN_FEATURES} features denser than "
                f"{min_density:.2g}, got {len(dense)}."
            )
        fitted = FittedLaw.fit(dense, min_density)
        ranks = torch.arange(1, len(dense) + 1, dtype=torch.float64)
        predicted = fitted.log_density(ranks)
        log_p = dense.double().sort(descending=True).values.log()
        tenth = len(dense) // 10
        middle = slice(tenth, len(dense) - tenth)
        return cls(
            alpha=float(fitted.alpha),
            beta=float(fitted.beta),
            scale=float(fitted.log_scale.exp()),
            r2=_r2(log_p, predicted),
            r2_middle=_r2(log_p[middle], predicted[middle]),
        )


# Law of the quotas if training starts with Feature Choice. Mutual Choice by itself finds densities that
# are flat for about 16 ranks and then fall with an exponent of about 1.
NATURAL_LAW = ZipfLaw(alpha=1.0, beta=16.0, scale=1.0)


@dataclass(frozen=True)
class FittedLaw:
    """
    A law whose numbers are tensors, so that the host need not wait for them.

    Args:
        alpha: float64 of shape ().
        beta: float64 of shape ().
        log_scale: Logarithm of the factor in front, float64 of shape ().
        known: Boolean of shape (), false if too few features were dense enough for a fit. The
            other numbers then mean nothing.
    """

    alpha: torch.Tensor
    beta: torch.Tensor
    log_scale: torch.Tensor
    known: torch.Tensor

    @classmethod
    def fit(cls, densities: torch.Tensor, min_density: float) -> "FittedLaw":
        """`ZipfLaw.fit` in a fixed number of steps of fixed size, without its R^2."""
        log_p = in_float64(densities).sort(descending=True).values.log()
        n_dense = (densities > min_density).sum().to(log_p.device)
        ranks, weights = _sampled_ranks(n_dense)
        # a rank of weight 0 may have log density -inf
        y = log_p[(ranks.long() - 1).clamp(0, len(log_p) - 1)].where(weights > 0, 0.0)
        betas = _numbers(BETA_GRID, y)
        x = (ranks + betas[:, None]).log()
        weights = weights / weights.sum()
        deviations = x - (x * weights).sum(1, keepdim=True)
        variances = (weights * deviations.square()).sum(1)
        slopes = (weights * deviations * y).sum(1) / variances
        slopes = slopes.clamp(-MAX_ALPHA, 0.0)
        mean = (weights * y).sum()
        residuals = y - mean - slopes[:, None] * deviations
        best = (weights * residuals.square()).sum(1).argmin()
        # `take`, since indexing by a scalar tensor would wait for the device
        slope = slopes.take(best)
        mean_x = (x * weights).sum(1).take(best)
        return cls(
            -slope, betas.take(best), mean - slope * mean_x, n_dense >= MIN_FEATURES
        )

    def density(self, ranks: torch.Tensor) -> torch.Tensor:
        """As `ZipfLaw.density`, and 0 if the law is not known."""
        density = self.log_density(in_float64(ranks)).exp().where(self.known, 0.0)
        return density.to(ranks.device, torch.promote_types(ranks.dtype, torch.float32))

    def log_density(self, ranks: torch.Tensor) -> torch.Tensor:
        """Logarithm of the density at ranks, float64 of any shape."""
        return self.log_scale + log_shape(ranks, self.alpha, self.beta)


def log_shape(
    ranks: torch.Tensor, alpha: float | torch.Tensor, beta: float | torch.Tensor
) -> torch.Tensor:
    """Logarithm of (rank + beta) ** -alpha at ranks of any shape."""
    return -alpha * (ranks + beta).log()


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as float64, on its device or, if that has no float64, on the CPU."""
    if tensor.device.type == "mps":
        tensor = tensor.cpu()
    return tensor.double()


def _sampled_ranks(n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    About 80 log-spaced ranks from 1 to n, and weights that are 0 for repeated ranks. Both are
    float64 of shape (80,). n has shape ().
    """
    n = n.double().clamp(min=2)
    number = torch.arange(N_FIT_RANKS, dtype=torch.float64, device=n.device)
    share = number / (n.clamp(max=N_FIT_RANKS) - 1)
    ranks = (share.clamp(max=1) * n.log()).exp().round()
    is_new = ranks.diff(prepend=torch.zeros_like(ranks[:1])) > 0
    return ranks, is_new.double()


def _numbers(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
    """Numbers as a tensor on the device of another, without a copy that the host would wait for."""
    return torch.stack([torch.full_like(like[0], value) for value in values])


def _r2(actual: torch.Tensor, predicted: torch.Tensor) -> float:
    if float(actual.max() - actual.min()) < 1e-12:
        return float("nan")
    variance = (actual - actual.mean()).square().sum()
    return float(1 - (actual - predicted).square().sum() / variance)


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
    smaller only if even max_quota for every feature sums to less.

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
    require_smallest_quota(min_quota, n_features, budget)
    log_shape = law.log_shape(torch.arange(1, n_features + 1, dtype=torch.float64))
    curve = QuotaCurve.of(log_shape, max_quota, min(min_quota, max_quota))
    return curve.quotas(budget)


def require_smallest_quota(min_quota: float, n_features: int, budget: float) -> None:
    """Raises ValueError if `min_quota` for every feature exceeds the budget."""
    if min_quota * n_features > budget:
        raise ValueError(
            f"min_tokens_per_feature = {min_quota} for {n_features} features needs "
            f"{min_quota * n_features:.0f} pairs per batch, more than the budget of "
            f"{budget:.0f}: lower it, or raise k or the batch size."
        )
