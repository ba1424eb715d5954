"""`results.json`: what was measured, and means and ranges over the seeds."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sae_lens
import torch

import sae_lens_alloc
from sae_lens_alloc.evaluation.comparison.cell import Cell
from sae_lens_alloc.evaluation.comparison.choice import Choice, Results
from sae_lens_alloc.evaluation.usage import Usage

SCHEMA_VERSION = 1
SCHEMA = Path(__file__).with_name("results.schema.json")
VERY_RARE_DENSITY = 1e-5


def middle_k(ks: Collection[float]) -> float:
    """The k that pictures of a single k show."""
    return sorted(ks)[len(ks) // 2]


def figures_of(usage: Usage, figures: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of one SAE on a split, from its `Subject.evaluate`."""
    law = usage.zipf_law()
    return {
        **figures,
        "very_rare_features": usage.features_rarer_than(VERY_RARE_DENSITY),
        "zipf": None
        if law is None
        # JSON has no NaN, the R^2 of a flat curve
        else {k: v if math.isfinite(v) else None for k, v in asdict(law).items()},
    }


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean, smallest and largest value over the seeds, of every number measured."""
    flat = [_numbers(run) for run in runs]
    return {
        name: {
            "mean": sum(row[name] for row in flat) / len(flat),
            "min": min(row[name] for row in flat),
            "max": max(row[name] for row in flat),
        }
        for name in flat[0]
        if all(name in row for row in flat)  # a law may be missing for a seed
    }


def _numbers(run: Mapping[str, Any]) -> dict[str, float]:
    measured = run["measured"]
    numbers = {
        "seconds": run["seconds"],
        "peak_memory_bytes": run["peak_memory_bytes"],
        **{name: value for name, value in measured.items() if not _is_nested(value)},
    }
    for name, value in (measured["zipf"] or {}).items():
        if value is not None:
            numbers[f"zipf_{name}"] = value
    return numbers


def _is_nested(value: Any) -> bool:
    return value is None or isinstance(value, dict | list)


def point_results(
    choice: Choice,
    runs: Sequence[tuple[Cell, Mapping[str, Any]]],
    results: Results,
) -> dict[str, Any]:
    """
    One row at one k.

    Args:
        runs: The chosen settings' cells, with their `figures_of`.
        results: What training each cell gave.
    """
    measured = [
        {
            "seed": cell.seed,
            "folder": f"cells/{cell.key}",
            "seconds": results[cell.key]["seconds"],
            "peak_memory_bytes": results[cell.key]["peak_memory_bytes"],
            "l0_before_calibration": results[cell.key]["l0_before_calibration"],
            "validation": results[cell.key]["validation"][f"{choice.k:g}"],
            "measured": figures,
        }
        for cell, figures in runs
    ]
    cell = choice.cell
    return {
        "row": choice.row,
        "k": choice.k,
        "chosen": None
        if cell is None
        else {"lr": cell.lr, "sparsity": {cell.sparsity_key: cell.sparsity}},
        "tried": choice.tried,
        "runs": measured,
        "over_seeds": summary(measured) if measured else {},
    }


def comparison_results(
    subject: Mapping[str, Any],
    settings: Mapping[str, Any],
    machine: Mapping[str, Any],
    points: Sequence[Mapping[str, Any]],
    allocation: Mapping[str, Any] | None,
    complete: bool,
) -> dict[str, Any]:
    """The whole of `results.json`; `results.schema.json` describes it."""
    return {
        "schema_version": SCHEMA_VERSION,
        "complete": complete,
        "subject": subject,
        "settings": settings,
        "machine": machine,
        "versions": {
            "sae_lens_alloc": sae_lens_alloc.__version__,
            "sae_lens": sae_lens.__version__,
            "torch": torch.__version__,
        },
        "points": points,
        "allocation": allocation,
    }
