"""Metrics as JSON lines, one training step a line."""

import json
import math
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from sae_lens_alloc.training.output_folder import new_files

# In a checkpoint: what tells the rows of its run from another's.
FINGERPRINT_FILENAME = "metrics_fingerprint.json"


def append_row(path: Path, row: Mapping[str, float]) -> None:
    """
    Adds a row. JSON has no NaN: what is not finite becomes null.

    Raises:
        OSError: if it cannot be written; the file is then as before.
    """
    finite = {key: v if math.isfinite(v) else None for key, v in row.items()}
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        line = json.dumps(finite).encode() + b"\n"
        try:
            while line:  # near a limit, only a part is written
                line = line[file.write(line) :]
        except OSError:
            file.truncate(before)
            raise


def save_fingerprint(path: Path, checkpoint: Path) -> None:
    """Tells in a checkpoint which rows there are so far."""
    rows = path.read_bytes() if path.exists() else b""
    fingerprint = {"bytes": len(rows), "sha256": sha256(rows).hexdigest()}
    (checkpoint / FINGERPRINT_FILENAME).write_text(json.dumps(fingerprint))


def is_of_checkpoint(path: Path, checkpoint: Path) -> bool:
    """
    Whether a file begins with the rows that were there when a checkpoint was saved. So it does
    where the checkpoint does not tell: earlier versions' did not.
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
    Raises ValueError if a line of a file is no row of metrics, apart from a last one that is
    incomplete.
    """
    for number, line in enumerate(_whole_lines(path), 1):
        if _step(line) is None:
            raise ValueError(
                f"line {number} of {str(path)!r} is no row of metrics, so the run cannot go on "
                "with that file: repair it, or move it to another place."
            )


def drop_rows_from(path: Path, step: int) -> None:
    """
    Drops the rows of a training step and later ones, and a last line that is incomplete: what
    an interrupted run wrote after the checkpoint from which it goes on.

    Raises:
        ValueError: if a line is no row.
        OSError: if it cannot be written; the file is then as before.
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
    """The step of a row, None of what is no row."""
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else None
