"""SAE folders that are damaged: one sentence that names the file, and the folder left as it is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from safetensors.torch import load_file, save_file

from sae_lens_alloc import MutualChoiceTrainingSAE, MutualChoiceTrainingSAEConfig
from sae_lens_alloc.saes.saved_sae import load_sae, trained_k
from sae_lens_alloc.training.source_sae import load_source_sae

SIZES: dict[str, Any] = {"d_in": 4, "d_sae": 6}
CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole JumpReLU SAE of 4 dimensions and 6 features."""
    sae = JumpReLUSAE(JumpReLUSAEConfig(**SIZES))
    sae.save_model(tmp_path / "sae")
    return tmp_path / "sae"


def change_cfg(folder: Path, **settings: Any) -> None:
    cfg = json.loads((folder / CFG).read_text())
    (folder / CFG).write_text(json.dumps({**cfg, **settings}))


def change_weights(folder: Path, **tensors: torch.Tensor | None) -> None:
    changed = {**load_file(folder / WEIGHTS), **tensors}
    kept = {name: value for name, value in changed.items() if value is not None}
    save_file(kept, folder / WEIGHTS)


@pytest.mark.parametrize(
    "sae",
    [
        JumpReLUSAE(JumpReLUSAEConfig(**SIZES)),
        TopKSAE(TopKSAEConfig(**SIZES, k=2)),
        GatedSAE(GatedSAEConfig(**SIZES)),
        BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**SIZES, k=2.5)),
        MutualChoiceTrainingSAE(
            MutualChoiceTrainingSAEConfig(**SIZES, k=2, feature_choice_steps=0)
        ),
    ],
)
def test_a_whole_one_is_loaded_as_it_was_saved(sae: Any, tmp_path: Path):
    sae.save_model(tmp_path)
    loaded = load_sae(tmp_path)
    assert type(loaded) is type(sae)
    assert loaded.state_dict().keys() == sae.state_dict().keys()
    for name, value in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_a_silenced_feature_is_no_damage(folder: Path):
    thresholds = torch.tensor([1.0, torch.inf, 0.0, 2.0, torch.inf, 1.0])
    change_weights(folder, threshold=thresholds)
    assert torch.equal(load_sae(folder).get_parameter("threshold"), thresholds)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"metadata": None}, "metadata must be a mapping, not None."),
        ({"metadata": [1]}, "metadata must be a mapping, not [1]."),
        ({"architecture": "rbf"}, "there is no inference architecture 'rbf'."),
        (
            {"architecture": "mutual_choice"},
            "there is no inference architecture 'mutual_choice'.",
        ),
        ({"architecture": ["topk"]}, "there is no inference architecture ['topk']."),
        ({"d_in": "four"}, "d_in must be an integer, not 'four'."),
        ({"d_in": 4.5}, "d_in must be an integer, not 4.5."),
        ({"d_sae": None}, "d_sae must be an integer, not None."),
        ({"d_sae": -6}, "d_sae must be above 0 and below 2^31, not -6."),
        ({"dtype": "float33"}, "float33"),
        ({"apply_b_dec_to_input": "yes"}, "must be true or false, not 'yes'."),
        ({"architecture": "topk", "k": 0}, "k must be above 0 and below 2^31, not 0."),
        ({"d_in": 10**400}, "d_in must be above 0 and below 2^31, not 10^400."),
        ({"architecture": "topk"}, "k is 100, but there are only 6 features."),
        ({"architecture": "topk", "k": 7}, "k is 7, but there are only 6 features."),
    ],
)
def test_settings_that_are_wrong_are_named(
    folder: Path, settings: dict[str, Any], said: str
):
    change_cfg(folder, **settings)
    with pytest.raises(ValueError) as error:
        load_sae(folder)
    assert str(folder / CFG) in str(error.value)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_that_are_missing_are_named(folder: Path):
    for name in ("dtype", "d_in"):
        cfg = json.loads((folder / CFG).read_text())
        del cfg[name]
        (folder / CFG).write_text(json.dumps(cfg))
        with pytest.raises(
            ValueError, match=f": ({name}|d_in, dtype) (is|are) missing"
        ):
            load_sae(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "7", '{"d_in": ', "[" * 10**5])
def test_a_config_that_is_no_mapping_is_named(folder: Path, text: str):
    (folder / CFG).write_text(text)
    with pytest.raises(ValueError, match=r"cfg.json' is damaged.*\.$"):
        load_sae(folder)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"threshold": None}, "threshold is missing."),
        ({"W_enc": None, "W_dec": None}, "W_dec, W_enc are missing."),
        ({"W_skip": torch.zeros(2)}, "W_skip is unknown to it."),
        ({"W_enc": torch.zeros(6, 4)}, "W_enc is of shape (6, 4), not (4, 6)."),
        ({"b_enc": torch.zeros(7)}, "b_enc is of shape (7,), not (6,)."),
        ({"b_enc": torch.zeros(6, dtype=torch.int64)}, "b_enc is of type I64, no flo"),
        ({"b_enc": torch.full((6,), torch.nan)}, "b_enc holds 6 values that are NaN"),
        ({"b_dec": torch.tensor([0.0, 1, torch.inf, 2])}, "b_dec holds 1 values"),
        (
            {"threshold": torch.tensor([0.0, 1, 1, 1, 1, torch.nan])},
            "threshold holds 1",
        ),
        ({"threshold": torch.full((6,), -torch.inf)}, "threshold holds 6 values"),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_named(
    folder: Path, tensors: dict[str, torch.Tensor | None], said: str
):
    change_weights(folder, **tensors)
    with pytest.raises(ValueError) as error:
        load_sae(folder)
    assert str(folder / WEIGHTS) in str(error.value)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_cut_anywhere_are_damaged(folder: Path):
    whole = (folder / WEIGHTS).read_bytes()
    for length in range(0, len(whole), 13):
        (folder / WEIGHTS).write_bytes(whole[:length])
        with pytest.raises(ValueError, match="sae_weights.safetensors' is damaged"):
            load_sae(folder)


@pytest.mark.parametrize("name", [CFG, WEIGHTS])
def test_a_folder_in_place_of_a_file_is_no_file(folder: Path, name: str):
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(ValueError, match=f"holds no SAE of SAELens: {name} is missing"):
        load_sae(folder)


@pytest.mark.parametrize("text", ["[]", "{", '{"scaling_factor": "big"}'])
def test_a_damaged_scaling_factor_is_named(folder: Path, text: str):
    (folder / "activation_scaler.json").write_text(text)
    with pytest.raises(ValueError, match="activation_scaler.json' is damaged"):
        load_source_sae(str(folder), "cpu")


@pytest.mark.parametrize(
    ("details", "k"), [({"k": 3}, 3), ({"k": "3"}, None), ([3], None), (None, None)]
)
def test_the_trained_k_is_a_number_or_not_known(folder: Path, details: Any, k: Any):
    change_cfg(folder, metadata={"training_architecture_details": details})
    change_cfg(folder, sae_lens_version="6.0.0")  # metadata has none here
    assert trained_k(load_sae(folder)) == k
    assert load_source_sae(str(folder), "cpu").expected_l0 == k
