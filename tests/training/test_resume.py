"""A run that is interrupted and resumed from a checkpoint continues as if nothing had been."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import LanguageModelSAETrainingRunner
from sae_lens.config import LoggingConfig
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.sae_trainer import SAETrainer
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedTransformer import HookedRootModule

from sae_lens_alloc import (
    AllocSAETrainer,
    AllocSAETrainingRunner,
    MutualChoiceTrainingSAEConfig,
)
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
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
    with pytest.raises(StopIteration):
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
    # flags must go on with the step that comes next all the same.
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


@pytest.mark.usefixtures("restore_signals")
def test_terminated_run_leaves_a_checkpoint_that_can_be_resumed(
    demo_model: HookedRootModule, demo_text: Dataset, tmp_path: Path
):
    cfg = lm_config(
        MutualChoiceTrainingSAEConfig(d_in=D_MODEL, d_sae=256, k=8),
        checkpoint_path=str(tmp_path),
        logger=LoggingConfig(log_to_wandb=False, wandb_id="run"),
    )
    interrupted = AllocSAETrainingRunner(cfg, demo_text, demo_model)
    n_calls = 0

    def terminate_in_step_3(tensor: torch.Tensor, hook: HookPoint) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    interrupted.sae.hook_sae_recons.add_hook(terminate_in_step_3)
    with pytest.raises(InterruptedException):
        interrupted.run()
    (checkpoint,) = (tmp_path / "run").iterdir()

    cfg = lm_config(
        MutualChoiceTrainingSAEConfig(d_in=D_MODEL, d_sae=256, k=8),
        resume_from_checkpoint=str(checkpoint),
        training_tokens=int(checkpoint.name) + 2 * 256,
    )
    resumed = LanguageModelSAETrainingRunner(cfg, demo_text, demo_model)
    before = state_of(resumed.sae)
    resumed.run()
    assert {"W_enc", "W_dec", "allocation.cut"} <= changed(before, resumed.sae)
    # two more batches; the one that was interrupted counts as seen
    assert statistics(resumed.sae).density_tokens.item() == cfg.training_tokens
