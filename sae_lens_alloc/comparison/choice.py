"""Chooses the SAEs that stand for a row, by the validation split alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sae_lens_alloc.comparison.cell import Cell

# The content of `cell.json`, by the key of the cell.
Results = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Choice:
    """
    The settings that stand for a row at one k.

    Args:
        row: Name of the row.
        k: Features per token.
        cell: The best cell of the first seed; None if no cell reaches this L0.
        tried: What was tried with the first seed. Each entry has the explained variance on the
            validation split, None if the L0 was out of reach, or the reason of a failure.
    """

    row: str
    k: float
    cell: Cell | None
    tried: Sequence[Mapping[str, Any]]


def choose(
    cells: Sequence[Cell], results: Results, failures: Mapping[str, str]
) -> list[Choice]:
    """
    The best cell of each row at each k, by explained variance on the validation split.

    Args:
        cells: Cells of one seed.
        results: Results of the trained cells.
        failures: Reasons of failures, by key. Cells with neither are left out.
    """
    tried = [cell for cell in cells if cell.key in results or cell.key in failures]
    points = dict.fromkeys((cell.row, k) for cell in tried for k in cell.target_l0s)
    return [_choose(row, k, tried, results, failures) for row, k in points]


def _choose(
    row: str,
    k: float,
    cells: Sequence[Cell],
    results: Results,
    failures: Mapping[str, str],
) -> Choice:
    candidates = [cell for cell in cells if cell.row == row and k in cell.target_l0s]
    scores = [validation_ev(results.get(cell.key), k) for cell in candidates]
    reached = [
        (score, -i) for i, score in enumerate(scores) if score is not None
    ]  # the first of equals
    return Choice(
        row=row,
        k=k,
        cell=candidates[-max(reached)[1]] if reached else None,
        tried=[
            {
                "lr": cell.lr,
                "sparsity": {cell.sparsity_key: cell.sparsity},
                "validation_explained_variance": score,
                **(
                    {"failed": failures[cell.key]}
                    if cell.key in failures and cell.key not in results
                    else {}
                ),
            }
            for cell, score in zip(candidates, scores, strict=True)
        ],
    )


def validation_ev(result: Mapping[str, Any] | None, k: float) -> float | None:
    """
    Explained variance at an L0 of k on the validation split. None if there is no result, the
    L0 was out of reach, or the figure is not a number.
    """
    if result is None:
        return None
    score = result["validation"][f"{k:g}"].get("explained_variance")
    return score if score is not None and math.isfinite(score) else None


def other_seeds(cells: Sequence[Cell], choices: Sequence[Choice]) -> list[Cell]:
    """The cells of any seed with the settings of a chosen one."""
    chosen = {
        (choice.row, choice.cell.sparsity, choice.cell.lr)
        for choice in choices
        if choice.cell is not None
    }
    return [cell for cell in cells if (cell.row, cell.sparsity, cell.lr) in chosen]


def trained_runs(cells: Sequence[Cell], choice: Choice, results: Results) -> list[Cell]:
    """The trained cells with the chosen settings, one for each seed."""
    return [
        cell
        for cell in other_seeds(cells, [choice])
        if validation_ev(results.get(cell.key), choice.k) is not None
    ]
