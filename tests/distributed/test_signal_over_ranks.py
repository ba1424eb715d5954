"""A signal that reaches the ranks while they ask each other whether one came."""

import signal
from pathlib import Path

import pytest

from sae_lens_alloc.compat import InterruptedException
from sae_lens_alloc.distributed.ranks import Ranks
from sae_lens_alloc.training.checkpoint import find_checkpoint
from sae_lens_alloc.training.sharded_trainer import ShardedSAETrainer
from tests.distributed.processes import on_ranks
from tests.distributed.test_runner_over_ranks import BATCH, train

STEP = 3  # behind which they ask, and hear of no signal


def run_with_a_signal(ranks: Ranks, folder: str) -> bool:  # noqa: ARG001
    """Whether a run is interrupted that gets SIGTERM in the middle of the question."""
    between_steps, ask = ShardedSAETrainer.between_steps, Ranks.any

    def ask_with_a_signal(self: Ranks, flag: bool) -> bool:
        answer = ask(self, flag)
        signal.raise_signal(signal.SIGTERM)
        return answer

    def at_the_step(trainer: ShardedSAETrainer) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if trainer.n_training_steps == STEP:
                patch.setattr(Ranks, "any", ask_with_a_signal)
            between_steps(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardedSAETrainer, "between_steps", at_the_step)
        try:
            train(folder, n_checkpoints=0)
        except InterruptedException:
            return True
    return False


def test_a_signal_during_the_question_ends_the_run_behind_the_next_step(tmp_path: Path):
    assert on_ranks(2, run_with_a_signal, str(tmp_path)) == [True, True]
    saved = find_checkpoint(tmp_path / "checkpoints" / "run")
    assert int(saved.name) == BATCH * (STEP + 1)
