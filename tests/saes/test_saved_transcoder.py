"""Transcoders in evaluation mode, and as SAELens loads them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE
from sae_lens.saes.transcoder import JumpReLUSkipTranscoder, JumpReLUTranscoder

from sae_lens_alloc import calibrate_thresholds
from sae_lens_alloc.saes.saved_sae import load_sae
from sae_lens_alloc.saes.transcoder import TrainingTranscoder
from sae_lens_alloc.training.held_out import held_out_metrics
from tests.saes.conftest import changed, state_of
from tests.saes.transcoders import (
    ARCHITECTURES,
    D_IN,
    make_rows,
    stepped_transcoder,
)
from tests.saes.without_plugin import loaded_without_plugin, save_with_outputs


def test_saved_transcoder_is_a_stock_one_that_needs_no_plugin(tmp_path: Path):
    folders: dict[str, TrainingTranscoder] = {}
    variants: list[dict[str, Any]] = [
        {},
        {"skip_connection": True},
        {"rescale_acts_by_decoder_norm": False, "skip_connection": True},
        {"normalize_activations": "layer_norm", "skip_connection": True},
        {"normalize_activations": "layer_norm"},
    ]
    for architecture in ARCHITECTURES:
        for overrides in variants:
            sae = stepped_transcoder(architecture, **overrides)
            norms = sae.W_dec.norm(dim=1)
            assert norms.min() < 0.4 and norms.max() > 2.5  # not folded yet
            folder = tmp_path / f"{architecture}-{len(folders)}"
            x = make_rows(256, seed=50)[:, :D_IN].reshape(4, 64, D_IN).contiguous()
            save_with_outputs(sae, x, folder)
            folders[str(folder)] = sae

    assert len(folders) == 10
    for folder, found in loaded_without_plugin(folders, tmp_path).items():
        skip = "Skip" if folders[folder].cfg.skip_connection else ""
        assert found == f"sae_lens.saes.transcoder.JumpReLU{skip}Transcoder"


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_checkpoint_is_trained_on_and_opened_for_inference(
    architecture: str, skip: bool, tmp_path: Path
):
    sae = stepped_transcoder(architecture, skip_connection=skip)
    sae.save_model(tmp_path)
    again = TrainingSAE.load_from_disk(tmp_path)
    assert type(again) is type(sae) and again.cfg == sae.cfg
    assert changed(state_of(sae), again) == set()
    sae.eval()
    x = make_rows(64, seed=50)[:, :D_IN]
    for loaded in (SAE.load_from_disk(tmp_path), load_sae(tmp_path).eval()):
        torch.testing.assert_close(loaded(x), sae(x), rtol=1e-4, atol=1e-5)
    stock = JumpReLUSkipTranscoder if skip else JumpReLUTranscoder
    assert isinstance(SAE.load_from_disk(tmp_path), stock)


@pytest.mark.parametrize("by_threshold", [True, False])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_autoencode_pairs_equals_encode_and_forward(
    architecture: str, skip: bool, by_threshold: bool
):
    sae = stepped_transcoder(
        architecture, skip_connection=skip, normalize_activations="layer_norm"
    )
    sae.train(not by_threshold)
    x = make_rows(64, seed=50)[:, :D_IN]
    pairs, out = sae.autoencode_pairs(x, by_threshold)
    torch.testing.assert_close(pairs.to_dense(), sae.encode(x))
    torch.testing.assert_close(out, sae(x))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_held_out_metrics_and_calibration_are_of_the_output(
    architecture: str, tmp_path: Path
):
    sae = stepped_transcoder(architecture, skip_connection=True, d_sae=64, k=4)
    rows = make_rows(4096, seed=50)
    report = calibrate_thresholds(sae, rows)
    assert report.l0 == pytest.approx(4, rel=0.01)
    sae.eval()
    x, y = rows[:, :D_IN], rows[:, D_IN:]
    error = (sae(x) - y).square().sum()
    variance = (y - y.mean(0)).square().sum()
    expected = (1 - error / variance).item()
    assert report.ev == pytest.approx(expected, abs=1e-4)
    sae.save_inference_model(tmp_path)
    # of the SAE in memory by pairs, and of the stock one as a user has it
    for measured in (sae, SAE.load_from_disk(tmp_path)):
        found = held_out_metrics(measured, rows, 500)
        assert found["explained_variance"] == pytest.approx(expected, abs=1e-4)
        assert found["l0"] == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fold_of_two_factors_keeps_activations_and_output(
    architecture: str, rescale: bool
):
    sae = stepped_transcoder(
        architecture,
        rescale_acts_by_decoder_norm=rescale,
        normalize_activations="expected_average_only_in",
        skip_connection=True,
    )
    of_input, of_output = 0.05, 3.0
    scaled = make_rows(64, seed=50)[:, :D_IN]
    sae.eval()
    acts, out = sae.encode(scaled), sae(scaled)
    sae.fold_activation_norm_scaling_factor((of_input, of_output))
    assert sae.cfg.normalize_activations == "none"
    x = scaled / of_input  # what the language model gives
    folded = sae.encode(x)
    assert torch.equal(folded > 0, acts > 0)
    torch.testing.assert_close(
        folded, acts / of_output if rescale else acts, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(sae(x), out / of_output, rtol=1e-4, atol=1e-4)
