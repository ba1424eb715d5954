"""Checkpoints that one of the ranks cannot write, or in the middle of which it is killed."""

import logging
import os
import resource
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_lens_alloc.distributed.ranks import Ranks
from sae_lens_alloc.distributed.together import together
from sae_lens_alloc.training.checkpoint import find_checkpoint, partial_path
from sae_lens_alloc.training.final_sae import write_sae
from sae_lens_alloc.training.sharded_trainer import ShardedSAETrainer
from tests.distributed.processes import on_ranks
from tests.distributed.test_training_over_ranks import (
    N_TOKENS,
    Run,
    batches,
    new_sae,
    state_of,
    trainer_config,
)
from tests.training.conftest import lm_config

RUN = Run("mutual_choice", n_steps=8)
LIMITED_STEPS = 4
SMALL = 4096  # bytes, less than a rank writes


def limit_files(n_bytes: int) -> None:
    """From now on this process can write no larger files, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))


def new_trainer(
    ranks: Ranks, data: Iterator[torch.Tensor], **settings: Any
) -> ShardedSAETrainer:
    cfg = replace(trainer_config(RUN), **settings)
    return ShardedSAETrainer(cfg, new_sae(RUN.name, ranks), data)


def fit_with_a_full_disk(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """A training during whose first steps one rank cannot write: warnings and the end."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("sae_lens").addHandler(handler)

    def data() -> Iterator[torch.Tensor]:
        for step, batch in enumerate(batches()):
            is_limited = ranks.rank == 1 and step < LIMITED_STEPS
            limit_files(SMALL if is_limited else resource.RLIM_INFINITY)
            yield batch

    trainer = new_trainer(ranks, data(), checkpoint_path=str(folder), n_checkpoints=3)
    sae = trainer.fit()
    return {"said": said, "state": state_of(sae, sae.shard)}


def test_a_full_disk_of_one_rank_is_a_warning_of_all(tmp_path: Path):
    by_rank = on_ranks(3, fit_with_a_full_disk, tmp_path)
    for found in by_rank:
        (said,) = found["said"]
        assert said.startswith(f"the checkpoint {3 * N_TOKENS} cannot be written to")
        assert said.endswith("Training goes on without this checkpoint.")
        state = found["state"]
        assert all(torch.equal(by_rank[0]["state"][key], state[key]) for key in state)
    names = [path.name for path in tmp_path.iterdir()]
    assert sorted(names, key=int) == [f"{5 * N_TOKENS}", f"{7 * N_TOKENS}"]
    assert find_checkpoint(tmp_path).name == f"{7 * N_TOKENS}"


def errors_of(ranks: Ranks, folder: Path) -> list[str]:
    """What is said of a checkpoint where only one rank has a reason."""

    def refuse(checkpoint_path: Path | None) -> None:
        if ranks.rank == 1:
            raise ValueError("the store cannot be saved.")

    said: list[str] = []
    trainer = new_trainer(ranks, batches())
    with pytest.raises(OSError) as caught:
        trainer.save_checkpoint("1", folder / f"of rank {ranks.rank}")
    said.append(str(caught.value))
    trainer.save_checkpoint_fn = refuse
    with pytest.raises(ValueError) as refused:
        trainer.save_checkpoint("2", folder)
    said.append(str(refused.value))
    trainer.save_checkpoint("final_3", folder)  # a warning

    class OddError(Exception):
        """One that cannot be sent."""

    def be_odd() -> None:
        if ranks.rank == 1:
            raise OddError("it is odd")

    with pytest.raises(RuntimeError) as odd:
        together(ranks, be_odd)
    said.append(str(odd.value))
    return said


def test_what_one_rank_cannot_do_is_an_error_of_all(tmp_path: Path):
    for not_shared, refused, odd in on_ranks(2, errors_of, tmp_path):
        assert odd == "OddError: it is odd"
        assert "does not see the folder that another one has made there" in not_shared
        assert refused == "the store cannot be saved."
    assert partial_path(tmp_path / "2").is_dir()
    with pytest.raises(ValueError, match="no whole checkpoint"):
        find_checkpoint(tmp_path)


def be_killed(ranks: Ranks, folder: Path, when: str) -> None:
    """Saves a checkpoint and an SAE, and once more, when one rank is killed."""
    trainer = new_trainer(ranks, batches())
    sae = trainer.sae
    trainer.save_checkpoint("1", folder / "checkpoints")
    cfg = lm_config(sae.cfg)
    write_sae(sae, cfg, folder / "sae", None)
    sae.W_dec.data.mul_(2)
    victim = 1 if when == "writing" else 0
    if when in ("writing", "final") and ranks.rank == victim:
        # the kernel kills a process that writes more
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        limit_files(SMALL)
    if when == "final":
        write_sae(sae, cfg, folder / "sae", None)

    def kill(checkpoint_path: Path | None) -> None:
        if ranks.rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.save_checkpoint_fn = kill
    trainer.n_training_samples += 1
    trainer.save_checkpoint("2", folder / "checkpoints")


@pytest.mark.parametrize("when", ["writing", "written", "final"])
def test_what_a_killed_rank_leaves_is_not_taken_for_whole(when: str, tmp_path: Path):
    with pytest.raises(AssertionError, match="rank"):
        on_ranks(2, be_killed, tmp_path, when)
    checkpoints = tmp_path / "checkpoints"
    assert find_checkpoint(checkpoints) == checkpoints / "1"
    left = {path.name for path in checkpoints.iterdir()}
    assert left == ({"1"} if when == "final" else {"1", ".partial-2"})
    names = [path.name for path in (tmp_path / "sae").iterdir()]
    half_written = [name for name in names if name.startswith(".")]
    assert len(half_written) == (1 if when == "final" else 0)
    assert len(names) - len(half_written) == 3
