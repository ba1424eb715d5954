"""Checks of a run's config alone: what they let through works, and what fails is refused."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.topk_sae import TopKTrainingSAEConfig
from sae_lens.training.optim import get_lr_scheduler

from sae_lens_alloc import (
    AllocSAETrainingRunner,
    FeatureChoiceTrainingSAEConfig,
    MutualChoiceTrainingSAEConfig,
)
from sae_lens_alloc.allocation.mutual_choice import budget_for
from sae_lens_alloc.allocation.schedule import budget_per_token
from sae_lens_alloc.allocation.zipf import ZipfLaw, zipf_quotas
from sae_lens_alloc.config.run_checks import check_learning_rate, check_run
from tests.training.conftest import D_MODEL, lm_config

COSINE, RESTARTS = "cosineannealing", "cosineannealingwarmrestarts"


def rates(cfg: SAETrainerConfig) -> list[float]:
    """The learning rate of every step, as SAELens sets it."""
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=cfg.lr)
    assert cfg.lr_end is not None
    scheduler = get_lr_scheduler(
        cfg.lr_scheduler_name,
        optimizer,
        cfg.total_training_steps,
        cfg.lr,
        cfg.lr_warm_up_steps,
        cfg.lr_decay_steps,
        cfg.lr_end,
        cfg.n_restart_cycles,
    )
    found: list[float] = []
    for _ in range(cfg.total_training_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def schedules(name: str) -> list[SAETrainerConfig]:
    """All small ones, of 1 to 5 steps."""
    return [
        SAETrainerConfig(
            total_training_samples=steps,
            train_batch_size_samples=1,
            lr=1.0,
            lr_end=lr_end,
            lr_scheduler_name=name,
            lr_warm_up_steps=warm_up,
            lr_decay_steps=decay,
            n_restart_cycles=cycles,
        )
        for steps in (1, 2, 5)
        for warm_up, decay, lr_end, cycles in itertools.product(
            range(steps + 2), range(steps + 2), (-0.1, 0.0, 0.1, 1.0, 2.0), (1, 2, 6)
        )
    ]


def accepts(cfg: SAETrainerConfig) -> bool:
    try:
        check_learning_rate(cfg)
    except ValueError as error:
        assert "\n" not in str(error)
        return False
    return True


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["constant", "Constant", COSINE, RESTARTS])
def test_a_schedule_that_is_accepted_works_in_saelens(name: str):
    accepted = [cfg for cfg in schedules(name) if accepts(cfg)]
    assert len(accepted) > 50
    for cfg in accepted:
        found = rates(cfg)
        assert all(0 <= rate <= 1 + 1e-9 for rate in found), cfg


def test_constant_is_refused_for_an_overlap_only():
    for cfg in schedules("Constant"):
        overlap = cfg.lr_warm_up_steps + cfg.lr_decay_steps > cfg.total_training_steps
        assert accepts(cfg) is not overlap


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lr_end": None}, "lr_end is None, and SAETrainerConfig does not derive it"),
        ({"lr_end": 2e-3}, "lr_end must be between 0 and lr (0.001)"),
        ({"lr_end": -1e-3}, "lr_end must be between 0 and lr (0.001)"),
        ({"lr_end": 0.0, "lr_decay_steps": 2}, "would decay from lr_end = 0 to 0"),
        (
            {"lr_warm_up_steps": 6, "lr_decay_steps": 4},
            "needs a step for each of its cycles (3), but lr_warm_up_steps and "
            "lr_decay_steps leave 0 of the 10 training steps",
        ),
        ({"lr_warm_up_steps": 8}, "cycles (3)"),
        ({"n_restart_cycles": 0}, "n_restart_cycles must be at least 1, got 0"),
        ({"lr_warm_up_steps": 6, "lr_decay_steps": 5}, "together exceed the 10"),
        ({"lr": float("inf")}, "lr must be between"),
    ],
)
def test_a_schedule_that_cannot_work_is_named(settings: dict[str, Any], sentence: str):
    whole: dict[str, Any] = {
        "total_training_samples": 10,
        "train_batch_size_samples": 1,
        "lr": 1e-3,
        "lr_end": 1e-4,
        "lr_scheduler_name": RESTARTS,
        "n_restart_cycles": 3,
    }
    check_learning_rate(SAETrainerConfig(**whole))
    with pytest.raises(ValueError) as error:
        check_learning_rate(SAETrainerConfig(**{**whole, **settings}))
    assert sentence in str(error.value)


# quotas of a budget that falls

B, STEPS, F = 256, 8, 64


@pytest.mark.parametrize("min_tokens", [0.0, 15.9, 16.0, 16.1, 24.1, 32.1])
@pytest.mark.parametrize("first_steps", [0, 2, 4, 8])
@pytest.mark.parametrize("decay", [0, 4, 8])
@pytest.mark.parametrize("architecture", ["mutual_choice", "feature_choice"])
def test_a_quota_is_refused_where_a_step_would_fail(
    architecture: str, decay: int, first_steps: int, min_tokens: float
):
    """Brute force: the quotas of every step of Feature Choice."""
    settings: dict[str, Any] = {
        **{"d_in": D_MODEL, "d_sae": F, "k": 4, "min_tokens_per_feature": min_tokens},
        **({"k_start": 8, "k_decay_steps": decay} if decay else {}),
    }
    if architecture == "mutual_choice":
        sae = MutualChoiceTrainingSAEConfig(
            **settings, feature_choice_steps=first_steps
        )
        feature_choice = range(first_steps)
    else:
        sae = FeatureChoiceTrainingSAEConfig(
            **settings, mutual_choice_steps=first_steps
        )
        feature_choice = range(first_steps, STEPS)

    def fails(step: int) -> bool:
        budget = budget_for(
            budget_per_token(step, sae.k, sae.k_start, sae.k_decay_steps), B
        )
        try:
            zipf_quotas(ZipfLaw(1.0, 0.0, 1.0), F, budget, 0.6 * B, min_tokens)
        except ValueError:
            return True
        return False

    cfg = lm_config(sae, training_tokens=STEPS * B)
    if any(map(fails, feature_choice)):
        with pytest.raises(ValueError, match="min_tokens_per_feature .* needs"):
            check_run(cfg)
    else:
        check_run(cfg)


# the same checks for runs made in Python


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lr": -1.0}, "lr must be greater than 0, got -1.0."),
        ({"lr_scheduler_name": COSINE, "lr_end": 1.0}, "lr_end must be between"),
        ({"lr_warm_up_steps": 9}, "together exceed the 8 training steps"),
        ({"n_batches_in_buffer": 0}, "n_batches_in_buffer must be at least 1, got 0."),
        ({"n_batches_in_buffer": 3}, "n_batches_in_buffer must be at least 4"),
        ({"training_tokens": 100}, "there is not one training step"),
        ({"training_tokens": 10**30}, "training_tokens must be between"),
        ({"n_checkpoints": 2}, "checkpoint_path is null"),
        (
            {"n_checkpoints": 9, "checkpoint_path": "x"},
            "n_checkpoints (9) exceeds the 8 training steps",
        ),
        ({"n_batches_for_norm_estimate": 10**6}, "longer than the training"),
        ({"adam_beta2": 1.0}, "adam_beta2 must be in [0, 1), got 1.0."),
        ({"device": "gpu"}, "device must be a torch device"),
        ({"device": "meta"}, "torch finds no such device on this machine"),
        ({"n_batches_in_buffer": 10**9}, "the training needs about"),
        ({"model_kwargs": {"x": torch.float32}}, "cannot be written to runner_cfg"),
        (
            {"sae": TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=16, k=17)},
            "k must be in (0, d_sae = 16], got 17.",
        ),
        (
            {"sae": MutualChoiceTrainingSAEConfig(d_in=D_MODEL, d_sae=16, k=1e-3)},
            "less than one active feature in a batch",
        ),
        ({"from_pretrained_path": "/no/such"}, "but there is no such folder."),
    ],
)
def test_the_runner_refuses_them_before_a_model_is_loaded(
    settings: dict[str, Any], sentence: str, tmp_path: Path
):
    whole: dict[str, Any] = {
        "sae": MutualChoiceTrainingSAEConfig(d_in=D_MODEL, d_sae=64, k=4),
        "model_name": str(tmp_path / "no_model"),
        **settings,
    }
    with pytest.raises(ValueError) as error:
        AllocSAETrainingRunner(lm_config(**whole))
    assert sentence in str(error.value)
