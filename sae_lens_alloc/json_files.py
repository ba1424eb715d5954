"""JSON files that are never half-written and hold no NaN, which JSON does not have."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def finite_or_null(value: Any) -> Any:
    """A value for JSON with None in place of every number that is NaN or infinite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    return value


def write_whole(path: Path, text: str) -> None:
    """Writes a text file under another name and renames it, so that it is never half-written."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, with null in place of numbers that are not finite."""
    text = json.dumps(finite_or_null(value), indent=2, allow_nan=False)
    write_whole(path, text + "\n")
