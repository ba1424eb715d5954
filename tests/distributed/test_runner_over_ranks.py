"""`AllocSAETrainingRunner` on ranks: one SAE, one folder, one voice; runs that are resumed."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, logger
from sae_lens.config import LoggingConfig
from safetensors.torch import load_file

from sae_lens_alloc import AllocSAETrainingRunner, MutualChoiceTrainingSAEConfig
from sae_lens_alloc.distributed.ranks import Ranks
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.training import runner as runner_module
from sae_lens_alloc.training.checkpoint import find_checkpoint
from tests.distributed.processes import on_ranks
from tests.training.conftest import (
    D_MODEL,
    lm_config,
    load_demo_model,
    short_documents,
)

N_STEPS, BATCH, D_SAE = 12, 252, 71


class Messages(logging.Handler):
    """What this process is told, from the logger and by warnings."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def config(folder: Path, **overrides: Any) -> Any:
    settings: dict[str, Any] = {
        "training_tokens": N_STEPS * BATCH,
        "train_batch_size_tokens": BATCH,
        "checkpoint_path": str(folder / "checkpoints"),
        "n_checkpoints": 2,
        "save_final_checkpoint": True,
        "output_path": str(folder / "sae"),
        "logger": LoggingConfig(
            log_to_wandb=False,
            wandb_id="run",
            wandb_log_frequency=2,
            eval_every_n_wandb_logs=2,
        ),
        **overrides,
    }
    return lm_config(
        MutualChoiceTrainingSAEConfig(
            d_in=D_MODEL,
            d_sae=D_SAE,
            k=4,
            feature_choice_steps=6,
            normalize_activations="expected_average_only_in",
        ),
        **settings,
    )


def weights(sae: Any) -> dict[str, torch.Tensor]:
    """Those of all features."""
    shard = sae.shard
    return {
        "W_enc": shard.gather(sae.W_enc.data.T.contiguous()).T.contiguous(),
        "W_dec": shard.gather(sae.W_dec.data.clone()),
        "b_enc": shard.gather(sae.b_enc.data.clone()),
        "b_dec": sae.b_dec.data.clone(),
    }


def train(folder: str, **overrides: Any) -> dict[str, Any]:
    """A run, and what this process had of it."""
    torch.set_num_threads(1)
    runner_module.CALIBRATION_TOKENS = 1024
    messages = Messages()
    logger.addHandler(messages)
    try:
        cfg = config(Path(folder), **overrides)
        runner = AllocSAETrainingRunner(cfg, short_documents(24), load_demo_model())
        found = {"start": weights(runner.sae), "held_out": runner.held_out}
        sae = runner.run()
        assert isinstance(sae, AllocationTrainingSAE)
        return {
            **found,
            "end": weights(sae),
            "own": len(sae.shard),
            "metadata": dict(sae.cfg.metadata.__dict__),
            "said": messages.said,
        }
    finally:
        logger.removeHandler(messages)


def scenario(ranks: Ranks, folder: str) -> dict[str, Any]:
    """A run, the same run again, and one that goes on from a checkpoint of the first."""
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {
        "first": train(f"{folder}/first"),
        "second": train(f"{folder}/second"),
    }
    found["prefetched"] = train(f"{folder}/prefetched", prefetch_llm_batches=True)
    last = find_checkpoint(f"{folder}/first/checkpoints/run")
    found["resumed"] = train(
        f"{folder}/resumed",
        resume_from_checkpoint=str(last),
        checkpoint_path=f"{folder}/resumed/checkpoints",
    )
    found["refused"] = [
        _refused(f"{folder}/no", **settings) for settings in REFUSED.values()
    ]
    found["different"] = _refused(f"{folder}/no", lr=1e-3 * (1 + ranks.rank))
    found["first again"] = _refused(f"{folder}/first")
    return found


REFUSED: dict[str, dict[str, Any]] = {
    "compile_sae": {"compile_sae": True},
    "train_batch_size_tokens": {"train_batch_size_tokens": 253},
}


def _refused(folder: str, **overrides: Any) -> str:
    with pytest.raises(ValueError) as error:
        AllocSAETrainingRunner(config(Path(folder), **overrides), short_documents(5))
    return str(error.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def by_rank(folder: Path) -> list[dict[str, Any]]:
    return on_ranks(2, scenario, str(folder))


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


def test_the_sae_starts_as_in_one_process(
    by_rank: list[dict[str, Any]], demo_model: Any, tmp_path: Path
):
    cfg = config(tmp_path)
    alone = AllocSAETrainingRunner(cfg, short_documents(24), demo_model)
    for rank in by_rank:
        assert equal(rank["first"]["start"], weights(alone.sae))


def test_the_same_run_twice_is_the_same_bit_for_bit(
    by_rank: list[dict[str, Any]], folder: Path
):
    for rank in by_rank:
        assert equal(rank["first"]["end"], rank["second"]["end"])
        assert equal(rank["first"]["end"], by_rank[0]["first"]["end"])
        assert torch.equal(rank["first"]["held_out"], by_rank[0]["first"]["held_out"])
        assert not equal(rank["first"]["end"], rank["first"]["start"])
    for name in ("sae_weights.safetensors", "metrics.jsonl"):
        first, second = (
            (folder / run / "sae" / name).read_bytes() for run in ("first", "second")
        )
        assert first == second


def test_batches_that_are_prefetched_are_the_same(by_rank: list[dict[str, Any]]):
    for rank in by_rank:
        assert equal(rank["prefetched"]["end"], rank["first"]["end"])


def test_a_resumed_run_goes_on_bit_for_bit(by_rank: list[dict[str, Any]], folder: Path):
    for rank in by_rank:
        assert equal(rank["resumed"]["end"], rank["first"]["end"])


def test_what_is_saved_is_one_stock_sae_with_one_file_of_metrics(
    by_rank: list[dict[str, Any]], folder: Path
):
    sae = SAE.load_from_disk(folder / "first" / "sae")
    assert sae.cfg.architecture() == "jumprelu"
    assert sae.W_dec.shape == (D_SAE, D_MODEL)
    assert [rank["first"]["own"] for rank in by_rank] == [36, 35]
    rows = [
        json.loads(line)
        for line in (folder / "first" / "sae" / "metrics.jsonl")
        .read_text()
        .splitlines()
    ]
    assert [row["step"] for row in rows] == [1, 3, 5, 7, 9, 11]
    assert rows[-1]["details/n_training_samples"] == N_STEPS * BATCH
    assert {"held_out/l0", "held_out/dead_features"} <= rows[1].keys()
    metadata = by_rank[0]["first"]["metadata"]
    assert by_rank[1]["first"]["metadata"] == metadata
    assert metadata["provenance"]["processes"] == 2
    # thresholds were calibrated to k on other activations
    assert metadata["calibration"]["l0"] == pytest.approx(4, rel=0.01)
    held_out = by_rank[0]["first"]["held_out"]
    active = sae.encode(held_out) > 0
    assert metadata["held_out"]["l0"] == pytest.approx(
        float(active.float().sum(-1).mean()), rel=1e-3
    )
    assert metadata["held_out"]["dead_features"] == int((~active.any(0)).sum())


def test_rank_0_alone_speaks_and_holds_the_folders(by_rank: list[dict[str, Any]]):
    assert by_rank[1]["first"]["said"] == []
    assert by_rank[1]["resumed"]["said"] == []
    for rank in by_rank:
        batch, compile_sae = rank["refused"][1], rank["refused"][0]
        assert compile_sae == (
            "compile_sae is for one process, not for 2: give compile_sae=false."
        )
        assert batch == (
            "train_batch_size_tokens (253) must be a multiple of the 2 processes, which give "
            "equal parts of each batch: give 252."
        )
        assert rank["different"] == (
            "the processes differ in lr: rank 0 has 0.001, and rank 1 has 0.002: start them all "
            "with the same."
        )
        assert "holds the checkpoints of another run" in rank["first again"] or (
            "already holds an SAE" in rank["first again"]
        )


def go_on(ranks: Ranks, checkpoint: str, folder: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    return train(
        folder,
        resume_from_checkpoint=checkpoint,
        checkpoint_path=f"{folder}/checkpoints",
    )


def test_another_number_of_processes_goes_on_at_about_the_same_place(
    by_rank: list[dict[str, Any]], folder: Path, tmp_path: Path
):
    checkpoint = find_checkpoint(folder / "first" / "checkpoints" / "run")
    read = [
        int(load_file(file)["n_contexts_read"])
        for file in sorted(checkpoint.glob("activations_store_state.rank-*"))
    ]
    assert len(read) == 2
    for found in (
        go_on(Ranks(), str(checkpoint), str(tmp_path / "one")),
        on_ranks(3, go_on, str(checkpoint), str(tmp_path / "three"))[0],
    ):
        (said,) = (text for text in found["said"] if "about the same place" in text)
        assert said.startswith("the checkpoint is of 2 and the run of ")
        assert not equal(found["end"], found["start"])
    for n, name in ((1, "one"), (3, "three")):
        final = next((tmp_path / name / "checkpoints").rglob("final_*"))
        files = sorted(final.glob("activations_store_state*"))
        assert len(files) == n
    rows = (tmp_path / "three" / "sae" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == N_STEPS - 1
