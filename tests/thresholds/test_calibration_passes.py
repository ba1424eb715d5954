"""Calibration encodes its tokens twice, and finds what a pass for each figure finds."""

from functools import partial
from typing import Any

import pytest
import torch

from sae_lens_alloc import calibrate_thresholds
from sae_lens_alloc.evaluation.usage import by_pairs, measure_usage
from sae_lens_alloc.ops import block_encoder
from sae_lens_alloc.ops.block_encoder import Encoder
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.thresholds.factor import scale_thresholds
from tests.saes.conftest import make_sae, state_of, tokens, training_step

N_TOKENS, D_SAE, BATCH_SIZE = 2000, 200, 300
CASES = pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("mutual_choice", {"selection_margin": 1.0}),
        ("mutual_choice", {"feature_choice_steps": 100}),
        ("feature_choice", {}),
        ("matryoshka_mutual_choice", {"matryoshka_widths": [20, 80]}),
    ],
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(block_encoder._BLOCK_ELEMENTS, "cpu", 64 * BATCH_SIZE)


def stepped(architecture: str, options: dict[str, Any]) -> AllocationTrainingSAE[Any]:
    sae = make_sae(architecture, d_sae=D_SAE, k=8, **options)
    for step in range(12):
        training_step(sae, tokens(128, 8, seed=step), step)
    return sae


@CASES
@pytest.mark.parametrize("target_l0", [None, 2.0, 30.0])
def test_two_passes_find_what_four_passes_find(
    architecture: str, options: dict[str, Any], target_l0: float | None
):
    sae, reference = (stepped(architecture, options) for _ in range(2))
    x = tokens(N_TOKENS, 8, seed=50)
    report = calibrate_thresholds(sae, x, target_l0, BATCH_SIZE)

    by_batch = by_pairs(partial(reference.autoencode_pairs, by_threshold=False))
    by_threshold = by_pairs(partial(reference.autoencode_pairs, by_threshold=True))
    training = measure_usage(by_batch, x, BATCH_SIZE)
    before = measure_usage(by_threshold, x, BATCH_SIZE)
    scale_thresholds(reference, x, target_l0 or 8)
    after = measure_usage(by_threshold, x, BATCH_SIZE)

    assert (report.training_l0, report.training_ev) == (
        training.l0,
        training.explained_variance,
    )
    assert (report.l0_before, report.ev_before) == (
        before.l0,
        before.explained_variance,
    )
    # products of another number of tokens may round differently
    assert report.l0 == pytest.approx(after.l0, abs=2 / N_TOKENS)
    assert report.ev == pytest.approx(after.explained_variance, abs=1e-5)
    for name, value in state_of(reference).items():
        torch.testing.assert_close(sae.state_dict()[name], value, rtol=1e-5, atol=0)


@CASES
@pytest.mark.parametrize("target_l0", [None, 2.0, 30.0])
def test_tokens_are_encoded_twice(
    architecture: str,
    options: dict[str, Any],
    target_l0: float | None,
    monkeypatch: pytest.MonkeyPatch,
):
    sae = stepped(architecture, options)
    encoded = 0
    products = Encoder.products

    def counted(encoder: Encoder, x: torch.Tensor) -> torch.Tensor:
        nonlocal encoded
        encoded += len(x) * encoder.n_features
        return products(encoder, x)

    monkeypatch.setattr(Encoder, "products", counted)
    calibrate_thresholds(sae, tokens(N_TOKENS, 8, seed=50), target_l0, BATCH_SIZE)
    assert encoded == 2 * N_TOKENS * D_SAE


def test_thresholds_stay_where_no_factor_gives_the_wanted_l0():
    sae = stepped("mutual_choice", {})
    before = state_of(sae)
    with pytest.raises(ValueError, match="no thresholds give an L0 of 199"):
        calibrate_thresholds(sae, tokens(N_TOKENS, 8, seed=50), 199.0, BATCH_SIZE)
    for name, value in state_of(sae).items():
        assert torch.equal(value, before[name]), name
