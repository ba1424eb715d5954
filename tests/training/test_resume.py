"""A run that is interrupted and resumed from a checkpoint continues as if nothing had been."""

import os
import pickle
import signal
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import LanguageModelSAETrainingRunner
from sae_lens.config import LoggingConfig
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedTransformer import HookedRootModule

from sae_lens_alloc import (
    AllocSAETrainer,
    AllocSAETrainingRunner,
    MutualChoiceTrainingSAEConfig,
)
from sae_lens_alloc.compat import InterruptedException
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.training.checkpoint import MANIFEST_FILENAME
from sae_lens_alloc.training.trainer import DataEndedError
from tests.saes.conftest import changed, make_sae, state_of, statistics, tokens
from tests.training.conftest import D_MODEL, lm_config, make_trainer

# name: architecture and schedule, with changes near the steps 12 and 13
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "mutual": ("mutual_choice", {}),
    "feature to mutual": ("mutual_choice", {"feature_choice_steps": 13}),
    "feature": ("feature_choice", {}),
    "mutual to feature": ("feature_choice", {"mutual_choice_steps": 13}),
    "everything changes": (
        "mutual_choice",
        {
            "feature_choice_steps": 12,
            "aux_loss_decay_start": 13,
            "k_start": 6,
            "k_decay_steps": 17,
        },
    ),
}
N_STEPS = 24


def new_sae(run: str, seed: int = 0) -> AllocationTrainingSAE[Any]:
    architecture, schedule = RUNS[run]
    return make_sae(
        architecture,
        seed=seed,
        d_sae=96,
        aux_loss="aux_zipf",
        density_window_tokens=500,
        **schedule,
    )


def batches() -> list[torch.Tensor]:
    return [tokens(64, 8, seed=step) for step in range(N_STEPS)]


def optimizer_state(trainer: SAETrainer[Any, Any]) -> dict[str, torch.Tensor]:
    """Moments and step counts of every parameter, by the parameter's name."""
    names = {id(value): name for name, value in trainer.sae.named_parameters()}
    return {
        f"{names[id(parameter)]}.{key}": torch.as_tensor(value).clone()
        for parameter, state in trainer.optimizer.state.items()
        for key, value in state.items()
    }


def assert_same_end(
    resumed: SAETrainer[Any, Any], uninterrupted: SAETrainer[Any, Any]
) -> None:
    assert resumed.n_training_samples == uninterrupted.n_training_samples
    assert changed(state_of(uninterrupted.sae), resumed.sae) == set()
    ours, theirs = optimizer_state(resumed), optimizer_state(uninterrupted)
    assert ours.keys() == theirs.keys() and len(ours) == 4 * 3
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    for name in ("act_freq_scores", "n_forward_passes_since_fired"):
        assert torch.equal(getattr(resumed, name), getattr(uninterrupted, name)), name


@pytest.mark.parametrize(
    ("run", "n_first", "trainer_class"),
    [
        *[(run, n_first, SAETrainer) for run in RUNS for n_first in (5, 12, 14)],
        ("everything changes", 5, AllocSAETrainer),
    ],
)
def test_resumed_run_is_bit_identical(
    run: str,
    n_first: int,
    trainer_class: type[SAETrainer[Any, Any]],
    tmp_path: Path,
):
    uninterrupted = make_trainer(new_sae(run), batches(), N_STEPS, trainer_class)
    uninterrupted.fit()
    assert statistics(uninterrupted.sae).density_tokens.item() == N_STEPS * 64

    # the data ends after n_first steps, and the run with it
    first = make_trainer(new_sae(run), batches()[:n_first], N_STEPS, trainer_class)
    stopped = StopIteration if trainer_class is SAETrainer else DataEndedError
    with pytest.raises(stopped):
        first.fit()
    first.save_checkpoint("here", base_path=tmp_path)

    resumed = make_trainer(
        new_sae(run, seed=77),
        batches()[n_first:],
        N_STEPS,
        trainer_class,
    )
    resumed.load_trainer_state(tmp_path / "here")
    resumed.sae.load_weights_from_checkpoint(tmp_path / "here")
    assert resumed.n_training_steps == n_first
    resumed.fit()
    assert_same_end(resumed, uninterrupted)


@pytest.mark.parametrize(
    ("run", "trainer_class"),
    [*[(run, SAETrainer) for run in RUNS], ("everything changes", AllocSAETrainer)],
)
def test_run_resumed_from_a_checkpoint_that_sae_lens_saved_on_the_way_is_bit_identical(
    run: str,
    trainer_class: type[SAETrainer[Any, Any]],
    tmp_path: Path,
):
    # SAELens saves before it counts the step: after 13 of 24 steps its checkpoint says
    # n_training_steps = 12, and the resumed run counts one step behind. Rules, budgets and
    # flags must go on with the step that comes next all the same. Our trainer counts right.
    uninterrupted = make_trainer(
        new_sae(run),
        batches(),
        N_STEPS,
        trainer_class,
        n_checkpoints=1,
        checkpoint_path=str(tmp_path),
    )
    uninterrupted.fit()
    (checkpoint,) = tmp_path.iterdir()
    n_first = int(checkpoint.name) // 64
    assert n_first == 13

    resumed = make_trainer(
        new_sae(run, seed=77),
        batches()[n_first:],
        N_STEPS,
        trainer_class,
    )
    resumed.load_trainer_state(checkpoint)
    assert resumed.n_training_steps == (12 if trainer_class is SAETrainer else 13)
    resumed.sae.load_weights_from_checkpoint(checkpoint)
    resumed.fit()
    assert_same_end(resumed, uninterrupted)


def runner(
    demo_model: HookedRootModule, demo_text: Dataset, **overrides: Any
) -> LanguageModelSAETrainingRunner:
    cfg = lm_config(
        MutualChoiceTrainingSAEConfig(
            d_in=D_MODEL, d_sae=256, k=8, feature_choice_steps=5
        ),
        **overrides,
    )
    return LanguageModelSAETrainingRunner(cfg, demo_text, demo_model)


@pytest.mark.usefixtures("restore_signals")
def test_language_model_run_resumes_from_its_checkpoint(
    demo_model: HookedRootModule, demo_text: Dataset, tmp_path: Path
):
    torch.manual_seed(0)
    runner(
        demo_model,
        demo_text,
        n_checkpoints=1,
        checkpoint_path=str(tmp_path),
        logger=LoggingConfig(log_to_wandb=False, wandb_id="run"),
    ).run()
    (checkpoint,) = (tmp_path / "run").iterdir()
    n_seen = int(checkpoint.name)
    assert 0 < n_seen < 8 * 256

    # with nothing left to train, the SAE is the checkpoint's, bit for bit
    stopped = runner(
        demo_model,
        demo_text,
        training_tokens=n_seen,
        resume_from_checkpoint=str(checkpoint),
    )
    saved = make_like(stopped.sae)
    saved.load_weights_from_checkpoint(checkpoint)
    assert changed(state_of(saved), stopped.sae)
    stopped.run()
    assert changed(state_of(saved), stopped.sae) == set()
    # SAELens' store goes on behind the documents that it had read, most of which were
    # still in its buffer; it saves neither the buffer nor the random state
    n_read = stopped.activations_store.n_dataset_processed
    assert n_read > 0

    resumed = runner(demo_model, demo_text, resume_from_checkpoint=str(checkpoint))
    sae = resumed.run()
    assert statistics(sae).density_tokens.item() == 8 * 256
    assert resumed.activations_store.n_dataset_processed > n_read


def make_like(sae: Any) -> AllocationTrainingSAE[Any]:
    return type(sae)(sae.cfg)


OURS: dict[str, Any] = {
    "output_path": "sae",
    "n_checkpoints": 3,
    "checkpoint_path": "checkpoints",
    "logger": LoggingConfig(log_to_wandb=False, wandb_id="run", wandb_log_frequency=1),
}


def our_runner(
    folder: Path, demo_model: HookedRootModule, demo_text: Dataset, **overrides: Any
) -> AllocSAETrainingRunner:
    """Our runner, with checkpoints in folder/checkpoints/run and the result in folder/sae."""
    settings = {**OURS, **overrides}
    for key in ("output_path", "checkpoint_path"):
        settings[key] = str(folder / settings[key])
    sae = MutualChoiceTrainingSAEConfig(
        d_in=D_MODEL, d_sae=128, k=8, feature_choice_steps=5
    )
    return AllocSAETrainingRunner(lm_config(sae, **settings), demo_text, demo_model)


def send_in_step(runner: AllocSAETrainingRunner, step: int, *signals: int) -> None:
    """Sends signals to this process in the middle of a training step."""
    n_calls = 0

    def send(tensor: torch.Tensor, hook: HookPoint) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == step:
            for number in signals:
                os.kill(os.getpid(), number)

    runner.sae.hook_sae_recons.add_hook(send)


@pytest.mark.usefixtures("few_calibration_tokens")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_terminated_run_is_resumed_bit_for_bit(
    number: int, demo_model: HookedRootModule, demo_text: Dataset, tmp_path: Path
):
    our_runner(tmp_path / "whole", demo_model, demo_text).run()

    handler = signal.getsignal(number)
    terminated = our_runner(tmp_path / "stopped", demo_model, demo_text)
    send_in_step(terminated, 4, number)
    with pytest.raises(InterruptedException):
        terminated.run()
    assert signal.getsignal(number) is handler
    checkpoints = tmp_path / "stopped" / "checkpoints" / "run"
    # after 3 of 8 steps by n_checkpoints, and after the 4th, which was finished
    assert {path.name for path in checkpoints.iterdir()} == {"768", "1024"}

    resumed = our_runner(
        tmp_path / "stopped",
        demo_model,
        demo_text,
        resume_from_checkpoint=str(checkpoints),
    )
    resumed.run()
    for file in ("sae_weights.safetensors", "cfg.json", "metrics.jsonl"):
        expected, found = (
            tmp_path / run / "sae" / file for run in ("whole", "stopped")
        )
        assert found.read_bytes() == expected.read_bytes(), file
    # those that were passed before are not saved again
    whole = (tmp_path / "whole" / "checkpoints" / "run").iterdir()
    assert {path.name for path in checkpoints.iterdir()} == {
        *(path.name for path in whole),
        "1024",
    }


def test_second_signal_stops_at_once(
    demo_model: HookedRootModule, demo_text: Dataset, tmp_path: Path
):
    runner = our_runner(tmp_path, demo_model, demo_text, n_checkpoints=0)
    send_in_step(runner, 2, signal.SIGINT, signal.SIGINT)
    with pytest.raises(InterruptedException):
        runner.run()
    assert not (tmp_path / "checkpoints").exists()
    assert statistics(runner.sae).density_tokens.item() == 2 * 256  # never a third


@pytest.mark.usefixtures("few_calibration_tokens")
def test_resumed_prefetching_run_reads_on_where_the_checkpoint_was(
    demo_model: HookedRootModule,
    demo_text: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    in_order = {"prefetch_llm_batches": 2, "activations_mixing_fraction": 0.0}
    store = our_runner(tmp_path, demo_model, demo_text, **in_order).activations_store
    served = [batch.clone() for batch in islice(store, 16)]
    our_runner(tmp_path, demo_model, demo_text, **in_order).run()

    trained_on: list[torch.Tensor] = []
    step = AllocSAETrainer.step

    def recorded(
        trainer: AllocSAETrainer[Any, Any], batch: torch.Tensor
    ) -> TrainStepOutput:
        trained_on.append(batch.clone())
        return step(trainer, batch)

    monkeypatch.setattr(AllocSAETrainer, "step", recorded)
    sae = our_runner(
        tmp_path,
        demo_model,
        demo_text,
        resume_from_checkpoint=str(tmp_path / "checkpoints" / "run" / "768"),
        **in_order,
    ).run()
    assert statistics(sae).density_tokens.item() == 8 * 256
    assert len(trained_on) == 5
    place = next(
        i for i, batch in enumerate(served) if torch.equal(batch, trained_on[0])
    )
    assert 3 <= place <= 6  # three steps, and at most what was prefetched beyond
    for batch, expected in zip(trained_on, served[place:], strict=False):
        assert torch.equal(batch, expected)


@pytest.mark.usefixtures("few_calibration_tokens", "restore_signals")
def test_checkpoint_of_sae_lens_can_be_resumed_by_our_runner(
    demo_model: HookedRootModule,
    demo_text: Dataset,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    runner(
        demo_model,
        demo_text,
        n_checkpoints=1,
        checkpoint_path=str(tmp_path),
        logger=LoggingConfig(log_to_wandb=False, wandb_id="run"),
    ).run()
    cfg = lm_config(
        MutualChoiceTrainingSAEConfig(
            d_in=D_MODEL, d_sae=256, k=8, feature_choice_steps=5
        ),
        resume_from_checkpoint=str(tmp_path / "run"),
    )
    sae = AllocSAETrainingRunner(cfg, demo_text, demo_model).run()
    assert "was not saved by AllocSAETrainingRunner" in caplog.text
    assert statistics(sae).density_tokens.item() == 8 * 256


@pytest.mark.usefixtures("few_calibration_tokens", "restore_signals")
def test_our_checkpoint_can_be_resumed_by_sae_lens_runner(
    demo_model: HookedRootModule, demo_text: Dataset, tmp_path: Path
):
    ours = our_runner(tmp_path, demo_model, demo_text, n_checkpoints=1)
    ours.run()
    (checkpoint,) = (tmp_path / "checkpoints" / "run").iterdir()
    cfg = lm_config(ours.cfg.sae, resume_from_checkpoint=str(checkpoint))
    sae = LanguageModelSAETrainingRunner(cfg, demo_text, demo_model).run()
    assert statistics(sae).density_tokens.item() == 8 * 256


class Malicious:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("file", ["trainer_state.pt", "rng_state.pt"])
@pytest.mark.usefixtures("few_calibration_tokens")
def test_nothing_in_a_checkpoint_is_executed(
    file: str, demo_model: HookedRootModule, demo_text: Dataset, tmp_path: Path
):
    our_runner(tmp_path, demo_model, demo_text, n_checkpoints=1).run()
    (checkpoint,) = (tmp_path / "checkpoints" / "run").iterdir()
    torch.save(Malicious(tmp_path / "executed"), checkpoint / file)
    (checkpoint / MANIFEST_FILENAME).unlink()  # which would have found it damaged
    resumed = our_runner(
        tmp_path, demo_model, demo_text, resume_from_checkpoint=str(checkpoint)
    )
    with pytest.raises(pickle.UnpicklingError, match="(?i)weights.only"):
        resumed.run()
    assert not (tmp_path / "executed").exists()
