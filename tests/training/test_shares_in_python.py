"""Shares of the training and of k in Python's configs, as in YAML."""

from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_alloc import (
    AllocSAERunnerConfig,
    AllocSAETrainer,
    AllocSAETrainerConfig,
    AllocSAETrainingRunner,
    FeatureChoiceTrainingSAEConfig,
    MutualChoiceTrainingSAEConfig,
)
from sae_lens_alloc.config.run_file import build_training_config, sae_config_class
from sae_lens_alloc.shares import sae_with_step_counts, steps_of
from tests.saes.conftest import tokens
from tests.training.conftest import D_MODEL, lm_config, make_trainer

SIZE: dict[str, Any] = {"d_in": 8, "d_sae": 32}
SAE_SHARES: dict[str, Any] = {
    "k_start": "200%",
    "k_decay_steps": "50%",
    "aux_loss_decay_start": "33.4%",
}
RUN_SHARES: dict[str, Any] = {
    "lr_warm_up_steps": "10%",
    "lr_decay_steps": "20%",
    "dead_feature_window": "100%",
}


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("mutual_choice", {"k": 3, "feature_choice_steps": "25%", **SAE_SHARES}),
        ("feature_choice", {"k": 3, "mutual_choice_steps": "75%", **SAE_SHARES}),
        ("batchtopk_aux_zipf", {"k": 3, "aux_loss_decay_start": "80%"}),
        ("standard_aux_zipf", {"l1_warm_up_steps": "5%"}),
        ("jumprelu", {"l0_warm_up_steps": "5%"}),
    ],
)
# 15.5 steps, and 15
@pytest.mark.parametrize("training_tokens", [4_650, 4_500])
def test_python_means_what_yaml_means(
    architecture: str, fields: dict[str, Any], training_tokens: int
):
    lengths = {
        "training_tokens": training_tokens,
        "train_batch_size_tokens": 300,
    }
    yaml = build_training_config(
        {
            **lengths,
            **RUN_SHARES,
            "sae": {"architecture": architecture, **SIZE, **fields},
        }
    )
    sae = sae_config_class(architecture)(**SIZE, **fields)
    cfg: Any = AllocSAERunnerConfig(sae=sae, verbose=True, **lengths, **RUN_SHARES)
    settled = sae_with_step_counts(sae, steps_of(training_tokens, 300))
    assert settled.to_dict() == yaml.sae.to_dict()
    for name in RUN_SHARES:
        assert getattr(cfg, name) == getattr(yaml, name)
        assert type(getattr(cfg, name)) is int


def test_steps_are_not_rounded_before_the_share_is_taken():
    # 1.9 steps: nine tenths are 1.71
    cfg = FeatureChoiceTrainingSAEConfig(**SIZE, k=3, mutual_choice_steps="90%")  # type: ignore[arg-type]
    assert sae_with_step_counts(cfg, steps_of(19, 10)).mutual_choice_steps == 1
    assert sae_with_step_counts(cfg, steps_of(19.0, 10)).mutual_choice_steps == 1
    assert cfg.mutual_choice_steps == "90%"  # left as it is


@pytest.mark.parametrize("name", ["feature_choice_steps", "k_decay_steps"])
@pytest.mark.parametrize("text", ["25", "101%", "-1%", "a quarter"])
def test_a_bad_share_is_refused_when_the_config_is_made(name: str, text: str):
    with pytest.raises(ValueError) as error:
        MutualChoiceTrainingSAEConfig(**SIZE, k=3, **{name: text})  # type: ignore[arg-type]
    assert str(error.value) == (
        f"{name} must be a number of steps or a share of them from '0%' to '100%', got {text!r}."
    )


def test_the_trainer_knows_how_long_the_training_is():
    cfg: Any = AllocSAETrainerConfig(
        total_training_samples=640,
        train_batch_size_samples=64,
        lr_end=1e-4,
        **RUN_SHARES,
    )
    assert (cfg.lr_warm_up_steps, cfg.lr_decay_steps, cfg.dead_feature_window) == (
        *(1, 2, 10),
    )
    sae = TrainingSAE.from_dict(
        {
            "architecture": "mutual_choice",
            **SIZE,
            "k": 3,
            "feature_choice_steps": "50%",
        }
    )
    trainer = AllocSAETrainer(cfg, sae, iter([tokens(64, 8, seed=0)] * 10))
    assert trainer.sae.cfg.feature_choice_steps == 5
    assert trainer.fit().cfg.feature_choice_steps == 5


@pytest.mark.parametrize("architecture", ["mutual_choice", "batchtopk_aux_zipf"])
def test_sae_lens_own_trainer_is_refused_in_one_sentence(architecture: str):
    sae = TrainingSAE.from_dict(
        {
            "architecture": architecture,
            **SIZE,
            "k": 3,
            "aux_loss_decay_start": "80%",
        }
    )
    with pytest.raises(ValueError) as error:
        make_trainer(sae, [torch.zeros(64, 8)], 10, SAETrainer)
    assert str(error.value) == (
        "aux_loss_decay_start is '80%', a share of the training, whose length SAELens' own "
        "trainers do not tell an SAE: give a number of steps, or train with "
        "AllocSAETrainingRunner or AllocSAETrainer."
    )


@pytest.mark.usefixtures("restore_signals", "few_calibration_tokens")
def test_the_runner_takes_shares_in_sae_lens_own_config_too(
    tmp_path: Path, demo_model: Any, demo_text: Any
):
    sae = MutualChoiceTrainingSAEConfig(
        d_in=D_MODEL,
        d_sae=64,
        k=4,
        feature_choice_steps="25%",  # type: ignore[arg-type]
    )
    cfg = lm_config(sae, output_path=str(tmp_path / "sae"))
    cfg.lr_warm_up_steps = "50%"  # type: ignore[assignment]
    runner = AllocSAETrainingRunner(
        cfg, override_model=demo_model, override_dataset=demo_text
    )
    assert runner.run().cfg.feature_choice_steps == 2  # of 8
    assert runner.cfg.lr_warm_up_steps == 4
    assert cfg.sae.feature_choice_steps == "25%"  # the config given is left as it is


def test_type_checkers_take_shares_and_read_numbers():
    """pyright reads this file, too. SAELens' command line makes integers of the same fields."""
    sae = MutualChoiceTrainingSAEConfig(
        d_in=8,
        d_sae=32,
        k=4,
        k_start="200%",
        k_decay_steps="50%",
        feature_choice_steps="25%",
        aux_loss_decay_start="75%",
    )
    cfg = AllocSAERunnerConfig(
        sae=sae,
        training_tokens=1000,
        train_batch_size_tokens=10,
        lr_warm_up_steps="5%",
        lr_decay_steps=20,
        dead_feature_window="50%",
    )
    steps: int = cfg.lr_warm_up_steps + cfg.lr_decay_steps + cfg.dead_feature_window
    assert steps == 5 + 20 + 50
    start: float | None = sae.k_start
    assert start == 8
    FeatureChoiceTrainingSAEConfig(d_in=8, d_sae=32, k=4, mutual_choice_steps="25%")
    hints = get_type_hints(MutualChoiceTrainingSAEConfig)
    assert hints["feature_choice_steps"] == hints["aux_loss_decay_start"] == int | None
    assert hints["k_start"] == float | None and hints["k_decay_steps"] is int
    ours, stock = (
        {field.name: (field.type, field.default) for field in fields(config)}
        for config in (AllocSAERunnerConfig, LanguageModelSAERunnerConfig)
    )
    assert {name: ours[name] for name in stock} == stock
