"""Checkpoints that ranks write, and who can go on from them."""

import pickle
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from sae_lens.constants import TRAINER_STATE_FILENAME

from sae_lens_alloc.distributed import stored_tensors
from sae_lens_alloc.distributed.feature_shard import FeatureShard, storage_order
from sae_lens_alloc.distributed.ranks import ALONE, Ranks
from sae_lens_alloc.distributed.stored_tensors import (
    METADATA_FILENAME,
    FeatureRows,
    Stored,
    read_stored_tensors,
    write_stored_tensors,
)
from sae_lens_alloc.saes.checkpoint_weights import feature_rows, is_by_feature
from sae_lens_alloc.saes.saved_sae import load_sae
from sae_lens_alloc.training.checkpoint import find_checkpoint
from sae_lens_alloc.training.sharded_checkpoint import COUNTS, FEATURE_COUNTS
from sae_lens_alloc.training.sharded_trainer import ShardedSAETrainer
from sae_lens_alloc.training.trainer import AllocSAETrainer
from tests.distributed.processes import on_ranks
from tests.distributed.test_feature_shard import RankOf
from tests.distributed.test_training_over_ranks import (
    N_STEPS,
    Run,
    batches,
    new_sae,
    state_of,
    trainer_config,
)

RUNS = [
    Run("recipe"),
    Run("timed", optimizer="row_sparse_adam"),
    Run("nested"),
    Run("scaled", optimizer="muon"),
    Run("transcoder"),
]
N_ESTIMATED = 5  # batches that the scaling factor is estimated from
# Ends of the stages, each by another number of ranks; the first has as many again.
STAGES = {5: 4, 9: 2, 12: 1, 16: 3, N_STEPS: 1}


def new_trainer(ranks: Ranks, run: Run, first: int) -> AllocSAETrainer[Any, Any]:
    """A trainer whose next batch is that of the step `first`."""
    torch.set_num_threads(1)
    sae = new_sae(run.name, ranks)
    is_scaled = sae.cfg.normalize_activations == "expected_average_only_in"
    data = islice(batches(), first + is_scaled * N_ESTIMATED if first else 0, None)
    kind = AllocSAETrainer if ranks.is_alone else ShardedSAETrainer
    trainer = kind(trainer_config(run), sae, data)
    if is_scaled and first == 0:
        trainer.activation_scaler.estimate_scaling_factor(
            sae.cfg.d_in, data, N_ESTIMATED
        )
    return trainer


def started(
    ranks: Ranks, run: Run, checkpoint: Path | None, first: int
) -> AllocSAETrainer[Any, Any]:
    """A trainer that goes on from a checkpoint after `first` steps, or begins."""
    trainer = new_trainer(ranks, run, first)
    if checkpoint is not None:
        trainer.load_trainer_state(checkpoint)
        trainer.sae.load_weights_from_checkpoint(checkpoint)
        assert trainer.n_training_steps == first
    return trainer


def step_to(trainer: AllocSAETrainer[Any, Any], last: int) -> dict[str, torch.Tensor]:
    """Trains up to a step, and gives all that training goes on from then."""
    while trainer.n_training_steps < last:
        trainer.maybe_reset_sparsity()
        trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1
    return everything(trainer)


def save(trainer: AllocSAETrainer[Any, Any], checkpoint: Path) -> None:
    trainer.save_checkpoint(checkpoint.name, checkpoint.parent)


def everything(trainer: AllocSAETrainer[Any, Any]) -> dict[str, torch.Tensor]:
    """All that training goes on from, of all features."""
    sae, shard = trainer.sae, trainer.sae.shard
    found = state_of(sae, shard)
    for name in FEATURE_COUNTS:
        found[name] = shard.gather(getattr(trainer, name))
    for name in COUNTS:
        found[name] = torch.tensor(float(getattr(trainer, name)))
    for name, weight in sae.named_parameters():
        for key, value in trainer.optimizer.state[weight].items():
            if is_by_feature(name) and value.ndim > 0:
                value = shard.gather(feature_rows(name, value).contiguous())
            found[f"{name}.{key}"] = value
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    found["lr"] = torch.tensor(rates)
    return {name: tensor.clone() for name, tensor in found.items()}


def begin_and_resume(ranks: Ranks, folder: Path) -> list[list[dict[str, Any]]]:
    """With as many ranks: uninterrupted, and resumed."""
    found: list[list[dict[str, Any]]] = []
    for i, run in enumerate(RUNS):
        end = min(STAGES)
        trainer = started(ranks, run, None, 0)
        step_to(trainer, end)
        save(trainer, folder / str(i) / str(end))
        resumed = started(ranks, run, folder / str(i) / str(end), end)
        found.append([step_to(trainer, 9), step_to(resumed, 9)])
    return found


def go_on(ranks: Ranks, folder: Path, first: int, last: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for i, run in enumerate(RUNS):
        trainer = started(ranks, run, folder / str(i) / str(first), first)
        found.append(step_to(trainer, last))
        save(trainer, folder / str(i) / str(last))
    return found


def test_any_number_of_ranks_goes_on_from_the_checkpoint_of_another(tmp_path: Path):
    for by_run in on_ranks(STAGES[min(STAGES)], begin_and_resume, tmp_path):
        for run, (whole, resumed) in zip(RUNS, by_run, strict=True):
            assert whole.keys() == resumed.keys()
            other = [key for key in whole if not torch.equal(whole[key], resumed[key])]
            assert other == [], run
    alone = [started(ALONE, run, None, 0) for run in RUNS]
    ends = list(STAGES)
    for first, last in zip(ends, ends[1:], strict=False):
        if STAGES[last] == 1:
            by_rank = [go_on(ALONE, tmp_path, first, last)]
        else:
            by_rank = on_ranks(STAGES[last], go_on, tmp_path, first, last)
        for i, run in enumerate(RUNS):
            expected = step_to(alone[i], last)
            for found in by_rank:
                assert found[i].keys() == expected.keys()
                for key, wanted in expected.items():
                    torch.testing.assert_close(
                        found[i][key],
                        wanted,
                        rtol=1e-3,
                        atol=1e-3,
                        msg=lambda text, at=(run, last, key): f"{at}: {text}",
                    )


def save_after(ranks: Ranks, folder: Path, *ends: int) -> dict[str, torch.Tensor]:
    """A training with checkpoints after some steps: what there is at the last of them."""
    trainer = started(ranks, RUNS[0], None, 0)
    found: dict[str, torch.Tensor] = {}
    for end in ends:
        found = step_to(trainer, end)
        save(trainer, folder / str(end))
    return found


def test_a_checkpoint_of_ranks_is_loaded_as_an_sae(tmp_path: Path):
    wanted, _ = on_ranks(2, save_after, tmp_path, 3)
    before = torch.get_rng_state()
    sae: Any = load_sae(tmp_path / "3")
    assert torch.equal(torch.get_rng_state(), before)
    assert type(sae) is type(new_sae(RUNS[0].name, ALONE))
    found = state_of(sae, sae.shard)
    assert [key for key in found if not torch.equal(found[key], wanted[key])] == []

    whole = (tmp_path / "3" / METADATA_FILENAME).read_bytes()
    (tmp_path / "3" / METADATA_FILENAME).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"\.metadata' is damaged"):
        load_sae(tmp_path / "3")

    marker = tmp_path / "executed"
    (tmp_path / "3" / METADATA_FILENAME).write_bytes(
        pickle.dumps(_Malicious(str(marker)))
    )
    with pytest.raises(ValueError, match=r"it refers to .*\.system"):
        load_sae(tmp_path / "3")
    assert not marker.exists()


class _Malicious:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        import os

        return os.system, (f"touch {self.path}",)


def found(ranks: Ranks, folder: Path) -> str:
    with pytest.raises(ValueError, match="no folder .* to resume from"):
        find_checkpoint(folder / "nowhere" if ranks.rank else folder, ranks)
    return find_checkpoint(folder, ranks).name


def test_ranks_skip_a_checkpoint_of_which_one_file_is_damaged(tmp_path: Path):
    on_ranks(2, save_after, tmp_path, 1, 2)
    assert find_checkpoint(tmp_path).name == "2"
    content = (tmp_path / "2" / "__1_0.distcp").read_bytes()
    (tmp_path / "2" / "__1_0.distcp").write_bytes(content[:-1] + b"?")
    assert on_ranks(2, found, tmp_path) == ["1", "1"]
    assert find_checkpoint(tmp_path).name == "1"


def test_a_world_of_one_process_saves_as_one_process(tmp_path: Path):
    run = Run("recipe", optimizer="row_sparse_adam")
    trainer = ShardedSAETrainer(
        trainer_config(run), new_sae("recipe", ALONE), batches()
    )
    wanted = step_to(trainer, 2)
    save(trainer, tmp_path / "2")
    assert not (tmp_path / "2" / METADATA_FILENAME).exists()
    resumed = ShardedSAETrainer(
        trainer_config(run), new_sae("recipe", ALONE), batches()
    )
    resumed.load_trainer_state(tmp_path / "2")
    resumed.sae.load_weights_from_checkpoint(tmp_path / "2")
    found = everything(resumed)
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


def fail_to_load(ranks: Ranks, folder: Path) -> list[str]:
    """What is said of a checkpoint of which one rank does not see a file."""
    trainer = new_trainer(ranks, RUNS[0], 0)
    own = folder if ranks.rank == 0 else folder / "nowhere"
    said: list[str] = []
    for load in (trainer.load_trainer_state, trainer.sae.load_weights_from_checkpoint):
        with pytest.raises(FileNotFoundError) as caught:
            load(own)
        said.append(str(caught.value))
    return said


def test_what_one_rank_cannot_read_is_an_error_of_all(tmp_path: Path):
    save_after(ALONE, tmp_path, 1)
    first, second = on_ranks(2, fail_to_load, tmp_path / "1")
    assert first == second
    assert all("nowhere" in said for said in first)


def test_sae_lens_saves_of_a_trainer_what_ranks_save(tmp_path: Path):
    # if this fails, SAELens has changed what a trainer goes on from: sharded_checkpoint.py
    save_after(ALONE, tmp_path, 1)
    state = torch.load(tmp_path / "1" / TRAINER_STATE_FILENAME)
    schedules = {"optimizer", "lr_scheduler", "coefficient_schedulers"}
    assert state.keys() == {*schedules, *COUNTS, *FEATURE_COUNTS}


def tensors_of_case(number: int) -> dict[str, torch.Tensor]:
    """Tensors of all features, and one that all ranks have the same."""
    draw = random.Random(number)
    torch.manual_seed(number)
    n_features, width = draw.randint(13, 2500), draw.randint(1, 5)
    return {
        "matrix": torch.randn(n_features, width),
        "transposed": torch.randn(width, n_features).T,
        "narrow": torch.randn(n_features, 2).bfloat16(),
        "vector": torch.arange(n_features),
        "flags": torch.rand(n_features) < 0.5,
        "same": torch.randn(width),
        "number": torch.tensor(draw.random()),
    }


def stored(
    tensors: dict[str, torch.Tensor], ranks: Ranks, empty: bool = False
) -> dict[str, Stored]:
    shard = FeatureShard(len(tensors["matrix"]), ranks)
    found: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        is_same = name in ("same", "number")
        own = tensor.clone() if is_same else shard.own(tensor)
        own = torch.empty_like(own) if empty else own
        found[name] = own if is_same else FeatureRows(own, shard)
    return found


def write_cases(ranks: Ranks, folder: Path, numbers: range) -> None:
    for number in numbers:
        stored_tensors.BLOCK_BYTES = random.Random(number).choice([3000, 2**26])
        at = folder / str(number)
        tensors = stored(tensors_of_case(number), ranks)
        write_stored_tensors(at, tensors, ranks)


@pytest.mark.parametrize("n_writing", [2, 3, 4])
def test_any_number_of_ranks_reads_what_another_number_wrote(
    n_writing: int, tmp_path: Path
):
    numbers = range(100 * n_writing, 100 * n_writing + 6)
    on_ranks(n_writing, write_cases, tmp_path, numbers)
    for number in numbers:
        tensors = tensors_of_case(number)
        in_order = {"matrix": torch.empty_like(tensors["matrix"])}
        with pytest.warns(UserWarning, match="torch.distributed is disabled"):
            dcp.load(in_order, checkpoint_id=tmp_path / str(number))
        order = storage_order(len(tensors["matrix"]))
        assert torch.equal(in_order["matrix"], tensors["matrix"][order])
        for n_reading in (1, 2, 3, 4):
            for rank in range(n_reading):
                ranks = RankOf(n_reading, rank)
                expected, found = stored(tensors, ranks), stored(tensors, ranks, True)
                read_stored_tensors(tmp_path / str(number), found)
                for name, wanted in expected.items():
                    assert torch.equal(values(found[name]), values(wanted)), name


def values(tensor: Stored) -> torch.Tensor:
    return tensor.rows if isinstance(tensor, FeatureRows) else tensor


def test_what_is_not_there_is_said(tmp_path: Path):
    on_ranks(2, write_cases, tmp_path, range(1))
    other = FeatureRows(torch.zeros(7, 2), FeatureShard(7))
    with pytest.raises(ValueError, match=r"holds no matrix of shape \(7, 2\), but one"):
        read_stored_tensors(tmp_path / "0", {"matrix": other})
    with pytest.raises(ValueError, match=r"holds no unknown of shape \(7, 2\)\."):
        read_stored_tensors(tmp_path / "0", {"unknown": other})
