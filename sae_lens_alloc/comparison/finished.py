"""The trained SAEs of a comparison, from their folders and from a results.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lens_alloc.comparison.cell import FAILURE_FILENAME, RESULT_FILENAME
from sae_lens_alloc.evaluation.figures import FIGURES_FILENAME
from sae_lens_alloc.json_files import finite_or_null
from sae_lens_alloc.saes.saved_sae import read_json_mapping

RESULTS_FILENAME = "results.json"
SCHEMA_VERSION = 2
SPLITS_MEASURED = ("validation", "test")
# The results of each finished cell, by its key.
Cells = dict[str, dict[str, Any]]
# Why a cell could not be trained or measured, by its key.
Failures = dict[str, str]
NOT_FINITE = "its explained variance on the validation split is not a number"


def earlier_results(output: Path) -> dict[str, Any] | None:
    """
    The results.json of an output folder, None if there is none.

    Raises:
        ValueError: if no comparison of this version wrote it.
    """
    path = output / RESULTS_FILENAME
    if not path.exists():
        return None
    try:
        results = read_json_mapping(path)
    except ValueError:
        results = {}
    needed = {"subject", "machine", "cells", "allocation"}
    if (
        results.get("schema_version") != SCHEMA_VERSION
        or not needed <= results.keys()
        or not isinstance(results["cells"], dict)
    ):
        raise ValueError(
            f"{str(path)!r} holds something that is not a comparison of this version, and "
            "would be overwritten: move it away, or give another folder."
        )
    return results


def known_cells(output: Path) -> Cells:
    """
    The cells that have finished, in this folder or by its results.json. A results.json may
    come from another machine; its figures count without the SAEs. A cell whose figures are not
    numbers has not finished, and is trained again.

    Raises:
        ValueError: if a file is damaged.
    """
    cells: Cells = dict((earlier_results(output) or {"cells": {}})["cells"])
    for path in sorted(output.glob(f"cells/*/{RESULT_FILENAME}")):
        facts = _facts(path)
        if _has_no_figures(facts):
            continue
        del facts["settings"]  # the comparison has them
        earlier = cells.get(path.parent.name, {})
        # earlier figures do not count if the cell has been trained again
        same = earlier.get("seconds") == facts["seconds"]
        kept = earlier["measured"] if same else {}
        measured = {
            split: {**kept.get(split, {}), **_figures(path.parent, split)}
            for split in SPLITS_MEASURED
        }
        facts["measured"] = {split: by_k for split, by_k in measured.items() if by_k}
        cells[path.parent.name] = facts
    return cells


def known_failures(output: Path, known: Cells) -> Failures:
    """Reasons of failed cells, in this folder or by its results.json, that have not finished since."""
    failures: Failures = dict((earlier_results(output) or {}).get("failed", {}))
    for path in output.glob(f"cells/*/{RESULT_FILENAME}"):
        if _has_no_figures(_facts(path)):
            failures[path.parent.name] = NOT_FINITE
    for path in output.glob(f"cells/*/{FAILURE_FILENAME}"):
        failures[path.parent.name] = str(read_json_mapping(path).get("reason"))
    return {key: why for key, why in sorted(failures.items()) if key not in known}


def _facts(path: Path) -> dict[str, Any]:
    facts = finite_or_null(read_json_mapping(path))
    missing = {"settings", "seconds", "validation"} - facts.keys()
    if missing:
        raise ValueError(
            f"{str(path)!r} is damaged, since it does not say its {', '.join(sorted(missing))}: "
            "remove it, and the same command trains this SAE again."
        )
    return facts


def _has_no_figures(facts: Mapping[str, Any]) -> bool:
    """Whether a training has diverged without an error when it ended."""
    return any(
        point.get("explained_variance", 0.0) is None
        for point in facts["validation"].values()
    )


def measured_at(
    facts: Mapping[str, Any], split: str, k: float
) -> dict[str, Any] | None:
    """Figures of a cell on a split with k features per token, None if not measured."""
    return facts["measured"].get(split, {}).get(f"{k:g}")


def _figures(folder: Path, split: str) -> dict[str, Any]:
    """Figures of the SAEs in the folder of a cell on a split, by k."""
    figures: dict[str, Any] = {}
    for path in sorted(folder.glob(f"l0-*/{FIGURES_FILENAME.format(split=split)}")):
        try:
            figures[path.parent.name.removeprefix("l0-")] = read_json_mapping(path)
        except ValueError:  # half-written by a run that was killed, so measured again
            continue
    return figures
