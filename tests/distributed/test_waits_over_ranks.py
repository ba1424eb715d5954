"""Ranks ask their devices nothing that one process does not ask."""

import pytest
import torch

from sae_lens_alloc.distributed.ranks import Ranks
from sae_lens_alloc.training.sharded_trainer import ShardedSAETrainer
from sae_lens_alloc.training.trainer import AllocSAETrainer
from tests.distributed.processes import on_ranks
from tests.distributed.test_training_over_ranks import (
    Run,
    as_the_run_says,
    batches,
    new_sae,
    trainer_config,
)
from tests.questions import CountsQuestions

RUNS = {
    "mutual_choice": Run("mutual_choice", asks_once=True),
    "feature_choice": Run("feature_choice", asks_once=True),
    "nested": Run("nested", asks_once=True),
    "kernels": Run("triton", backend="triton"),
}
# Of a run; flags are renewed at step 10, and kernels are slow without a GPU.
STEPS = {"kernels": (2, 3)}


def asked_by_steps(ranks: Ranks) -> dict[str, list[int]]:
    """How often the device is asked in each of two steps of each run."""
    torch.set_num_threads(1)
    kind = AllocSAETrainer if ranks.is_alone else ShardedSAETrainer
    found: dict[str, list[int]] = {}
    for name, run in RUNS.items():
        with as_the_run_says(run):
            trainer = kind(trainer_config(run), new_sae(run.name, ranks), batches())
            found[name] = []
            for step in range(STEPS.get(name, (10, 11))[-1] + 1):
                batch = next(trainer.data_provider)
                with CountsQuestions() as questions:
                    trainer.step(batch)
                if step in STEPS.get(name, (10, 11)):
                    found[name].append(len(questions.asked))
                trainer.n_training_steps += 1
    return found


def test_no_device_is_asked_more_than_that_of_one_process(triton_device: torch.device):
    if triton_device.type == "cuda":
        pytest.skip("the ranks here are on the CPU")
    alone = asked_by_steps(Ranks())
    for found in on_ranks(2, asked_by_steps):
        for name, expected in alone.items():
            renewal, step = found[name]
            assert step <= expected[1], name
            # whether another rank has flagged somebody
            assert renewal <= expected[0] + 1, name
