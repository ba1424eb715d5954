"""The fit on the device against the same fit in numpy, rank by rank and beta by beta."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sae_lens_alloc.allocation.density import underused_features
from sae_lens_alloc.allocation.zipf import BETA_GRID, FittedLaw, ZipfLaw


def fits_by_numpy(densities: torch.Tensor, floor: float) -> list[tuple[float, ...]]:
    """Squared error, alpha, beta and intercept of each beta of the grid, the best first."""
    dense = densities[densities > floor].double().numpy()
    log_p = np.log(np.sort(dense)[::-1])
    ranks = np.geomspace(1, len(dense), num=min(80, len(dense))).round()
    ranks = np.unique(ranks).astype(np.int64)
    y = log_p[ranks - 1]
    fits = []
    for beta in BETA_GRID:
        x = np.log(ranks + beta)
        deviation = x - x.mean()
        slope = float(deviation @ y / (deviation @ deviation))
        slope = min(max(slope, -100.0), 0.0)
        intercept = float(y.mean() - slope * x.mean())
        error = float(np.sum((y - intercept - slope * x) ** 2))
        fits.append((error, -slope, beta, intercept))
    return sorted(fits)


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 10_000),
    # fewer than, about and more than the 80 ranks that are looked at
    n_features=st.one_of(st.integers(3, 90), st.integers(91, 20_000)),
    alpha=st.floats(0.0, 3.0),
    beta=st.floats(0.0, 300.0),
    noise=st.sampled_from([0.05, 0.3, 3.0]),
    floor=st.sampled_from([0.0, 1e-6, 1e-3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_fit_is_that_of_numpy(
    seed: int,
    n_features: int,
    alpha: float,
    beta: float,
    noise: float,
    floor: float,
    dtype: torch.dtype,
):
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(n_features, generator=generator, dtype=torch.float64)
    ranks = torch.arange(1, n_features + 1, dtype=torch.float64)
    densities = (ranks + beta) ** -alpha * (noise * random).exp()
    densities = (densities / densities.max()).to(dtype)
    assume(int((densities > floor).sum()) >= 3)
    (best, *expected), (second, *_), *_ = fits_by_numpy(densities, floor)
    # of two that fit alike, rounding decides
    assume(second > best * (1 + 1e-9) + 1e-15)

    law = FittedLaw.fit(densities, floor)
    assert law.known
    found = [law.alpha.item(), law.beta.item(), law.log_scale.item()]
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)
    on_the_host = ZipfLaw.fit(densities, floor)
    assert [on_the_host.alpha, on_the_host.beta] == found[:2]
    assert on_the_host.scale == pytest.approx(np.exp(found[2]))
    assert torch.allclose(law.density(ranks), on_the_host.density(ranks), rtol=1e-9)


@pytest.mark.parametrize("n_dense", [0, 1, 2])
def test_a_law_of_too_few_features_is_not_known_and_flags_the_dead_alone(n_dense: int):
    densities = torch.zeros(20)
    densities[:n_dense] = 0.5
    law = FittedLaw.fit(densities, 0.01)
    assert not law.known
    assert law.density(torch.arange(1.0, 21)).tolist() == [0.0] * 20
    dead = torch.arange(20) >= 17
    assert torch.equal(underused_features(densities, dead, law, 0.5), dead)


def test_three_features_are_enough():
    densities = torch.tensor([0.4, 0.0, 0.2, 0.1])
    assert FittedLaw.fit(densities, 0.01).known
    assert not FittedLaw.fit(densities, 0.1).known
