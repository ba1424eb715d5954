"""One factor moves all thresholds to a wanted L0; it counts pairs and never padding."""

import math

import pytest
import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig

from sae_lens_alloc.evaluation.usage import as_user, measure_usage
from sae_lens_alloc.ops.backend import BACKEND_VARIABLE
from sae_lens_alloc.ops.block_encoder import Encoder
from sae_lens_alloc.thresholds.factor import set_l0, threshold_factor
from tests.helpers import exact_tensors

D_IN, D_SAE = 8, 24


@pytest.fixture
def sae() -> JumpReLUSAE:
    torch.manual_seed(2)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE, dtype="float64"))
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec):
            parameter.normal_(std=0.4)
        sae.b_enc[:2] = -100.0  # dead
        sae.threshold.fill_(0.6)
    return sae


def test_the_factor_is_the_same_by_every_backend(backend: str):
    torch.manual_seed(0)
    x, W_enc, b_enc, scale = exact_tensors(60, 50)
    thresholds = torch.full((50,), 2.0)
    encoder = Encoder(W_enc, b_enc, scale)
    affinities = (x @ W_enc + b_enc) * scale
    factor = threshold_factor(encoder, x, thresholds, 3)
    fourth = affinities.flatten().sort(descending=True).values[3 * 60 - 1]
    torch.testing.assert_close(factor, fourth / 2, rtol=1e-5, atol=0)


def test_too_few_positive_affinities_are_an_error_by_every_backend(backend: str):
    """Triton fills up with padding, whose factor of 0 would silence nothing."""
    torch.manual_seed(0)
    x, W_enc, _, _ = exact_tensors(60, 50)
    encoder = Encoder(W_enc, torch.full((50,), -4.0), None)
    positive = (x @ W_enc - 4 > 0).sum() / 60
    assert 0 < positive < 12
    with pytest.raises(ValueError, match="no thresholds give an L0 of 12"):
        threshold_factor(encoder, x, torch.ones(50), 12)


def test_thresholds_are_moved_to_the_wanted_l0(sae: JumpReLUSAE):
    torch.manual_seed(3)
    activations = torch.randn(500, D_IN, dtype=torch.float64)
    with torch.no_grad():
        sae.threshold.uniform_(0.3, 0.9)
    ratios = sae.threshold / sae.threshold[0]
    for target in (1.0, 3.7):
        set_l0(sae, activations, target)
        assert measure_usage(as_user(sae), activations).l0 == pytest.approx(
            math.floor(target * 500) / 500
        )
        assert torch.allclose(sae.threshold / sae.threshold[0], ratios)


@pytest.mark.parametrize("target", [0.0001, 23.0])
def test_an_l0_out_of_reach_is_an_error(sae: JumpReLUSAE, target: float):
    activations = torch.randn(50, D_IN, dtype=torch.float64)
    with pytest.raises(ValueError, match="no thresholds give an L0"):
        set_l0(sae, activations, target)


@torch.no_grad()
def test_a_threshold_of_zero_stays_zero(sae: JumpReLUSAE):
    """Feature 3 keeps all its positive affinities, the others share what is left."""
    activations = torch.randn(
        500, D_IN, dtype=torch.float64, generator=torch.manual_seed(3)
    )
    sae.threshold.uniform_(0.3, 0.9)
    sae.threshold[3] = 0.0
    ratios = sae.threshold / sae.threshold[0]
    affinities = sae.process_sae_in(activations) @ sae.W_enc + sae.b_enc
    always = int((affinities[:, 3] > 0).sum())
    target = (always + 700) / 500
    relative = affinities / sae.threshold
    relative[:, 3] = -1
    cut = relative.flatten().sort(descending=True).values[699]

    set_l0(sae, activations, target)
    active = sae.encode(activations) > 0
    assert torch.equal(active[:, 3], affinities[:, 3] > 0)
    active[:, 3] = False
    assert torch.equal(active, relative >= cut)
    assert torch.allclose(sae.threshold / sae.threshold[0], ratios)

    with pytest.raises(ValueError, match="threshold is 0, and stays so"):
        set_l0(sae, activations, (always - 1) / 500)


def test_negative_thresholds_are_not_moved_by_a_factor(sae: JumpReLUSAE):
    with torch.no_grad():
        sae.threshold[3] = -0.1
    with pytest.raises(ValueError, match="no threshold may be negative"):
        set_l0(sae, torch.randn(50, D_IN, dtype=torch.float64), 2.0)


def test_thresholds_of_nan_are_not_moved_by_a_factor(sae: JumpReLUSAE):
    with torch.no_grad():
        sae.threshold[3] = torch.nan
    with pytest.raises(ValueError, match="1 of 24 thresholds are NaN"):
        set_l0(sae, torch.randn(50, D_IN, dtype=torch.float64), 2.0)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_silenced_features_are_not_counted(
    backend: str, monkeypatch: pytest.MonkeyPatch
):
    """Of 10 tokens with affinities 1, 2 and 3 of three features, two of them silenced."""
    monkeypatch.setenv(BACKEND_VARIABLE, backend)
    encoder = Encoder(torch.zeros(4, 3), torch.tensor([1.0, 2.0, 3.0]), None)
    x, inf = torch.zeros(10, 4), torch.inf
    factor = threshold_factor(encoder, x, torch.tensor([2.0, inf, inf]), 1.0)
    assert factor.item() == pytest.approx(0.5, rel=1e-5)
    for thresholds in ([2.0, inf, inf], [inf] * 3):
        with pytest.raises(ValueError, match="those of silenced features left out"):
            threshold_factor(encoder, x, torch.tensor(thresholds), 1.1)
