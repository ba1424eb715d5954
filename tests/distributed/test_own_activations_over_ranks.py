"""One's own activations on ranks: the batches of one process, and a run that either continues."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.config import LoggingConfig

from sae_lens_alloc import (
    AllocSAERunnerConfig,
    AllocSAETrainingRunner,
    MutualChoiceTrainingSAEConfig,
)
from sae_lens_alloc.distributed.ranks import Ranks
from sae_lens_alloc.training import runner as runner_module
from sae_lens_alloc.training.checkpoint import find_checkpoint
from tests.distributed.processes import on_ranks

D_IN, D_SAE, BATCH, N_STEPS = 12, 31, 60, 12


def activations() -> torch.Tensor:
    return torch.randn(500, D_IN, generator=torch.Generator().manual_seed(0))


def config(folder: str, **overrides: Any) -> AllocSAERunnerConfig[Any]:
    settings: dict[str, Any] = {
        "training_tokens": N_STEPS * BATCH,
        "train_batch_size_tokens": BATCH,
        "lr": 1e-2,
        "n_checkpoints": 2,
        "checkpoint_path": f"{folder}/checkpoints",
        "output_path": f"{folder}/sae",
        "logger": LoggingConfig(log_to_wandb=False, wandb_id="run"),
        "verbose": False,
    }
    sae = MutualChoiceTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=3)
    return AllocSAERunnerConfig(sae=sae, **{**settings, **overrides})


def train(folder: str, **overrides: Any) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    runner_module.CALIBRATION_TOKENS = 256
    warnings.simplefilter("ignore")
    cfg = config(folder, **overrides)
    runner = AllocSAETrainingRunner(cfg, override_activations=activations())
    first = runner.ranks.gather(next(iter(runner.activations_store)))  # type: ignore[arg-type]
    runner.run()
    return {"held_out": runner.held_out, "first batch": first}


def scenario(ranks: Ranks, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = train(f"{folder}/two")
    cfg = config(f"{folder}/no")
    with pytest.raises(ValueError) as error:
        AllocSAETrainingRunner(cfg, override_activations=iter(activations().split(9)))
    return {**found, "refused": str(error.value)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def by_rank(folder: Path) -> list[dict[str, Any]]:
    return on_ranks(2, scenario, str(folder))


@pytest.fixture
def alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(runner_module, "CALIBRATION_TOKENS", 256)
    return train(
        str(folder / "one"), output_path=None, checkpoint_path=None, n_checkpoints=0
    )


def test_ranks_train_on_the_batches_of_one_process(
    by_rank: list[dict[str, Any]], alone: dict[str, Any], folder: Path
):
    for rank in by_rank:
        assert torch.equal(rank["held_out"], alone["held_out"])
        assert torch.equal(rank["first batch"], alone["first batch"])


def test_one_process_goes_on_from_the_checkpoint_of_two(
    by_rank: list[dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch
):
    assert len(by_rank) == 2
    monkeypatch.setattr(runner_module, "CALIBRATION_TOKENS", 256)
    checkpoint = str(find_checkpoint(folder / "two" / "checkpoints" / "run"))
    train(str(folder / "on"), resume_from_checkpoint=checkpoint)
    two, on = (SAE.load_from_disk(folder / name / "sae") for name in ("two", "on"))
    # the same rows, added up in another order
    torch.testing.assert_close(on.W_dec, two.W_dec, rtol=1e-4, atol=1e-4)


def test_a_generator_is_for_one_process(by_rank: list[dict[str, Any]]):
    for rank in by_rank:
        assert rank["refused"] == (
            "the generator of activations is read by one process, not by 2: give a file or a "
            "tensor, or start one process."
        )
