"""What a YAML file and overrides become."""

import json
from pathlib import Path

import pytest
from sae_lens import BatchTopKTrainingSAEConfig

from sae_lens_alloc import (
    FeatureChoiceTrainingSAEConfig,
    MutualChoiceTrainingSAEConfig,
)
from tests.config.run_files import MINIMAL, error_of, load


def test_file_becomes_the_config_that_saelens_would_build(config_path: Path):
    cfg = load(config_path)
    assert cfg.model_name == "gpt2"
    assert cfg.training_tokens == 10_000
    assert cfg.logger.log_to_wandb is False
    # what is left open of the schedule is the recipe's, for 100 steps
    assert cfg.sae == MutualChoiceTrainingSAEConfig(
        d_in=8, d_sae=32, k=2, feature_choice_steps=25, k_start=4, k_decay_steps=25
    )
    # untouched fields keep SAELens' defaults
    assert cfg.lr == 3e-4
    assert cfg.adam_beta2 == 0.999


def test_any_registered_architecture_can_be_trained(config_path: Path):
    cfg = load(config_path, "sae.architecture=batchtopk", "sae.topk_threshold_lr=0.02")
    assert cfg.sae == BatchTopKTrainingSAEConfig(
        d_in=8, d_sae=32, k=2, topk_threshold_lr=0.02
    )
    cfg = load(config_path, "sae.architecture=feature_choice")
    assert cfg.sae == FeatureChoiceTrainingSAEConfig(d_in=8, d_sae=32, k=2)


def test_runner_cfg_json_of_a_finished_run_is_a_config(
    config_path: Path, tmp_path: Path
):
    cfg = load(config_path, "seqpos_slice=[1, null]", "lr=3e-5")
    saved = tmp_path / "runner_cfg.json"
    saved.write_text(json.dumps(cfg.to_dict()))
    again = load(saved)
    assert '"lr": 3e-05' in saved.read_text()
    again.checkpoint_path = cfg.checkpoint_path  # a new run gets a new folder
    assert again == cfg


@pytest.mark.parametrize(
    ("logger", "logs"),
    [
        ("", False),
        ("logger: {log_to_wandb: true}", True),
        ("logger: {wandb_project: mine}", True),
    ],
)
def test_nothing_is_logged_to_wandb_without_a_logger_section(
    config_path: Path, logger: str, logs: bool
):
    text = MINIMAL.replace("logger:\n  log_to_wandb: false\n", logger)
    assert text != MINIMAL
    config_path.write_text(text)
    assert load(config_path).logger.log_to_wandb is logs


def test_overrides_replace_values_at_any_depth(config_path: Path):
    cfg = load(
        config_path,
        "sae.k=1.5",
        "lr=1e-3",
        "logger.run_name=a b",
        "model_kwargs.start_at_layer=2",
        "output_path=null",
        "exclude_special_tokens=[0, 5]",
    )
    assert cfg.sae.k == 1.5
    assert cfg.lr == 1e-3
    assert cfg.logger.run_name == "a b"
    assert cfg.model_kwargs == {"start_at_layer": 2}
    assert cfg.output_path is None
    assert cfg.exclude_special_tokens == [0, 5]


def test_later_override_wins(config_path: Path):
    assert load(config_path, "sae.k=3", "sae.k=4").sae.k == 4


def test_error_names_the_file_and_the_overrides(config_path: Path):
    with pytest.raises(ValueError) as error:
        load(config_path, "lr=1e-3", "sae.kk=3")
    assert str(error.value) == (
        f"{config_path} with lr=1e-3, sae.kk=3: "
        "unknown key 'sae.kk', did you mean 'sae.k'?"
    )


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("lr", "the override 'lr' does not look like key=value."),
        ("=3", "the override '=3' does not look like key=value."),
        (
            "lr.x=3",
            "the override 'lr.x=3' needs 'lr' to be a mapping, but it is 1.",
        ),
        (
            "lr=[1",
            "not valid YAML at line 1: expected ',' or ']', but got '<stream end>'.",
        ),
    ],
)
def test_bad_override_is_one_sentence(config_path: Path, override: str, sentence: str):
    config_path.write_text(MINIMAL + "lr: 1\n")
    assert error_of(config_path, override) == sentence


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3e-4", 3e-4),
        ("3E-4", 3e-4),
        ("1.5e3", 1500.0),
        (".5e-1", 0.05),
        ("2.e-1", 0.2),
        ("3.0e-4", 3e-4),
        ("0.001", 0.001),
        ("1", 1),
    ],
)
def test_scientific_notation_is_a_number_in_the_file_too(
    config_path: Path, text: str, expected: float
):
    config_path.write_text(f"{MINIMAL}lr: {text}\n")
    assert load(config_path).lr == expected


def test_whole_floats_are_integers(config_path: Path):
    cfg = load(config_path, "training_tokens=1e6")
    assert cfg.training_tokens == 1_000_000
    assert isinstance(cfg.training_tokens, int)


def test_quoted_number_stays_a_string(config_path: Path):
    assert load(config_path, "logger.run_name='1e5'").logger.run_name == "1e5"
