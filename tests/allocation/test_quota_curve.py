"""Quotas read off a curve, against a bisection of their common factor in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_alloc.allocation.quota_curve import QuotaCurve
from sae_lens_alloc.allocation.zipf import log_shape

# alpha and beta of ordinary laws, and of those that underflow
LAWS = st.tuples(
    st.one_of(st.sampled_from([0.0, 1.0, 100.0]), st.floats(0, 100)),
    st.sampled_from([0.0, 1.0, 16.0, 256.0]),
)


def bisected(
    log_weights: torch.Tensor,
    budget: float,
    max_quota: float | torch.Tensor,
    min_quota: float,
) -> torch.Tensor:
    """By brute force: 200 halvings of an interval of the factor's logarithm."""
    caps = torch.as_tensor(max_quota, dtype=torch.float64).expand_as(log_weights)
    if budget == 0:
        return torch.zeros_like(log_weights)
    if caps.sum() <= budget:
        return caps

    def quotas(log_factor: float) -> torch.Tensor:
        return (log_weights + log_factor).exp().clamp(min=min_quota).minimum(caps)

    low = math.log(budget / len(log_weights)) - float(log_weights.max()) - 1
    high = math.log(budget) - float(log_weights.min()) + 1
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if quotas(middle).sum() < budget else (low, middle)
    return quotas(high)


def assert_is_bisected(
    found: torch.Tensor,
    log_weights: torch.Tensor,
    budget: float,
    max_quota: float | torch.Tensor,
    min_quota: float,
):
    expected = bisected(log_weights, budget, max_quota, min_quota)
    # weights of e^500 and more are known to that many units of their rounding
    torch.testing.assert_close(
        found, expected, rtol=1e-9, atol=1e-12 * max(budget, 1.0)
    )
    caps = torch.as_tensor(max_quota, dtype=torch.float64).expand_as(log_weights)
    total = min(budget, caps.sum().item())
    assert found.sum().item() == pytest.approx(total, rel=1e-10)
    assert (found >= min_quota).all()
    assert (found <= caps).all()


@settings(deadline=None, max_examples=300)
@given(
    law=LAWS,
    n_features=st.integers(1, 2000),
    max_quota=st.floats(0.01, 5000),
    min_share=st.sampled_from([0.0, 0.0, 1e-6, 0.1, 0.9, 1.0]),
    budget_share=st.one_of(
        st.sampled_from([0.0, 1e-9, 0.5, 1.0, 1.5]), st.floats(1e-9, 1.2)
    ),
)
def test_the_quotas_of_a_law_are_those_of_a_bisection(
    law: tuple[float, float],
    n_features: int,
    max_quota: float,
    min_share: float,
    budget_share: float,
):
    ranks = torch.arange(1, n_features + 1, dtype=torch.float64)
    log_weights = log_shape(ranks, *law)
    budget = budget_share * n_features * max_quota
    min_quota = min_share * min(budget / n_features, max_quota)
    found = QuotaCurve.of(log_weights, max_quota, min_quota).quotas(budget)
    assert_is_bisected(found, log_weights, budget, max_quota, min_quota)


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 10_000),
    n_features=st.integers(1, 300),
    spread=st.sampled_from([0.0, 1.0, 20.0, 300.0]),
    none_capped_at_zero=st.booleans(),
    budget_share=st.one_of(
        st.sampled_from([0.0, 1e-6, 1.0, 1.1]), st.floats(1e-9, 1.2)
    ),
)
def test_the_quotas_of_any_weights_and_caps_are_those_of_a_bisection(
    seed: int,
    n_features: int,
    spread: float,
    none_capped_at_zero: bool,
    budget_share: float,
):
    generator = torch.Generator().manual_seed(seed)
    log_weights = spread * torch.randn(
        n_features, generator=generator, dtype=torch.float64
    )
    # whole numbers of tokens, as recalibration has them, some of them 0
    caps = torch.randint(
        int(none_capped_at_zero), 50, (n_features,), generator=generator
    )
    budget = budget_share * float(caps.sum())
    found = QuotaCurve.of(log_weights, caps).quotas(budget)
    assert_is_bisected(found, log_weights, budget, caps, 0.0)


def test_one_curve_serves_every_budget():
    log_weights = log_shape(torch.arange(1, 201, dtype=torch.float64), 1.3, 4.0)
    curve = QuotaCurve.of(log_weights, 30.0, 0.5)
    for budget in (100, 101, 999, 3000, 5999, 6000, 7000):
        assert_is_bisected(curve.quotas(budget), log_weights, budget, 30.0, 0.5)


def test_another_curve_is_taken_in_place():
    ranks = torch.arange(1, 51, dtype=torch.float64)
    curve = QuotaCurve.of(log_shape(ranks, 1.0, 0.0), 20.0, 0.1)
    address = curve.cap_sums.data_ptr()
    other = QuotaCurve.of(log_shape(ranks, 2.0, 8.0), 35.0, 0.0)
    curve.copy_(other)
    assert curve.cap_sums.data_ptr() == address
    assert torch.equal(curve.quotas(123), other.quotas(123))
