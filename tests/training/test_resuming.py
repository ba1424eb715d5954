"""A resumed run is the run that its checkpoint is of, but for what may change on the way."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens.config import LoggingConfig
from transformer_lens.HookedTransformer import HookedRootModule

from sae_lens_alloc import AllocSAETrainingRunner, MutualChoiceTrainingSAEConfig
from sae_lens_alloc.shares import SHARE_KEYS
from sae_lens_alloc.training.checkpoint import partial_path, publish_checkpoint
from sae_lens_alloc.training.resuming import (
    FREE_KEYS,
    FREE_SAE_KEYS,
    settle_resumed_run,
)
from tests.training.conftest import D_MODEL, lm_config

SAE = MutualChoiceTrainingSAEConfig(
    d_in=D_MODEL, d_sae=64, k=4, feature_choice_steps=2, aux_loss_decay_start=6
)
SETTINGS = lm_config(SAE).to_dict()


def save_checkpoint(folder: Path, cfg: dict[str, Any], sae: dict[str, Any]) -> None:
    partial = partial_path(folder / "512")
    partial.mkdir()
    (partial / "runner_cfg.json").write_text(json.dumps(cfg))
    (partial / "cfg.json").write_text(json.dumps(sae))
    publish_checkpoint(folder / "512", 512)


@pytest.mark.parametrize("key", [key for key in SETTINGS if key != "sae"])
def test_every_other_setting_is_refused_by_name_with_both_values(
    key: str, tmp_path: Path
):
    other = {**SETTINGS, key: "another"}
    save_checkpoint(tmp_path, other, SAE.to_dict())
    cfg = lm_config(SAE, resume_from_checkpoint=str(tmp_path))
    if key in FREE_KEYS:
        settle_resumed_run(cfg)
        assert cfg.resume_from_checkpoint == str(tmp_path / "512")
        return
    with pytest.raises(ValueError, match=f"its run has {key} 'another', but this run"):
        settle_resumed_run(cfg)


@pytest.mark.parametrize("key", SAE.to_dict())
def test_every_other_setting_of_the_sae_is_refused(key: str, tmp_path: Path):
    save_checkpoint(tmp_path, SETTINGS, {**SAE.to_dict(), key: "another"})
    cfg = lm_config(SAE, resume_from_checkpoint=str(tmp_path))
    if key in FREE_SAE_KEYS:
        settle_resumed_run(cfg)
        return
    with pytest.raises(ValueError, match=f"its run has sae.{key} 'another'"):
        settle_resumed_run(cfg)


def test_the_same_text_by_another_path_is_the_same(tmp_path: Path):
    (tmp_path / "link").symlink_to(SETTINGS["dataset_path"])
    other = {**SETTINGS, "dataset_path": str(tmp_path / "link")}
    save_checkpoint(tmp_path, other, SAE.to_dict())
    settle_resumed_run(lm_config(SAE, resume_from_checkpoint=str(tmp_path)))


def test_a_longer_training_keeps_the_schedule_of_its_sae(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    save_checkpoint(tmp_path, SETTINGS, SAE.to_dict())
    longer = replace(SAE, feature_choice_steps=4, k_start=8, k_decay_steps=4)
    settings = {"training_tokens": 4096, "resume_from_checkpoint": str(tmp_path)}
    cfg = lm_config(longer, **settings)
    settle_resumed_run(cfg)
    assert cfg.sae == SAE
    assert "keeps the schedule" in caplog.text
    assert "sae.feature_choice_steps 2 instead of 4" in caplog.text
    with pytest.raises(ValueError, match="sae.k 4"):
        settle_resumed_run(lm_config(replace(longer, k=5), **settings))


def runner(
    folder: Path, model: HookedRootModule, text: Dataset, **overrides: Any
) -> AllocSAETrainingRunner:
    settings: dict[str, Any] = {
        "output_path": str(folder / "sae"),
        "checkpoint_path": str(folder / "checkpoints"),
        "n_checkpoints": 1,
        "logger": LoggingConfig(
            log_to_wandb=False, wandb_id="run", wandb_log_frequency=1
        ),
        **overrides,
    }
    return AllocSAETrainingRunner(lm_config(SAE, **settings), text, model)


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "sae" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def rates(folder: Path) -> list[float]:
    return [row["details/current_learning_rate"] for row in metrics(folder)]


@pytest.fixture
def stopped(
    tmp_path: Path, demo_model: HookedRootModule, demo_text: Dataset
) -> tuple[Path, Path]:
    """The folder of a run of 8 steps that decayed from the 5th on, and its 6th checkpoint."""
    runner(
        tmp_path / "a", demo_model, demo_text, lr_decay_steps=4, n_checkpoints=7
    ).run()
    return tmp_path / "a", tmp_path / "a" / "checkpoints" / "run" / str(6 * 256)


@pytest.mark.usefixtures("few_calibration_tokens")
@pytest.mark.parametrize(
    "changed",
    [
        {"training_tokens": 16 * 256, "lr_decay_steps": 8},
        {"lr": 2e-3, "lr_decay_steps": 4},
        {},  # the decay left out
        {"lr_warm_up_steps": 2, "lr_decay_steps": 4},
        {"lr_scheduler_name": "cosineannealing", "lr_end": 1e-5},
    ],
    ids=str,
)
def test_the_learning_rate_is_that_of_the_new_schedule_from_there_on(
    changed: dict[str, Any],
    stopped: tuple[Path, Path],
    tmp_path: Path,
    demo_model: HookedRootModule,
    demo_text: Dataset,
):
    _, checkpoint = stopped
    resumed = runner(
        tmp_path / "b",
        demo_model,
        demo_text,
        checkpoint_path=None,
        n_checkpoints=0,
        resume_from_checkpoint=str(checkpoint),
        **changed,
    )
    resumed.run()
    runner(tmp_path / "c", demo_model, demo_text, n_checkpoints=0, **changed).run()
    expected = rates(tmp_path / "c")
    assert rates(tmp_path / "b") == expected[6:]
    assert min(expected[:-1]) > 0  # the row tells the rate of the next step
    recorded = json.loads((tmp_path / "b" / "sae" / "runner_cfg.json").read_text())
    assert recorded["resume_from_checkpoint"] == str(checkpoint)
    assert {key: recorded[key] for key in changed} == changed


@pytest.mark.usefixtures("few_calibration_tokens")
def test_what_is_held_out_of_a_longer_training_is_what_was(
    tmp_path: Path, demo_model: HookedRootModule, demo_text: Dataset
):
    first = runner(tmp_path, demo_model, demo_text)
    first.run()
    resumed = runner(
        tmp_path,
        demo_model,
        demo_text,
        training_tokens=200_000,
        resume_from_checkpoint=str(tmp_path / "checkpoints" / "run"),
    )
    assert torch.equal(resumed.held_out, first.held_out)
    anew = runner(tmp_path / "anew", demo_model, demo_text, training_tokens=200_000)
    assert len(anew.held_out) > 2 * len(first.held_out)


@pytest.mark.usefixtures("few_calibration_tokens")
def test_metrics_of_another_run_are_not_mixed_in(
    stopped: tuple[Path, Path],
    tmp_path: Path,
    demo_model: HookedRootModule,
    demo_text: Dataset,
):
    folder, checkpoint = stopped
    own = metrics(folder)
    other = tmp_path / "other" / "sae"
    other.mkdir(parents=True)
    theirs = b'{"step": 0, "theirs": 1}\n'
    (other / "metrics.jsonl").write_bytes(theirs)

    def resumed(output: Path, **overrides: Any) -> AllocSAETrainingRunner:
        return runner(
            output,
            demo_model,
            demo_text,
            lr_decay_steps=4,
            n_checkpoints=7,
            checkpoint_path=str(folder / "checkpoints"),
            resume_from_checkpoint=str(checkpoint),
            **overrides,
        )

    with pytest.raises(ValueError, match="metrics.jsonl' is of another run"):
        resumed(tmp_path / "other")
    assert (other / "metrics.jsonl").read_bytes() == theirs
    # in its own folder it goes on with its own
    resumed(folder).run()
    assert metrics(folder) == own


def test_shares_of_the_training_may_change_with_its_length(tmp_path: Path):
    """All settings that a file may give as a share of the steps."""
    for number, key in enumerate(SHARE_KEYS):
        folder = tmp_path / str(number)
        folder.mkdir()
        sae: dict[str, Any] = SAE.to_dict()
        cfg = {**SETTINGS, "training_tokens": 512}
        section = sae if key.startswith("sae.") else cfg
        section[key.removeprefix("sae.")] = 1
        if key == "sae.topk_steps":  # excludes these
            sae.update(feature_choice_steps=0, k_start=None, k_decay_steps=0)
        save_checkpoint(folder, cfg, sae)
        settle_resumed_run(lm_config(SAE, resume_from_checkpoint=str(folder)))
