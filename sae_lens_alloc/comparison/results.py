"""`results.json`: what was measured, and means and ranges over the seeds."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import sae_lens
import torch

from sae_lens_alloc.comparison.cell import Cell
from sae_lens_alloc.comparison.choice import Choice
from sae_lens_alloc.comparison.finished import (
    SCHEMA_VERSION,
    Cells,
    Failures,
    measured_at,
)
from sae_lens_alloc.json_files import finite_or_null, write_whole
from sae_lens_alloc.version import __version__

SCHEMA = Path(__file__).with_name("results.schema.json")


def middle_k(ks: Collection[float]) -> float:
    """The k of pictures that show a single k."""
    return sorted(ks)[len(ks) // 2]


def numbers_of_seeds(compare: Mapping[str, Any]) -> str:
    """
    Number of seeds of the rows of a comparison: "3", or "1 to 2" if it differs.

    Args:
        compare: The `compare` part of the settings.
    """
    numbers = [
        len(sae.get("seeds", compare["seeds"])) for sae in compare["rows"].values()
    ]
    least, most = min(numbers), max(numbers)
    return f"{least}" if least == most else f"{least} to {most}"


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """
    Mean, smallest and largest value over the seeds of every number measured.

    Args:
        runs: Figures of the SAE of each seed, with the cost of its training.
    """
    flat = [_numbers(run) for run in runs]
    return {
        name: {
            "mean": sum(row[name] for row in flat) / len(flat),
            "min": min(row[name] for row in flat),
            "max": max(row[name] for row in flat),
        }
        for name in flat[0]
        # a seed may have no law, or a figure that is not a number
        if all(name in row for row in flat)
    }


def _numbers(run: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: value for name, value in run.items() if not _is_nested(value)}
    for name, value in (run["zipf"] or {}).items():
        if value is not None:
            numbers[f"zipf_{name}"] = value
    return numbers


def _is_nested(value: Any) -> bool:
    return value is None or isinstance(value, dict | list)


def point_results(
    choice: Choice, runs: Sequence[Cell], known: Cells, split: str
) -> dict[str, Any]:
    """
    The entry of one row at one k in `results.json`.

    Args:
        choice: The chosen settings.
        runs: Their cells, one for each seed.
        known: Results of the finished cells.
        split: The split of the figures.
    """
    measured = [
        {
            "seconds": known[cell.key]["seconds"],
            "peak_memory_bytes": known[cell.key]["peak_memory_bytes"],
            **(measured_at(known[cell.key], split, choice.k) or {}),
        }
        for cell in runs
    ]
    cell = choice.cell
    return {
        "row": choice.row,
        "k": choice.k,
        "chosen": None
        if cell is None
        else {"lr": cell.lr, "sparsity": {cell.sparsity_key: cell.sparsity}},
        "tried": choice.tried,
        "runs": [{"seed": cell.seed, "cell": cell.key} for cell in runs],
        "over_seeds": summary(measured) if measured else {},
    }


def comparison_results(
    subject: Mapping[str, Any],
    settings: Mapping[str, Any],
    machine: Mapping[str, Any],
    points: Sequence[Mapping[str, Any]],
    cells: Cells,
    failures: Failures,
    allocation: Mapping[str, Any] | None,
    complete: bool,
) -> dict[str, Any]:
    """The content of `results.json`, which `results.schema.json` describes."""
    return {
        "schema_version": SCHEMA_VERSION,
        "complete": complete,
        "subject": subject,
        "settings": settings,
        "machine": machine,
        "versions": {
            "sae_lens_alloc": __version__,
            "sae_lens": sae_lens.__version__,
            "torch": torch.__version__,
        },
        "points": points,
        "cells": cells,
        "failed": failures,
        "allocation": allocation,
    }


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Writes `results.json`, with each list of numbers on one line."""
    text = json.dumps(finite_or_null(results), indent=1, allow_nan=False)
    text = re.sub(r"\[[\d\s.,e+-]*\]", lambda match: " ".join(match[0].split()), text)
    write_whole(path, text + "\n")
