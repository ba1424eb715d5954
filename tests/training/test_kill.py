"""Runs that are killed at random moments and resumed end bit for bit as if nothing had been."""

import multiprocessing
import random
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.config import LoggingConfig

from sae_lens_alloc import AllocSAETrainingRunner, MutualChoiceTrainingSAEConfig
from sae_lens_alloc.training import runner as runner_module
from sae_lens_alloc.training.checkpoint import find_checkpoint
from tests.training.conftest import (
    D_MODEL,
    alloc_config,
    load_demo_model,
    short_documents,
)

pytestmark = pytest.mark.slow

N_KILLS = 10
N_STEPS = 24


def train(folder: Path, ready: Event) -> None:
    """A run that goes on from its last checkpoint, if it has one; checkpoints every 2 steps."""
    torch.set_num_threads(1)
    runner_module.CALIBRATION_TOKENS = 1024
    try:
        checkpoint = str(find_checkpoint(folder / "checkpoints" / "run"))
    except ValueError:
        checkpoint = None
    cfg = alloc_config(
        MutualChoiceTrainingSAEConfig(
            d_in=D_MODEL,
            d_sae=128,
            k=8,
            feature_choice_steps=15,
            normalize_activations="expected_average_only_in",
        ),
        training_tokens=N_STEPS * 256,
        lr_warm_up_steps=5,
        lr_decay_steps=5,
        kl_finish=8,
        feature_sampling_window=10,
        n_checkpoints=11,
        save_final_checkpoint=True,
        checkpoint_path=str(folder / "checkpoints"),
        resume_from_checkpoint=checkpoint,
        output_path=str(folder / "sae"),
        logger=LoggingConfig(
            log_to_wandb=False,
            wandb_id="run",
            wandb_log_frequency=2,
            eval_every_n_wandb_logs=2,
        ),
    )
    # so few that the run goes through them twice
    runner = AllocSAETrainingRunner(cfg, short_documents(5), load_demo_model())
    ready.set()
    runner.run()


def results(folder: Path) -> dict[str, Any]:
    """Everything that must be equal."""
    (final,) = (folder / "checkpoints" / "run").glob("final_*")
    files = [
        *(
            folder / "sae" / name
            for name in (
                "sae_weights.safetensors",
                "sparsity.safetensors",
                "cfg.json",
                "metrics.jsonl",
            )
        ),
        *(
            final / name
            for name in (
                "sae_weights.safetensors",
                # the activations that come next, in their order
                "activations_store_state.safetensors",
                "trainer_state.pt",
                "rng_state.pt",
            )
        ),
    ]
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files}


def test_killed_runs_end_as_the_uninterrupted_one(tmp_path: Path):
    # a server that has imported everything, of which each run is a fork
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sae_lens_alloc", "pandas", "pytest"])

    def start(folder: Path) -> multiprocessing.Process:
        ready = context.Event()
        process = context.Process(target=train, args=(folder, ready))
        process.start()
        assert ready.wait(120)
        return process  # pyright: ignore[reportReturnType]

    process, began = start(tmp_path / "uninterrupted"), time.monotonic()
    process.join()
    seconds = time.monotonic() - began
    assert process.exitcode == 0
    expected = results(tmp_path / "uninterrupted")

    moments = random.Random(0)
    n_kills = n_resumed = 0
    while n_kills < N_KILLS:
        folder = tmp_path / f"killed {n_kills}"
        while True:
            n_resumed += any(folder.glob("checkpoints/run/*/checkpoint.json"))
            process = start(folder)
            # the last one may finish
            process.join(moments.uniform(0, seconds / 2) if n_kills < N_KILLS else None)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            n_kills += 1
        assert process.exitcode == 0
        found = results(folder)
        assert [name for name in expected if found[name] != expected[name]] == []
    assert n_resumed > 0
