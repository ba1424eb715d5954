"""The command line in this process, and a run of a thousand tokens."""

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

import sae_lens_alloc
from sae_lens_alloc_cli import app

DEMO = Path(sae_lens_alloc.__file__).parent / "demo"
CONFIG = str(DEMO / "mutual_choice.yaml")
# 4 steps of 256 tokens
TINY = (
    f"model_name={DEMO / 'model'}",
    f"dataset_path={DEMO / 'corpus'}",
    "hook_name=transformer.h.0",
    "sae.d_sae=64",
    "sae.k=4",
    "training_tokens=1024",
    "train_batch_size_tokens=256",
    "store_batch_size_prompts=4",
    "n_batches_in_buffer=4",
    "logger.wandb_log_frequency=1",
)


def invoke(*args: str) -> Any:
    result = CliRunner().invoke(app, list(args))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def train(output: Path, *args: str) -> Any:
    return invoke("train", CONFIG, *TINY, f"output_path={output}", *args)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
