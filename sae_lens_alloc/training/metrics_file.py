"""Metrics as JSON lines, one training step a line."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path


def append_row(path: Path, row: Mapping[str, float]) -> None:
    """Adds a row. JSON has no NaN: what is not finite becomes null."""
    finite = {key: v if math.isfinite(v) else None for key, v in row.items()}
    with path.open("a") as file:
        file.write(json.dumps(finite) + "\n")


def drop_rows_from(path: Path, step: int) -> None:
    """
    Drops the rows of a training step and later ones, and a last line that is incomplete: what
    an interrupted run wrote after the checkpoint from which it goes on.
    """
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n")]
    kept = [line for line in kept if json.loads(line)["step"] < step]
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)
