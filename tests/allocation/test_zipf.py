"""The Zipf-Mandelbrot fit and the quotas, against textbook formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_alloc.allocation.zipf import BETA_GRID, ZipfLaw, zipf_quotas


def exact_densities(
    alpha: float, beta: float, scale: float, n_features: int
) -> torch.Tensor:
    ranks = torch.arange(1, n_features + 1, dtype=torch.float64)
    return scale * (ranks + beta) ** -alpha


def least_squares_line(x: list[float], y: list[float]) -> tuple[float, float]:
    """Slope and intercept by the textbook formula."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    squares = sum((a - mean_x) ** 2 for a in x)
    slope = products / squares
    return slope, mean_y - slope * mean_x


def r_squared(law: ZipfLaw, densities: list[float], first: int, last: int) -> float:
    """R^2 of log density over the ranks first ... last of sorted densities."""
    actual = [math.log(densities[rank - 1]) for rank in range(first, last + 1)]
    predicted = [
        math.log(law.scale) - law.alpha * math.log(rank + law.beta)
        for rank in range(first, last + 1)
    ]
    mean = sum(actual) / len(actual)
    residual = sum((a - p) ** 2 for a, p in zip(actual, predicted, strict=True))
    return 1 - residual / sum((a - mean) ** 2 for a in actual)


def test_beta_grid_is_the_documented_one():
    assert BETA_GRID == (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)


def test_zipf_law_density_by_hand():
    law = ZipfLaw(alpha=2.0, beta=1.0, scale=0.9)
    # 0.9 / 2^2, 0.9 / 3^2, 0.9 / 10^2
    density = law.density(torch.tensor([1, 2, 9]))
    assert density.tolist() == pytest.approx([0.225, 0.1, 0.009])
    assert density.dtype == torch.float32
    assert law.density(torch.tensor([[1.0], [2.0]])).shape == (2, 1)
    assert law.density(torch.tensor([1.0], dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("alpha", [0.6, 1.0, 2.5])
@pytest.mark.parametrize("beta", BETA_GRID)
def test_fit_recovers_an_exact_law_from_densities_in_any_order(
    alpha: float, beta: float
):
    torch.manual_seed(0)
    densities = exact_densities(alpha, beta, 0.3, 2000)[torch.randperm(2000)]
    law = ZipfLaw.fit(densities)
    assert law.beta == beta
    assert law.alpha == pytest.approx(alpha, rel=1e-6)
    assert law.scale == pytest.approx(0.3, rel=1e-6)
    assert law.r2 == pytest.approx(1.0, abs=1e-9)
    assert law.r2_middle == pytest.approx(1.0, abs=1e-9)


def test_fit_of_float32_densities():
    law = ZipfLaw.fit(exact_densities(1.2, 16, 0.5, 500).float())
    assert (law.beta, law.alpha) == (16, pytest.approx(1.2, rel=1e-4))
    assert law.scale == pytest.approx(0.5, rel=1e-3)


def test_fit_of_three_features_by_the_normal_equations():
    # All of the ranks 1, 2, 3 are used, with densities 0.4, 0.15, 0.1
    densities = [0.1, 0.4, 0.15]
    log_p = [math.log(p) for p in (0.4, 0.15, 0.1)]
    fits: list[tuple[float, float, float, float]] = []
    for beta in BETA_GRID:
        x = [math.log(rank + beta) for rank in (1, 2, 3)]
        slope, intercept = least_squares_line(x, log_p)
        error = sum(
            (y - intercept - slope * v) ** 2 for v, y in zip(x, log_p, strict=True)
        )
        fits.append((error, beta, -slope, intercept))
    _, beta, alpha, log_scale = min(fits)

    law = ZipfLaw.fit(torch.tensor(densities, dtype=torch.float64))
    assert law.beta == beta
    assert law.alpha == pytest.approx(alpha)
    assert law.scale == pytest.approx(math.exp(log_scale))
    # All three are in the middle: a tenth of 3 features is none
    expected = r_squared(law, [0.4, 0.15, 0.1], 1, 3)
    assert law.r2 == pytest.approx(expected)
    assert law.r2_middle == pytest.approx(expected)


def test_fit_weighs_log_spaced_ranks_alike():
    # Two straight pieces in log-log over 10000 ranks: exponent 0.5 up to rank 100, 2 beyond.
    # Log-spaced ranks lie half on each piece, of all ranks 99% lie on the steep one: the
    # best fits are beta 64, alpha 2.17 and beta 32, alpha 2.04.
    ranks = torch.arange(1, 10_001, dtype=torch.float64)
    densities = torch.where(ranks <= 100, 0.5 * ranks**-0.5, 0.05 * (ranks / 100) ** -2)
    spaced = sorted({round(10_000 ** (i / 79)) for i in range(80)})
    fits: list[tuple[float, float, float]] = []
    for beta in BETA_GRID:
        x = [math.log(rank + beta) for rank in spaced]
        y = [math.log(densities[rank - 1].item()) for rank in spaced]
        slope, intercept = least_squares_line(x, y)
        error = sum((v - intercept - slope * u) ** 2 for u, v in zip(x, y, strict=True))
        fits.append((error, beta, -slope))
    _, beta, alpha = min(fits)

    law = ZipfLaw.fit(densities)
    assert law.beta == beta == 64
    assert law.alpha == pytest.approx(alpha, rel=0.01)


@pytest.mark.parametrize("n_features", [10, 57, 300])
def test_fit_reports_r2_over_all_and_over_the_middle_ranks(n_features: int):
    torch.manual_seed(1)
    noisy = exact_densities(1.0, 4, 0.5, n_features) * torch.exp(
        0.3 * torch.randn(n_features, dtype=torch.float64)
    )
    law = ZipfLaw.fit(noisy)
    densities = sorted(noisy.tolist(), reverse=True)
    tenth = n_features // 10
    assert law.r2 == pytest.approx(r_squared(law, densities, 1, n_features))
    # the middle leaves out the first and the last tenth of the ranks
    assert law.r2_middle == pytest.approx(
        r_squared(law, densities, tenth + 1, n_features - tenth)
    )
    assert 0.5 < law.r2 < 0.9999
    assert law.r2 != law.r2_middle


def test_fit_ignores_features_at_or_below_the_floor():
    dense = exact_densities(1.0, 8, 0.5, 100)
    floor = 0.001
    assert dense.min() > floor
    noise = torch.tensor([0.0, 0.001, 0.0005, 1e-9], dtype=torch.float64)
    assert ZipfLaw.fit(torch.cat([noise, dense]), floor) == ZipfLaw.fit(dense, floor)
    # without a floor only densities of zero are left out
    assert ZipfLaw.fit(torch.cat([torch.zeros(7), dense])) == ZipfLaw.fit(dense)


@pytest.mark.parametrize(
    "densities",
    [[], [0.5, 0.2], [0.0, 0.0, 0.0, 0.0], [0.5, 0.2, 0.01, 0.01]],
)
def test_fit_needs_three_features_above_the_floor(densities: list[float]):
    with pytest.raises(ValueError, match="at least 3 features denser than 0.01"):
        ZipfLaw.fit(torch.tensor(densities, dtype=torch.float64), 0.01)


def test_fit_of_an_exponential_stays_on_the_grid_and_fits_it_badly():
    # exp(-r / 100) is a Zipf-Mandelbrot law with beta and alpha both going to infinity
    ranks = torch.arange(1, 2001, dtype=torch.float64)
    law = ZipfLaw.fit(torch.exp(-ranks / 100))
    assert law.beta == 256
    assert law.r2 < 0.9


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(1e-8, 1.0), min_size=3, max_size=60))
def test_fit_never_leaves_the_grid_nor_rises(densities: list[float]):
    law = ZipfLaw.fit(torch.tensor(densities, dtype=torch.float64))
    assert law.beta in BETA_GRID
    # densities are sorted from the densest on, so no law rises with the rank
    assert 0 <= law.alpha <= 100


# alpha = 179 with beta = 256 overflows `scale`, and density is inf * 0 = NaN.
def test_fit_of_a_few_steep_densities_can_be_evaluated():
    law = ZipfLaw.fit(torch.tensor([1.0, 1.0, 0.25]))
    density = law.density(torch.tensor([1.0, 2.0, 3.0]))
    # concave on log-log scales: the fit is poor, but a law of about these sizes
    assert density.tolist() == pytest.approx([1.0, 1.0, 0.25], rel=1.0)


# for the last of the features the law underflows to 0, by which the quotas divide.
@pytest.mark.parametrize("features_per_e_fold", [2, 3, 5])
def test_quotas_of_a_law_fitted_to_few_steep_densities(features_per_e_fold: int):
    # as early in training, where few features take most of the budget
    n_features, n_tokens, budget = 4096, 2048, 32 * 2048
    ranks = torch.arange(1, n_features + 1, dtype=torch.float64)
    densities = 0.6 * torch.exp(-ranks / features_per_e_fold)
    law = ZipfLaw.fit(densities, min_density=1 / (100 * n_tokens))
    # the law that sets quotas has a scale of 1, see AllocationState
    quotas = zipf_quotas(
        ZipfLaw(law.alpha, law.beta, 1.0), n_features, budget, 0.6 * n_tokens
    )
    assert quotas.sum().item() == pytest.approx(budget)
    assert (quotas.diff() <= 0).all()


# the variance of equal logarithms is a rounding error rather than 0, which gives R^2 = 1.
@pytest.mark.parametrize("n_features", [3, 7, 11, 50])
def test_fit_of_equal_densities_explains_no_variance(n_features: int):
    law = ZipfLaw.fit(torch.full((n_features,), 0.1))
    assert law.alpha >= 0
    assert law.alpha == pytest.approx(0.0, abs=1e-9)
    # there is no variance to explain: R^2 is undefined, and not 1
    assert math.isnan(law.r2)
    assert math.isnan(law.r2_middle)


def test_zipf_quotas_by_hand():
    # f = 1, 1/2, 1/3, 1/4 (sum 25/12), budget 25: 12, 6, 4, 3
    quotas = zipf_quotas(ZipfLaw(1.0, 0.0, 7.0), 4, budget=25, max_quota=100)
    assert quotas.dtype == torch.float64
    assert quotas.tolist() == pytest.approx([12, 6, 4, 3])
    # max_quota 8 cuts the first; the other 17 go as 1/2 : 1/3 : 1/4, that is as 6 : 4 : 3,
    # which gives 102/13 = 7.85, 68/13, 51/13
    quotas = zipf_quotas(ZipfLaw(1.0, 0.0, 7.0), 4, budget=25, max_quota=8)
    assert quotas.tolist() == pytest.approx([8, 102 / 13, 68 / 13, 51 / 13])
    # max_quota 7 cuts the second as well (18 * 6/13 > 7): the other 11 go as 4 : 3
    quotas = zipf_quotas(ZipfLaw(1.0, 0.0, 7.0), 4, budget=25, max_quota=7)
    assert quotas.tolist() == pytest.approx([7, 7, 44 / 7, 33 / 7])
    # min_quota 5 lifts the last (3) and the third (20 * 4/22 < 5): 15 go as 2 : 1
    quotas = zipf_quotas(ZipfLaw(1.0, 0.0, 7.0), 4, 25, max_quota=100, min_quota=5)
    assert quotas.tolist() == pytest.approx([10, 5, 5, 5])


def test_zipf_quotas_where_every_feature_gets_the_largest():
    law = ZipfLaw(1.0, 0.0, 1.0)
    assert zipf_quotas(law, 3, budget=30, max_quota=10).tolist() == [10, 10, 10]
    # even 10 for each of the three does not use up a budget of 31
    assert zipf_quotas(law, 3, budget=31, max_quota=10).tolist() == [10, 10, 10]


# numpy warns of log(0).
@pytest.mark.filterwarnings("error")
def test_zipf_quotas_of_no_budget_are_zero():
    quotas = zipf_quotas(ZipfLaw(1.0, 0.0, 1.0), 3, budget=0, max_quota=10)
    assert quotas.tolist() == [0, 0, 0]


def test_zipf_quotas_refuse_a_smallest_quota_above_the_budget():
    law = ZipfLaw(1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="needs 40 pairs per batch.*budget of 39"):
        zipf_quotas(law, 20, budget=39, max_quota=10, min_quota=2)
    # exactly the budget is possible in one way
    quotas = zipf_quotas(law, 20, budget=40, max_quota=10, min_quota=2)
    assert quotas.tolist() == pytest.approx([2.0] * 20)


@settings(deadline=None, max_examples=60)
@given(
    alpha=st.floats(0.1, 4.0),
    beta=st.sampled_from(BETA_GRID),
    scale=st.floats(1e-6, 1e6),
    n_features=st.integers(2, 3000),
    n_tokens=st.integers(4, 4096),
    budget_share=st.floats(1e-4, 1.2),
    min_share=st.sampled_from([0.0, 0.0, 0.1, 0.9]),
)
def test_zipf_quotas_follow_the_law_between_the_clamps(
    alpha: float,
    beta: float,
    scale: float,
    n_features: int,
    n_tokens: int,
    budget_share: float,
    min_share: float,
):
    max_quota = 0.6 * n_tokens
    budget = budget_share * n_features * max_quota
    min_quota = min_share * min(budget / n_features, max_quota)
    law = ZipfLaw(alpha, beta, scale)
    quotas = zipf_quotas(law, n_features, budget, max_quota, min_quota).tolist()

    assert sum(quotas) == pytest.approx(min(budget, n_features * max_quota))
    assert all(min_quota <= quota <= max_quota for quota in quotas)
    assert all(a >= b for a, b in zip(quotas[:-1], quotas[1:], strict=True))
    ratios = [
        quota * (rank + beta) ** alpha
        for rank, quota in enumerate(quotas, start=1)
        if min_quota < quota < max_quota
    ]
    if ratios:
        assert max(ratios) == pytest.approx(min(ratios), rel=1e-6)
