"""What is known of the SAEs that have been trained: from their folders, and from a results.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lens_alloc.evaluation.comparison.cell import RESULT_FILENAME

RESULTS_FILENAME = "results.json"
SCHEMA_VERSION = 2
FIGURES_FILENAME = "{split}.json"
SPLITS_MEASURED = ("validation", "test")
# What is known of each cell, by its key.
Cells = dict[str, dict[str, Any]]


def earlier_results(output: Path) -> dict[str, Any] | None:
    """
    The results.json of an output folder, None if there is none.

    Raises:
        ValueError: if it is not what a comparison of this version wrote.
    """
    path = output / RESULTS_FILENAME
    if not path.exists():
        return None
    try:
        results = json.loads(path.read_text())
    except ValueError:
        results = None
    if not isinstance(results, dict) or results.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{str(path)!r} holds something that is not a comparison of this version, and "
            "would be overwritten: move it away, or give another folder."
        )
    return results


def known_cells(output: Path) -> Cells:
    """
    Every cell that has finished in this folder, or had when its results.json was written,
    which may have been elsewhere: without the SAE itself, its figures still stand.
    """
    cells: Cells = dict((earlier_results(output) or {"cells": {}})["cells"])
    for path in sorted(output.glob(f"cells/*/{RESULT_FILENAME}")):
        facts = json.loads(path.read_text())
        del facts["settings"]  # the comparison's
        earlier = cells.get(path.parent.name, {})
        # of a training that was done again, the figures are no longer these
        same = earlier.get("seconds") == facts["seconds"]
        kept = earlier["measured"] if same else {}
        measured = {
            split: {**kept.get(split, {}), **_figures(path.parent, split)}
            for split in SPLITS_MEASURED
        }
        facts["measured"] = {split: by_k for split, by_k in measured.items() if by_k}
        cells[path.parent.name] = facts
    return cells


def measured_at(
    facts: Mapping[str, Any], split: str, k: float
) -> dict[str, Any] | None:
    """What a cell was found to do on a split with k features per token, if measured."""
    return facts["measured"].get(split, {}).get(f"{k:g}")


def _figures(folder: Path, split: str) -> dict[str, Any]:
    """What the SAEs in a cell's folder were found to do on a split, by k."""
    paths = sorted(folder.glob(f"l0-*/{FIGURES_FILENAME.format(split=split)}"))
    return {
        path.parent.name.removeprefix("l0-"): json.loads(path.read_text())
        for path in paths
    }
