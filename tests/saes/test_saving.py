"""Statistics survive dtype changes and saving, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import TrainingSAE
from safetensors.torch import load_file

from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from tests.saes.conftest import (
    ARCHITECTURES,
    WEIGHTS,
    active_mask,
    changed,
    make_sae,
    state_of,
    tokens,
    training_step,
)


def used_sae(architecture: str, **overrides: Any) -> AllocationTrainingSAE[Any]:
    """An SAE that has seen 7 batches and holds statistics that no bfloat16 can hold."""
    sae = make_sae(architecture, aux_loss="aux_zipf", **overrides)
    dead = torch.arange(32) % 5 == 0
    for step in range(7):
        training_step(sae, tokens(37, 8, seed=step, dtype=sae.dtype), step, dead=dead)
    state = sae.allocation
    assert state.density_tokens.item() == 7 * 37
    for values in (state.threshold, state.density, state.cut, state.quota_carry):
        assert not torch.equal(values, values.bfloat16().float())
    assert state.underused.any() and not state.underused.all()
    return sae


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_statistics_stay_as_they_are_when_the_weights_change_dtype(
    architecture: str, dtype: torch.dtype
):
    # SAELens #728: thresholds rounded to bfloat16 change which features fire
    sae = used_sae(architecture)
    before = state_of(sae)
    sae.to(dtype)
    assert {sae.get_parameter(name).dtype for name in WEIGHTS} == {dtype}
    assert changed(before, sae) == set(WEIGHTS)
    sae.float()
    assert {name for name in changed(before, sae) if name not in WEIGHTS} == set()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_load_weights_from_checkpoint_restores_everything(
    architecture: str, dtype: str, tmp_path: Path
):
    sae = used_sae(architecture, dtype=dtype)
    before = state_of(sae)
    sae.save_model(tmp_path)
    assert changed(before, sae) == set()
    other = make_sae(architecture, seed=9, dtype=dtype)
    assert changed(before, other)
    other.load_weights_from_checkpoint(tmp_path)
    assert changed(before, other) == set()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_load_from_disk_restores_everything(
    architecture: str, dtype: str, tmp_path: Path
):
    sae = used_sae(architecture, dtype=dtype)
    before = state_of(sae)
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert type(loaded) is type(sae)
    assert loaded.cfg.to_dict() == sae.cfg.to_dict()
    assert changed(before, loaded) == set()

    x = tokens(37, 8, seed=50, dtype=sae.dtype)
    for mode in (True, False):
        sae.train(mode)
        loaded.train(mode)
        assert torch.equal(loaded.encode(x), sae.encode(x))
    sae.train()
    loaded.train()
    output, expected = training_step(loaded, x, 7), training_step(sae, x, 7)
    assert torch.equal(active_mask(output), active_mask(expected))
    assert torch.equal(output.loss, expected.loss)
    assert changed(state_of(sae), loaded) == set()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_load_from_disk_in_another_dtype_keeps_the_statistics(
    architecture: str, tmp_path: Path
):
    sae = used_sae(architecture)
    before = state_of(sae)
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path, dtype="bfloat16")
    assert loaded.W_enc.dtype == torch.bfloat16
    assert changed(before, loaded) == set(WEIGHTS)


@pytest.mark.parametrize(
    ("architecture", "schedule"),
    [
        ("mutual_choice", {"feature_choice_steps": 4}),
        ("feature_choice", {"mutual_choice_steps": 4}),
        ("mutual_choice", {"k_start": 6, "k_decay_steps": 4}),
    ],
)
def test_loaded_sae_goes_on_with_the_rule_and_budget_it_was_saved_with(
    architecture: str, schedule: dict[str, int], tmp_path: Path
):
    # 7 steps of a schedule of 4: the SAE is past it
    sae = used_sae(architecture, **schedule)
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    restored = make_sae(architecture, aux_loss="aux_zipf", seed=9, **schedule)
    restored.load_weights_from_checkpoint(tmp_path)
    x = tokens(37, 8, seed=50)
    for other in (loaded, restored):
        assert torch.equal(other.encode(x) > 0, sae.encode(x) > 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_loaded_sae_forgets_what_it_derived_from_its_old_statistics(
    architecture: str, tmp_path: Path
):
    sae = used_sae(architecture)
    sae.save_model(tmp_path)
    other = make_sae(architecture, seed=9, aux_loss="aux_zipf")
    # fill the caches: flagged features, quotas per rank, whether the cut is known
    training_step(other, tokens(37, 8, seed=3), 0, dead=torch.arange(32) % 3 == 0)
    other.load_weights_from_checkpoint(tmp_path)
    x = tokens(37, 8, seed=50)
    output, expected = training_step(other, x, 7), training_step(sae, x, 7)
    torch.testing.assert_close(output.losses, expected.losses)
    assert changed(state_of(sae), other) == set()


def test_a_checkpoint_names_its_statistics_as_those_of_earlier_versions_do(
    tmp_path: Path,
):
    used_sae("mutual_choice").save_model(tmp_path)
    shapes = {
        name: list(tensor.shape)
        for name, tensor in load_file(tmp_path / SAE_WEIGHTS_FILENAME).items()
        if name not in WEIGHTS
    }
    # numbers are four bytes each
    assert shapes == {
        "allocation.density": [4, 32],
        "allocation.density_tokens": [4],
        "allocation.n_steps": [4],
        "allocation.underused": [32],
        "allocation.threshold": [4, 32],
        "allocation.cut": [4],
        "allocation.quota_carry": [4, 32],
        "allocation.quota_law": [4, 2],
        "allocation.window_losses": [4, 60],
        "allocation.open_window": [4, 2],
        "allocation.settled": [4],
        "allocation.backend": [4],
    }
