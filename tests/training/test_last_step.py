"""After the last step: the SAE is saved first, and what fails later is a warning."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from datasets import Dataset
from sae_lens import SAE, LanguageModelSAETrainingRunner
from sae_lens.config import LoggingConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from transformer_lens.HookedTransformer import HookedRootModule

from sae_lens_alloc import AllocSAETrainingRunner, MutualChoiceTrainingSAE
from sae_lens_alloc.compat import InterruptedException
from sae_lens_alloc.training import (
    after_training,
    checkpointing_trainer,
    final_sae,
    trainer,
)
from tests.training.test_output_folder import file_size_limit
from tests.training.test_run_folders import config

pytestmark = pytest.mark.usefixtures("few_calibration_tokens", "restore_signals")


class Runner(AllocSAETrainingRunner):
    """One whose activations for the calibration are changed, after `before_calibration`."""

    before_calibration: Callable[[], object] = staticmethod(lambda: None)
    change: Callable[[torch.Tensor], torch.Tensor] = staticmethod(lambda x: x)

    def _calibration_activations(self, trainer: SAETrainer[Any, Any]) -> torch.Tensor:
        self.before_calibration()
        return self.change(super()._calibration_activations(trainer))


@pytest.fixture
def start(
    demo_model: HookedRootModule, demo_text: Dataset, tmp_path: Path
) -> Callable[..., Runner]:
    def start(**overrides: Any) -> Runner:
        settings = {"checkpoint_path": None, **overrides}
        return Runner(config(tmp_path, **settings), demo_text, demo_model)

    return start


def nan_in_one_token(x: torch.Tensor) -> torch.Tensor:
    x[3, 5] = torch.nan
    return x


@torch.no_grad()
def kill_all_features(sae: TrainingSAE[Any]) -> None:
    bias: Any = sae.b_enc
    bias.fill_(-1e6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (nan_in_one_token, "activations contain NaN or Inf"),
        (None, "no thresholds give an L0 of 8"),  # the features have died
    ],
)
def test_calibration_that_fails_leaves_the_sae_of_training(
    change: Callable[[torch.Tensor], torch.Tensor] | None,
    reason: str,
    start: Callable[..., Runner],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    runner = start()
    if change is None:
        runner.before_calibration = lambda: kill_all_features(runner.sae)
    else:
        runner.change = change
    sae = runner.run()
    assert isinstance(sae, MutualChoiceTrainingSAE)
    (warning,) = [
        r.getMessage() for r in caplog.records if "calibrat" in r.getMessage()
    ]
    output = tmp_path / "sae"
    assert f"the SAE is saved in '{output}'" in warning
    assert f"`sae-lens-alloc calibrate {output} --l0 8 --output NEW`" in warning
    assert reason in warning
    saved = SAE.load_from_disk(output)
    assert saved.cfg.metadata.calibration is None
    assert saved.cfg.metadata.held_out["n_tokens"] == len(runner.held_out)
    x = runner.held_out
    torch.testing.assert_close(saved.encode(x), sae.encode(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_calibration_leaves_the_sae_of_training(
    number: int, start: Callable[..., Runner], tmp_path: Path
):
    runner = start()
    runner.before_calibration = lambda: os.kill(os.getpid(), number)
    handler = signal.getsignal(number)
    with pytest.raises(
        InterruptedException, match="saved in .* `sae-lens-alloc calibr"
    ):
        runner.run()
    assert signal.getsignal(number) is handler
    saved = SAE.load_from_disk(tmp_path / "sae")
    assert saved.cfg.metadata.calibration is None
    assert saved.cfg.metadata.provenance["seed"] == runner.cfg.seed
    assert len((tmp_path / "sae" / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_signal_while_the_sae_is_saved_waits_for_it(
    start: Callable[..., Runner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_sae = final_sae.write_sae

    def interrupted(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write_sae(*args)

    monkeypatch.setattr(final_sae, "write_sae", interrupted)
    with pytest.raises(InterruptedException, match="the SAE is saved in"):
        start().run()
    assert SAE.load_from_disk(tmp_path / "sae").cfg.metadata.calibration is None


def test_a_run_that_was_stopped_in_its_calibration_is_resumed(
    start: Callable[..., Runner], tmp_path: Path
):
    checkpoints = tmp_path / "checkpoints"
    settings = {"checkpoint_path": str(checkpoints), "n_checkpoints": 1}
    stopped = start(**settings)
    stopped.before_calibration = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(InterruptedException):
        stopped.run()
    tracked = SAE.load_from_disk(tmp_path / "sae")
    start(**settings, resume_from_checkpoint=str(checkpoints / "run")).run()
    saved = SAE.load_from_disk(tmp_path / "sae")
    assert torch.equal(saved.W_dec, tracked.W_dec)
    assert saved.cfg.metadata.calibration["target_l0"] == 8
    rows = (tmp_path / "sae" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 3, 5, 7]


def test_an_output_that_is_full_at_the_end_does_not_lose_the_sae(
    start: Callable[..., Runner],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """The output becomes a file after the start; the system's temporary folder has room."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    runner = start()
    write_sae = final_sae.write_sae

    def limited(sae: Any, cfg: Any, output: Path, *rest: Any) -> None:
        with file_size_limit(10_000 if output == tmp_path / "sae" else 10**9):
            write_sae(sae, cfg, output, *rest)

    monkeypatch.setattr(final_sae, "write_sae", limited)
    with pytest.raises(
        OSError, match="cannot be written to .*; it is saved in"
    ) as error:
        runner.run()
    (elsewhere,) = tmp_path.glob("sae-lens-alloc-*")
    assert str(elsewhere) in str(error.value)
    saved, x = SAE.load_from_disk(elsewhere), runner.held_out
    expected = runner.sae.eval().encode(x)
    torch.testing.assert_close(saved.encode(x), expected, rtol=1e-4, atol=1e-3)
    assert {path.name for path in (tmp_path / "sae").iterdir()} == {"metrics.jsonl"}


def test_a_second_save_that_fails_leaves_the_first(
    start: Callable[..., Runner],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    write_sae = after_training.write_sae

    def limited(*args: Any) -> None:
        with file_size_limit(10_000):
            write_sae(*args)

    monkeypatch.setattr(after_training, "write_sae", limited)
    start().run()
    assert "with the thresholds of training" in caplog.text
    assert "it was not saved again: the SAE cannot be written to" in caplog.text
    assert SAE.load_from_disk(tmp_path / "sae").cfg.metadata.calibration is None


def test_checkpoints_and_metrics_that_cannot_be_written_are_warnings(
    start: Callable[..., Runner],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    append_row = trainer.append_row

    def limited_row(*args: Any) -> None:
        with file_size_limit(3000):
            append_row(*args)

    publish = checkpointing_trainer.publish_checkpoint

    def limited_checkpoint(*args: Any) -> None:
        with file_size_limit(100):
            publish(*args)

    monkeypatch.setattr(trainer, "append_row", limited_row)
    monkeypatch.setattr(checkpointing_trainer, "publish_checkpoint", limited_checkpoint)
    start(
        checkpoint_path=str(tmp_path / "checkpoints"),
        n_checkpoints=1,
        save_final_checkpoint=True,
    ).run()
    assert "metrics of step 7 cannot be written" in caplog.text
    assert "the checkpoint 1280 cannot be written to" in caplog.text
    assert "The final checkpoint is missing: the checkpoint final_2048" in caplog.text
    # nothing half-written is left
    assert not (tmp_path / "checkpoints").exists()
    rows = (tmp_path / "sae" / "metrics.jsonl").read_text()
    assert rows.endswith("\n") and len(rows) < 3000
    assert [json.loads(row)["step"] for row in rows.splitlines()][0] == 1
    assert SAE.load_from_disk(tmp_path / "sae").cfg.metadata.calibration is not None


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoggingConfig]:
    for name, value in (("MODE", "offline"), ("DIR", tmp_path), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    yield LoggingConfig(wandb_project="test", wandb_log_frequency=2)
    wandb.finish()
    wandb.teardown()  # forgets our folders


@pytest.mark.slow
def test_a_name_that_wandb_refuses_is_found_before_the_first_step(
    start: Callable[..., Runner], offline: LoggingConfig, tmp_path: Path
):
    runner = start(logger=offline, model_name="my models/gpt")
    with pytest.raises(ValueError, match="refuses that name .*logger.log_to_wandb=f"):
        runner.run()
    assert not (tmp_path / "sae").exists()


def test_an_upload_that_fails_leaves_the_sae(
    start: Callable[..., Runner],
    offline: LoggingConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    def refuse(*_: Any, **__: Any) -> None:
        raise wandb.Error("no such project")

    monkeypatch.setattr(LoggingConfig, "log", refuse)
    start(logger=offline, model_name="gpt").run()
    assert "it was not uploaded to W&B: no such project" in caplog.text
    assert SAE.load_from_disk(tmp_path / "sae").cfg.metadata.calibration is not None


def test_an_sae_that_was_not_run_can_be_saved(
    start: Callable[..., Runner], tmp_path: Path
):
    runner = start()
    runner.save_final_sae(runner.sae, str(tmp_path / "other"))
    saved = SAE.load_from_disk(tmp_path / "other")
    assert saved.cfg.metadata.held_out["n_tokens"] == len(runner.held_out)


def test_the_files_are_those_that_sae_lens_writes(
    start: Callable[..., Runner],
    demo_model: HookedRootModule,
    demo_text: Dataset,
    tmp_path: Path,
):
    runner = start()
    runner.run()
    stock = config(tmp_path / "stock", checkpoint_path=None)
    LanguageModelSAETrainingRunner(stock, demo_text, demo_model).run()
    ours, theirs = (
        {path.name for path in folder.iterdir()}
        for folder in (tmp_path / "sae", tmp_path / "stock" / "sae")
    )
    assert ours == theirs | {"metrics.jsonl"}


def test_a_finished_sae_is_not_lost_to_a_second_run(
    start: Callable[..., Runner], tmp_path: Path
):
    runner = start()
    runner.run()
    before = (tmp_path / "sae" / "sae_weights.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already holds an SAE"):
        start(seed=1)
    with pytest.raises(ValueError, match="already holds an SAE"):
        runner.run()
    assert (tmp_path / "sae" / "sae_weights.safetensors").read_bytes() == before
