"""Measures the chosen SAEs of a comparison on the split of its figures."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sae_lens_alloc.comparison.cell import cell_folder, sae_folder
from sae_lens_alloc.comparison.choice import Choice, trained_runs
from sae_lens_alloc.comparison.config import ComparisonConfig
from sae_lens_alloc.comparison.finished import (
    RESULTS_FILENAME,
    Cells,
    Failures,
    measured_at,
)
from sae_lens_alloc.comparison.progress import progress_bar
from sae_lens_alloc.comparison.shared_activations import SharedActivations
from sae_lens_alloc.errors import as_reason
from sae_lens_alloc.evaluation.figures import FIGURES_FILENAME, figures_of
from sae_lens_alloc.json_files import write_json
from sae_lens_alloc.saes.saved_sae import load_sae


def measure_chosen(
    config: ComparisonConfig,
    choices: Sequence[Choice],
    known: Cells,
    activations: SharedActivations,
    output: Path,
    console: Console,
) -> Failures:
    """
    Measures the SAEs of the chosen settings that have not been measured, and writes the figures
    to their folders.

    Args:
        config: The comparison.
        choices: The chosen settings.
        known: Results of the finished cells.
        activations: The activations to measure on. They are written if they are not there.
        output: Folder of the comparison.
        console: Where the progress is shown.

    Returns:
        Reasons why cells could not be measured, by key.

    Raises:
        ValueError: if an SAE that has to be measured is not in its folder.
    """
    split, cells = config.measured_on, config.cells()
    unmeasured = [
        (cell, sae_folder(cell_folder(output, cell.key), choice.k))
        for choice in choices
        for cell in trained_runs(cells, choice, known)
        if measured_at(known[cell.key], split, choice.k) is None
    ]
    for _, path in unmeasured:
        _require_sae(path, split)
    device = config.stream_run().device
    failures: Failures = {}
    with progress_bar(console) as progress:
        for cell, path in progress.track(
            unmeasured, description=f"Measuring on the {split} split"
        ):
            activations.needed()
            try:
                _measure(path, device, activations, split)
            except Exception as error:  # one SAE must not stop the others
                failures[cell.key] = (
                    f"{path.name} on the {split} split: {as_reason(error)}"
                )
    return failures


def _measure(
    folder: Path, device: str, activations: SharedActivations, split: str
) -> None:
    usage, figures = activations.subject.evaluate(
        load_sae(folder, device).eval(), activations.needed(), split
    )
    if not math.isfinite(usage.explained_variance):
        raise ValueError(f"the explained variance is {usage.explained_variance}")
    path = folder / FIGURES_FILENAME.format(split=split)
    write_json(path, figures_of(usage, figures))


def _require_sae(folder: Path, split: str) -> None:
    if not folder.exists():
        raise ValueError(
            f"the SAE of {str(folder)!r} is to be measured on the {split} split, but only "
            f"its figures are left: remove {RESULTS_FILENAME} and its folder in cells/ to "
            "train it again."
        )
