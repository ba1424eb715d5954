"""Thresholds of a saved SAE set anew: global and per feature, from jumprelu and topk."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import (
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)

from sae_lens_alloc.activations.on_text import text_of_sae
from sae_lens_alloc.thresholds.recalibration import load_saved_sae, recalibrate

D_IN, D_SAE = 8, 48


def with_weights(sae: Any) -> Any:
    """Random weights."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec):
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        sae.W_dec *= 0.1  # or the reconstruction would be far worse than none
    return sae


@pytest.fixture
def jumprelu() -> JumpReLUSAE:
    sae = with_weights(JumpReLUSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE)))
    with torch.no_grad():
        sae.threshold.copy_(torch.linspace(0.5, 2.0, D_SAE))
        sae.b_enc[7] = -100.0  # never active
    return sae


@pytest.fixture
def topk() -> TopKSAE:
    return with_weights(TopKSAE(TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=5)))


@pytest.fixture
def activations() -> torch.Tensor:
    return torch.randn(4000, D_IN, generator=torch.Generator().manual_seed(1))


def counts(sae: Any, x: torch.Tensor) -> torch.Tensor:
    return (sae.encode(x) > 0).sum(0)


@pytest.mark.parametrize("target_l0", [2.5, 9.0])
def test_one_factor_keeps_the_ratios_of_the_thresholds(
    jumprelu: JumpReLUSAE, activations: torch.Tensor, target_l0: float
):
    before = {name: value.clone() for name, value in jumprelu.state_dict().items()}
    report = recalibrate(jumprelu, activations, target_l0)
    assert all(torch.equal(jumprelu.get_parameter(n), v) for n, v in before.items())
    ratios = report.sae.threshold / jumprelu.threshold
    torch.testing.assert_close(ratios, ratios.mean().expand(D_SAE))
    used, held_out = activations[:2000], activations[2000:]
    assert counts(report.sae, used).sum().item() == target_l0 * 2000
    assert report.after.l0 == target_l0
    assert report.held_out_after.l0 == pytest.approx(target_l0, rel=0.05)
    assert torch.equal(report.held_out_after.firings, counts(report.sae, held_out))
    assert torch.equal(report.before.firings, counts(jumprelu, used))
    assert report.before.dead_features >= 1


@pytest.mark.parametrize("target_l0", [2.5, 9.0])
def test_per_feature_keeps_the_shares_of_the_features(
    jumprelu: JumpReLUSAE, activations: torch.Tensor, target_l0: float
):
    report = recalibrate(jumprelu, activations, target_l0, per_feature=True)
    used = activations[:2000]
    before, after = counts(jumprelu, used), counts(report.sae, used)
    assert after.sum() == target_l0 * 2000
    assert not torch.allclose(
        report.sae.threshold / jumprelu.threshold, torch.ones(D_SAE), rtol=0.01
    )
    affinities = (used - jumprelu.b_dec) @ jumprelu.W_enc + jumprelu.b_enc
    positive = (affinities > 0).sum(0)
    # in proportion, but for features that are active wherever they are positive
    densest = (before * (after < positive)).argmax()
    factor = after[densest] / before[densest]
    expected = torch.minimum(factor * before, positive)
    assert (after - expected).abs().max() <= 2
    assert after[7] == 0


def test_present_l0_per_feature_changes_nothing_that_fires(
    jumprelu: JumpReLUSAE, activations: torch.Tensor
):
    used = activations[:2000]
    present = counts(jumprelu, used).sum().item() / 2000
    report = recalibrate(jumprelu, activations, present, per_feature=True)
    assert torch.equal(report.sae.encode(used), jumprelu.encode(used))
    assert torch.equal(report.sae.threshold[7], jumprelu.threshold[7])


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("per_feature", [False, True])
def test_topk_gains_a_jumprelu_form(
    activations: torch.Tensor, per_feature: bool, rescale: bool
):
    sae = with_weights(
        TopKSAE(
            TopKSAEConfig(
                d_in=D_IN, d_sae=D_SAE, k=5, rescale_acts_by_decoder_norm=rescale
            )
        )
    )
    report = recalibrate(sae, activations, 5, per_feature)
    assert isinstance(report.sae, JumpReLUSAE)
    used = activations[:2000]
    assert report.after.l0 == pytest.approx(5, rel=1e-3)
    assert (len(report.sae.threshold.unique()) == 1) != per_feature
    if per_feature:
        assert (counts(report.sae, used) - counts(sae, used)).abs().max() <= 1
    # what both activate, both activate and decode alike
    acts, expected = report.sae.encode(used), sae.encode(used)
    both = (acts > 0) & (expected > 0)
    assert both.sum() > 0.7 * expected.count_nonzero()
    torch.testing.assert_close(acts[both], expected[both])
    torch.testing.assert_close(
        report.sae.decode(acts * both), sae.decode(expected * both)
    )


def test_too_many_thresholds_of_zero_can_be_set_per_feature_only(
    jumprelu: JumpReLUSAE, activations: torch.Tensor
):
    with torch.no_grad():
        jumprelu.threshold[:5] = 0.0
    with pytest.raises(ValueError, match="threshold is 0, and stays so.*one by one"):
        recalibrate(jumprelu, activations, 3)
    report = recalibrate(jumprelu, activations, 3, per_feature=True)
    assert report.after.l0 == 3


def test_saved_sae_says_how_it_was_calibrated(
    topk: TopKSAE, activations: torch.Tensor, tmp_path: Path
):
    held_out = {"l0": 5.0}  # with other thresholds
    topk.cfg.metadata = SAEMetadata(
        hook_name="somewhere", context_size=7, held_out=held_out
    )
    report = recalibrate(topk, activations, 4)
    assert topk.cfg.metadata.held_out == held_out
    assert "calibration" not in topk.cfg.metadata
    report.sae.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert loaded.cfg.architecture() == "jumprelu"
    assert loaded.cfg.metadata.hook_name == "somewhere"
    assert loaded.cfg.metadata.l0 == 4
    assert loaded.cfg.metadata.held_out is None
    calibration = loaded.cfg.metadata.calibration
    assert calibration == report.to_dict()
    assert calibration["l0_before"] == 5
    assert calibration["ev_held_out_after"] == report.held_out_after.explained_variance
    assert json.dumps(calibration)


@pytest.mark.parametrize("per_feature", [False, True])
@pytest.mark.parametrize("target_l0", [40, 1e-4])
def test_l0_out_of_reach_is_refused(
    jumprelu: JumpReLUSAE,
    activations: torch.Tensor,
    target_l0: float,
    per_feature: bool,
):
    with pytest.raises(ValueError, match=f"no thresholds give an L0 of {target_l0} on"):
        recalibrate(jumprelu, activations, target_l0, per_feature)


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((10, 9), "activations must have shape (tokens, 8), got (10, 9)."),
        ((3, 8), "activations of at least 4 tokens are needed, two for each half."),
        (
            (4, 8),
            "the activations of these 2 tokens are all the same, so there is no variance to "
            "explain: give other or more text.",
        ),
    ],
)
def test_wrong_activations_are_refused(
    jumprelu: JumpReLUSAE, shape: tuple[int, int], sentence: str
):
    with pytest.raises(ValueError) as error:
        recalibrate(jumprelu, torch.zeros(shape), 3)
    assert str(error.value) == sentence


def test_text_of_an_sae_that_does_not_know_it(jumprelu: JumpReLUSAE):
    jumprelu.cfg.metadata = SAEMetadata(model_name="gpt2", hook_name="somewhere")
    with pytest.raises(ValueError) as error:
        text_of_sae(jumprelu)
    assert str(error.value) == (
        "the SAE's metadata does not say its dataset_path and context_size: give the "
        "config of a run that has them."
    )


def test_folder_without_thresholds_is_refused(tmp_path: Path):
    with pytest.raises(
        ValueError, match="holds no SAE of SAELens: cfg.json is missing"
    ):
        load_saved_sae(tmp_path)
    sizes: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE}
    StandardSAE(StandardSAEConfig(**sizes)).save_model(tmp_path)
    with pytest.raises(ValueError, match="'standard', whose thresholds cannot be set"):
        load_saved_sae(tmp_path)
    TopKTrainingSAE(TopKTrainingSAEConfig(**sizes, k=5)).save_model(tmp_path)
    with pytest.raises(ValueError, match="'topk' in training, whose thresholds"):
        load_saved_sae(tmp_path)


@pytest.mark.parametrize("target_l0", [-1, 0, 49, math.inf, math.nan])
def test_an_l0_that_makes_no_sense_is_refused(
    jumprelu: JumpReLUSAE, activations: torch.Tensor, target_l0: float
):
    with pytest.raises(ValueError, match=r"it must be above 0 and at most 48, the num"):
        recalibrate(jumprelu, activations, target_l0)


@pytest.mark.parametrize("factor", [100.0, 1e25])
def test_an_sae_that_reconstructs_nothing_is_refused(
    jumprelu: JumpReLUSAE, activations: torch.Tensor, factor: float
):
    with torch.no_grad():
        jumprelu.W_dec.mul_(factor)
    with pytest.raises(
        ValueError, match="explains -.* of the variance.*are damaged, or"
    ):
        recalibrate(jumprelu, activations, 3)


@pytest.mark.parametrize("per_feature", [False, True])
def test_a_silenced_feature_stays_silenced(
    jumprelu: JumpReLUSAE, activations: torch.Tensor, per_feature: bool
):
    with torch.no_grad():
        jumprelu.threshold[:9] = torch.inf
    report = recalibrate(jumprelu, activations, 3, per_feature)
    assert report.after.l0 == 3
    assert torch.isinf(report.sae.threshold).tolist() == [i < 9 for i in range(D_SAE)]
    assert counts(report.sae, activations)[:9].sum() == 0


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"context_size": "64"}, "context_size is '64', but it must be an integer"),
        ({"context_size": 0}, "which leave no token of a context"),
        ({"hook_name": ["a"]}, "hook_name is ['a'], but it must be a string"),
        ({"model_name": 3}, "model_name is 3, but it must be a string"),
        ({"prepend_bos": "no"}, "prepend_bos is 'no', but it must be true or false"),
        ({"seqpos_slice": 3}, "seqpos_slice is 3, but it must be a list"),
        ({"seqpos_slice": [1, 2, 3, 4]}, "which leave no token of a context"),
        ({"seqpos_slice": [0, 8, 0]}, "which leave no token of a context"),
    ],
)
def test_metadata_of_the_wrong_type_is_named(
    jumprelu: JumpReLUSAE, metadata: dict[str, Any], said: str
):
    whole = {
        "model_name": "gpt2",
        "dataset_path": "text",
        "hook_name": "somewhere",
        "context_size": 64,
    }
    jumprelu.cfg.metadata = SAEMetadata(**{**whole, **metadata})
    with pytest.raises(ValueError) as error:
        text_of_sae(jumprelu)
    assert said in str(error.value)
