"""Metrics as JSON lines, one training step on each line."""

import json
import math
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from sae_lens_alloc.training.output_folder import new_files

# In a checkpoint: identifies the rows of its run.
FINGERPRINT_FILENAME = "metrics_fingerprint.json"


def append_row(path: Path, row: Mapping[str, float]) -> None:
    """
    Adds a row. JSON has no NaN, so a value that is not finite becomes null.

    Raises:
        OSError: if it cannot be written. The file is then as before.
    """
    finite = {key: v if math.isfinite(v) else None for key, v in row.items()}
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        line = json.dumps(finite).encode() + b"\n"
        try:
            while line:  # near a size limit, only a part is written at a time
                line = line[file.write(line) :]
        except OSError:
            file.truncate(before)
            raise


def save_fingerprint(path: Path, checkpoint: Path) -> None:
    """Saves size and checksum of the rows so far in a checkpoint."""
    rows = path.read_bytes() if path.exists() else b""
    fingerprint = {"bytes": len(rows), "sha256": sha256(rows).hexdigest()}
    (checkpoint / FINGERPRINT_FILENAME).write_text(json.dumps(fingerprint))


def is_of_checkpoint(path: Path, checkpoint: Path) -> bool:
    """
    Whether a file begins with the rows that were there when a checkpoint was saved. True if the
    checkpoint does not say, as those of earlier versions.
    """
    told = checkpoint / FINGERPRINT_FILENAME
    if not told.exists():
        return True
    fingerprint = json.loads(told.read_text())
    with path.open("rb") as file:
        rows = file.read(fingerprint["bytes"])
    return sha256(rows).hexdigest() == fingerprint["sha256"]


def require_rows(path: Path) -> None:
    """
    Raises ValueError if a line of a file is no row of metrics. An incomplete last line is
    ignored.
    """
    for number, line in enumerate(_whole_lines(path), 1):
        if _step(line) is None:
            raise ValueError(
                f"line {number} of {str(path)!r} is no row of metrics, so the run cannot continue "
                "with that file: repair it, or move it to another place."
            )


def drop_rows_from(path: Path, step: int) -> None:
    """
    Drops the rows of a training step and of later ones, and an incomplete last line. An
    interrupted run wrote these after the checkpoint that is resumed.

    Raises:
        ValueError: if a line is no row of metrics.
        OSError: if the file cannot be written. It is then as before.
    """
    if not path.exists():
        return
    require_rows(path)
    kept = [line for line in _whole_lines(path) if (_step(line) or 0) < step]
    with new_files(path.parent, "the metrics") as folder:
        (folder / path.name).write_bytes(b"".join(kept))


def _whole_lines(path: Path) -> list[bytes]:
    return [line + b"\n" for line in path.read_bytes().split(b"\n")[:-1]]


def _step(line: bytes) -> int | None:
    """The step of a row, None if the line is no row."""
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else None
