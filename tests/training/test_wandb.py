"""Weights & Biases for real, in offline mode."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from datasets import Dataset
from sae_lens import LanguageModelSAETrainingRunner
from sae_lens.config import LoggingConfig
from transformer_lens.HookedTransformer import HookedRootModule
from wandb.proto import wandb_internal_pb2

from sae_lens_alloc import AllocSAETrainingRunner, MutualChoiceTrainingSAEConfig
from tests.training.conftest import D_MODEL, lm_config
from tests.training.test_sae_trainer import METRICS

BLOCK, HEADER = 32768, 7


def records(log: bytes) -> Iterator[bytes]:
    """
    The records of a run file: a LevelDB log behind a header of 7 bytes, whose records are
    cut into chunks (crc: 4 bytes, length: 2, type: 1 = whole, 2 = first, 3, 4 = last) that
    do not cross a block of 32 kB.
    """
    position, record = HEADER, b""
    while position + HEADER <= len(log):
        left_in_block = BLOCK - position % BLOCK
        if left_in_block < HEADER:
            position += left_in_block
            continue
        length, kind = struct.unpack_from("<HB", log, position + 4)
        position += HEADER
        record += log[position : position + length]
        position += length
        if kind in (1, 4):
            yield record
            record = b""


def logged_rows(directory: Path) -> list[dict[str, str]]:
    """All rows of the one offline run in a directory, values as JSON text."""
    (path,) = directory.rglob("run-*.wandb")
    rows: list[dict[str, str]] = []
    for data in records(path.read_bytes()):
        record: Any = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
        record.ParseFromString(data)
        if record.HasField("history"):
            rows.append(
                {
                    item.key or "/".join(item.nested_key): item.value_json
                    for item in record.history.item
                }
            )
    return rows


@pytest.mark.usefixtures("restore_signals", "few_calibration_tokens")
@pytest.mark.parametrize(
    "runner_class", [LanguageModelSAETrainingRunner, AllocSAETrainingRunner]
)
def test_offline_run_logs_our_metrics(
    runner_class: type[LanguageModelSAETrainingRunner],
    demo_model: HookedRootModule,
    demo_text: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    for name, value in (("MODE", "offline"), ("DIR", tmp_path), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    logger = LoggingConfig(
        log_to_wandb=True,
        wandb_project="test",
        wandb_log_frequency=2,
        eval_every_n_wandb_logs=2,
    )
    sae: Any = MutualChoiceTrainingSAEConfig(
        d_in=D_MODEL, d_sae=256, k=8, feature_choice_steps=2
    )
    cfg = lm_config(
        sae,
        training_tokens=6 * 256,
        logger=logger,
        n_checkpoints=1,
        checkpoint_path=str(tmp_path / "checkpoints"),
        output_path=str(tmp_path / "sae"),
    )
    runner_class(cfg, demo_text, demo_model).run()
    assert wandb.run is None  # finished
    wandb.teardown()  # writes what is left, and forgets our folders

    rows = [row for row in logged_rows(tmp_path) if "metrics/cut" in row]
    assert [row["_step"] for row in rows] == ["1", "3", "5"]
    for row in rows:
        assert set(row) >= METRICS
        assert float(row["metrics/cut"]) > 0
    assert float(rows[-1]["metrics/l0"]) == pytest.approx(8)
    # SAELens' evaluation in the middle of training, which uses the thresholds
    evaluated = [
        row["_step"] for row in rows if any("ce_loss_score" in key for key in row)
    ]
    assert evaluated == ["3"]
    held_out = [row["_step"] for row in logged_rows(tmp_path) if "held_out/l0" in row]
    assert held_out == (["3"] if runner_class is AllocSAETrainingRunner else [])
