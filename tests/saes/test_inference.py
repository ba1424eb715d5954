"""Evaluation mode, the saved JumpReLU SAE, and the folds that SAELens applies to an SAE."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_lens_alloc import calibrate_thresholds
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from tests.saes.conftest import (
    ARCHITECTURES,
    DenseSAE,
    active_mask,
    changed,
    make_sae,
    state_of,
    tokens,
    training_step,
)
from tests.saes.without_plugin import loaded_without_plugin, save_with_outputs


def stepped_sae(
    architecture: str, n_steps: int = 30, **overrides: Any
) -> AllocationTrainingSAE[Any]:
    """An SAE whose statistics have seen a few batches; its weights stay as they are."""
    sae = make_sae(architecture, **overrides)
    for step in range(n_steps):
        training_step(sae, tokens(64, 8, seed=step, dtype=sae.dtype), step)
    if architecture == "feature_choice":
        assert len(sae.allocation.threshold.unique()) > 16
    return sae


@pytest.mark.parametrize("normalize_activations", ["none", "layer_norm"])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_evaluation_mode_uses_the_thresholds(
    architecture: str, rescale: bool, normalize_activations: str
):
    sae = stepped_sae(
        architecture,
        dtype="float64",
        rescale_acts_by_decoder_norm=rescale,
        normalize_activations=normalize_activations,
    )
    sae.eval()
    x = tokens(200, 8, seed=50, dtype=torch.float64)
    dense = DenseSAE(sae)
    affinities = dense.affinities(x).detach()
    mask = affinities > sae.allocation.threshold
    assert 0.5 < mask.sum() / 200 < 10
    torch.testing.assert_close(sae.encode(x), affinities * mask)
    torch.testing.assert_close(sae(x), dense.step(x, mask).sae_out)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_evaluation_mode_does_not_depend_on_the_rest_of_the_batch(architecture: str):
    sae = stepped_sae(architecture)
    sae.eval()
    x = tokens(64, 8, seed=50)
    # a token whose activations are 100 times as large would eat a training batch's budget
    crowded = torch.cat([x, 100 * tokens(64, 8, seed=51)])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    acts, sae_out = sae.encode(x), sae(x)

    alone = torch.stack([sae.encode(token) for token in x])
    assert torch.equal(alone > 0, acts > 0)
    torch.testing.assert_close(alone, acts, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.stack([sae(token) for token in x]), sae_out, rtol=1e-5, atol=1e-6
    )
    for other in (sae.encode(crowded)[:64], sae.encode(x[order])[order.argsort()]):
        assert torch.equal(other > 0, acts > 0)
        torch.testing.assert_close(other, acts, rtol=1e-5, atol=1e-6)

    sae.train()
    assert not torch.equal(sae.encode(crowded)[:64] > 0, acts > 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_mode_encodes_as_the_next_step_would_and_changes_nothing(
    architecture: str,
):
    sae = stepped_sae(architecture)
    x = tokens(64, 8, seed=50)
    before = state_of(sae)
    acts = sae.encode(x)
    for _ in range(2):
        sae.encode(x)
        sae(x)
        sae.autoencode_pairs(x, by_threshold=False)
        sae.autoencode_pairs(x, by_threshold=True)
    sae.eval()
    sae.encode(x)
    sae.train()
    assert changed(before, sae) == set()
    output = training_step(sae, x, step=30)
    assert torch.equal(acts > 0, active_mask(output))
    torch.testing.assert_close(acts, output.feature_acts.to_dense())
    # the step did change them
    assert {"allocation.density", "allocation.threshold"} <= changed(before, sae)


@pytest.mark.parametrize("by_threshold", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_autoencode_pairs_equals_encode_and_decode(
    architecture: str, by_threshold: bool
):
    sae = stepped_sae(architecture, normalize_activations="layer_norm")
    sae.train(not by_threshold)
    x = tokens(64, 8, seed=50)
    pairs, sae_out = sae.autoencode_pairs(x, by_threshold)
    torch.testing.assert_close(pairs.to_dense(), sae.encode(x))
    torch.testing.assert_close(sae_out, sae(x))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decode_takes_sparse_activations(architecture: str):
    sae = stepped_sae(architecture)
    acts = sae.encode(tokens(4, 8))
    torch.testing.assert_close(sae.decode(acts.to_sparse()), sae.decode(acts))


@pytest.mark.slow
def test_saved_sae_is_a_stock_jumprelu_sae_that_needs_no_plugin(tmp_path: Path):
    folders: dict[str, AllocationTrainingSAE[Any]] = {}
    variants: list[dict[str, Any]] = [
        {},
        {"rescale_acts_by_decoder_norm": False},
        {"normalize_activations": "layer_norm"},
        {"apply_b_dec_to_input": False},
    ]
    for architecture in ARCHITECTURES:
        for overrides in variants:
            sae = stepped_sae(architecture, **overrides)
            norms = sae.W_dec.norm(dim=1)
            assert norms.min() < 0.4 and norms.max() > 2.5  # not folded yet
            folder = tmp_path / f"{architecture}-{len(folders)}"
            save_with_outputs(sae, tokens(4, 64, 8, seed=50), folder)
            assert json.loads((folder / "cfg.json").read_text())["architecture"] == (
                "jumprelu"
            )
            folders[str(folder)] = sae

    assert len(folders) == 8
    classes = loaded_without_plugin(folders, tmp_path)
    assert set(classes.values()) == {"sae_lens.saes.jumprelu_sae.JumpReLUSAE"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fold_w_dec_norm_keeps_the_output(architecture: str):
    sae = stepped_sae(architecture)
    sae.eval()
    x = tokens(64, 8, seed=50)
    acts, sae_out = sae.encode(x), sae(x)
    sae.fold_W_dec_norm()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))
    torch.testing.assert_close(sae.encode(x), acts, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(x), sae_out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fold_w_dec_norm_is_refused_where_it_would_change_the_selection(
    architecture: str,
):
    sae = make_sae(architecture, rescale_acts_by_decoder_norm=False)
    with pytest.raises(
        NotImplementedError, match="rescale_acts_by_decoder_norm is False"
    ):
        sae.fold_W_dec_norm()


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fold_activation_norm_scaling_factor_keeps_the_output(
    architecture: str, rescale: bool, apply_b_dec_to_input: bool
):
    # SAELens #763: thresholds have to be folded too
    sae = stepped_sae(
        architecture,
        rescale_acts_by_decoder_norm=rescale,
        apply_b_dec_to_input=apply_b_dec_to_input,
        normalize_activations="expected_average_only_in",
    )
    factor = 0.05
    scaled = tokens(64, 8, seed=50)
    x = scaled / factor  # what the language model gives
    sae.eval()
    acts, sae_out = sae.encode(scaled), sae(scaled)
    cut = sae.allocation.cut.clone()
    sae.fold_activation_norm_scaling_factor(factor)
    assert sae.cfg.normalize_activations == "none"
    folded = sae.encode(x)
    assert torch.equal(folded > 0, acts > 0)
    # in units of the raw activations where activations carry the decoder norm
    torch.testing.assert_close(folded, acts / factor if rescale else acts)
    torch.testing.assert_close(sae(x), sae_out / factor, rtol=1e-4, atol=1e-4)
    # the running cut is in the units of the thresholds, so that training could go on
    torch.testing.assert_close(sae.allocation.cut, cut / factor if rescale else cut)


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fold_activation_whitening_keeps_the_output(
    architecture: str, rescale: bool, apply_b_dec_to_input: bool
):
    sae = stepped_sae(
        architecture,
        rescale_acts_by_decoder_norm=rescale,
        apply_b_dec_to_input=apply_b_dec_to_input,
        normalize_activations="covariance_whitening",
    )
    generator = torch.Generator().manual_seed(8)
    matrix = torch.eye(8) + 0.2 * torch.randn(8, 8, generator=generator)
    mean = torch.randn(8, generator=generator)
    x = tokens(64, 8, seed=50) @ matrix.inverse() + mean
    whitened = (x - mean) @ matrix
    sae.eval()
    acts, sae_out = sae.encode(whitened), sae(whitened)
    sae.fold_activation_whitening(mean, matrix, matrix.inverse())
    assert torch.equal(sae.encode(x) > 0, acts > 0)
    torch.testing.assert_close(sae.encode(x), acts, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        sae(x), sae_out @ matrix.inverse() + mean, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_calibrated_l0_is_what_encode_and_the_saved_sae_have(
    architecture: str, dtype: str, tmp_path: Path
):
    from sae_lens import SAE

    sae = stepped_sae(architecture, dtype=dtype, d_sae=256, k=8)
    x = tokens(8192, 8, seed=50, dtype=sae.dtype)
    report = calibrate_thresholds(sae, x)
    assert report.l0 == pytest.approx(8, rel=0.01)
    sae.eval()
    assert (sae.encode(x) > 0).sum().item() / 8192 == pytest.approx(8, rel=0.01)
    sae.save_inference_model(tmp_path)
    saved = SAE.load_from_disk(tmp_path)
    # in bfloat16 the threshold that SAELens loads has 8 significant bits
    tolerance = 0.01 if dtype == "float32" else 0.05
    l0 = (saved.encode(x) > 0).sum().item() / 8192
    assert l0 == pytest.approx(8, rel=tolerance)
    assert saved.cfg.metadata.calibration["l0"] == report.l0
