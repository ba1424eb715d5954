"""SAEs brought to a wanted L0, against dense float64 computations."""

from typing import Any

import pytest
import torch
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.sae import SAE
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from sae_lens_alloc.thresholds.operating_point import at_l0

D_IN, D_SAE, N = 6, 20, 300


@pytest.fixture
def activations() -> torch.Tensor:
    return torch.randn(N, D_IN, dtype=torch.float64, generator=torch.manual_seed(5))


def random_weights(sae: SAE[Any]) -> None:
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(std=0.5)


@torch.no_grad()
def test_a_standard_sae_keeps_its_largest_norm_weighted_activations(
    activations: torch.Tensor,
):
    sae = StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=D_SAE, dtype="float64"))
    random_weights(sae)
    acts = sae.encode(activations)
    weighted = acts * sae.W_dec.norm(dim=1)
    cut = weighted.flatten().sort(descending=True).values[3 * N - 1]
    expected = torch.where(weighted >= cut, acts, 0.0) @ sae.W_dec + sae.b_dec

    calibrated = at_l0(sae, activations, 3.0)
    assert isinstance(calibrated, JumpReLUSAE)
    assert (calibrated.encode(activations) != 0).sum() == 3 * N
    assert torch.allclose(calibrated(activations), expected)


@torch.no_grad()
def test_a_gated_sae_opens_its_widest_gates(activations: torch.Tensor):
    sae = GatedSAE(GatedSAEConfig(d_in=D_IN, d_sae=D_SAE, dtype="float64"))
    random_weights(sae)
    sae.b_mag.add_(3.0)  # so that an open gate lets something through
    norms = sae.W_dec.norm(dim=1)
    x = activations - sae.b_dec * sae.cfg.apply_b_dec_to_input
    gates = (x @ sae.W_enc + sae.b_gate) * norms
    magnitudes = (x @ (sae.W_enc * sae.r_mag.exp()) + sae.b_mag).relu()
    cut = gates.flatten().sort(descending=True).values[3 * N - 1]
    expected = torch.where(gates >= cut, magnitudes, 0.0) @ sae.W_dec + sae.b_dec
    n_active = ((gates >= cut) & (magnitudes > 0)).sum()

    calibrated = at_l0(sae, activations, 3.0)
    assert isinstance(calibrated, JumpReLUSAE)
    assert (calibrated.encode(activations) != 0).sum() == n_active
    assert n_active / N == pytest.approx(3.0, rel=0.01)
    assert torch.allclose(calibrated(activations), expected)


@torch.no_grad()
def test_topk_keeps_its_rule(activations: torch.Tensor):
    sae = TopKSAE(TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=3, dtype="float64"))
    random_weights(sae)
    before = sae(activations)
    assert at_l0(sae, activations, 3.0) is sae
    assert torch.equal(sae(activations), before)


def test_an_l0_above_that_of_training_is_out_of_reach(activations: torch.Tensor):
    sae = StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=D_SAE, dtype="float64"))
    random_weights(sae)
    natural = (sae.encode(activations) != 0).sum().item() / N
    at_l0(sae, activations, natural - 0.1)
    with pytest.raises(ValueError, match="no thresholds give an L0"):
        at_l0(sae, activations, natural + 0.1)
