"""What `report SAE` and `compare SAE1 SAE2` do with SAEs that one already has."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import sae_lens
import torch
from rich.console import Console
from sae_lens import SAE
from sae_lens.config import LanguageModelSAERunnerConfig

from sae_lens_alloc.activations.names import name_for_others
from sae_lens_alloc.comparison.given_figures import (
    GivenFigures,
    history_of,
    measure_given_saes,
)
from sae_lens_alloc.evaluation.figures import figures_of
from sae_lens_alloc.evaluation.report import write_report
from sae_lens_alloc.evaluation.report_run import ReportRun
from sae_lens_alloc.evaluation.results_table import results_table
from sae_lens_alloc.json_files import write_json
from sae_lens_alloc.training.output_folder import new_files
from sae_lens_alloc.version import __version__

REPORT_FILENAME = "report.html"
FIGURES_OF_GIVEN = "figures.json"
ABOUT_TEXT = (
    "Every SAE was run as a user would run it, on {{n_tokens:,}} tokens of {text}. Whether it was "
    "trained on them, this page does not know."
)


def report_given_sae(
    name: str,
    saes: Mapping[str, SAE[Any]],
    cfg: LanguageModelSAERunnerConfig[Any],
    n_tokens: int,
    output: Path,
) -> ReportRun:
    """
    Measures an SAE and writes the page about it.

    Args:
        name: Its folder, whose training metrics are shown if there are any, or RELEASE:ID.
        saes: The SAE by its short name.
        cfg: As for `measure_given_saes`.
        n_tokens: As for `measure_given_saes`.
        output: HTML file to write.

    Returns:
        What the page shows.

    Raises:
        ValueError: as `measure_given_saes`.
        OSError: if the page cannot be written.
    """
    found = measure_given_saes(saes, cfg, n_tokens)
    (run,) = (replace(one, history=history_of(name)) for one in found.as_saved)
    with new_files(output.parent, "the report") as folder:
        _write_page(
            folder / output.name,
            f"The SAE {run.name}",
            "One sparse autoencoder, as it is saved.",
            replace(found, as_saved=[run]),
            cfg,
        )
    return run


def compare_given_saes(
    saes: Mapping[str, SAE[Any]],
    cfg: LanguageModelSAERunnerConfig[Any],
    n_tokens: int,
    target_l0: float | None,
    output: Path,
    console: Console,
) -> None:
    """
    Measures SAEs as they are saved and at equal L0, prints two tables, and writes `report.html`
    and `figures.json`.

    Args:
        saes: As for `measure_given_saes`.
        cfg: As for `measure_given_saes`.
        n_tokens: As for `measure_given_saes`.
        target_l0: As for `measure_given_saes`.
        output: Folder to write to.
        console: Where to print.

    Raises:
        ValueError: as `measure_given_saes`.
        OSError: if something cannot be written.
    """
    found = measure_given_saes(saes, cfg, n_tokens, True, target_l0)
    equal = found.equal_l0
    assert equal is not None
    text = name_for_others(cfg.dataset_path)
    tables = {"As saved": found.as_saved, f"At L0 {equal.target_l0:.4g}": equal.runs}
    for title, runs in tables.items():
        if runs:
            about = f"{title}, on {{n_tokens:,}} tokens of {text}"
            console.print(results_table(runs, about))
    for name, why in equal.left_out.items():
        console.print(f"{name} is left out at equal L0: {why}", markup=False)
    with new_files(output, "the comparison") as folder:
        write_json(folder / FIGURES_OF_GIVEN, _figures(found, cfg))
        _write_page(
            folder / REPORT_FILENAME,
            "SAEs at equal sparsity",
            f"{len(saes)} sparse autoencoders of the same activations, as they are saved and, where "
            "their thresholds can be moved, at the same number of features per token.",
            found,
            cfg,
        )


def _write_page(
    path: Path,
    title: str,
    intro: str,
    found: GivenFigures,
    cfg: LanguageModelSAERunnerConfig[Any],
) -> None:
    text = name_for_others(cfg.dataset_path)
    write_report(
        path,
        title,
        intro,
        found.as_saved,
        found.snippets,
        {
            "activations": f"{name_for_others(cfg.model_name)} at {cfg.hook_name}",
            "dimensions": f"{cfg.sae.d_in:,}",
            "text": text,
        },
        about_text=ABOUT_TEXT.format(text=text),
        equal_l0=found.equal_l0,
    )


def _figures(
    found: GivenFigures, cfg: LanguageModelSAERunnerConfig[Any]
) -> dict[str, Any]:
    """The content of `figures.json`."""

    def of(runs: Sequence[ReportRun]) -> dict[str, Any]:
        return {
            run.name: figures_of(run.evaluation, run.evaluation.to_dict())
            for run in runs
        }

    equal = found.equal_l0
    return {
        "model": cfg.model_name,
        "hook": cfg.hook_name,
        "text": cfg.dataset_path,
        "versions": {
            "sae_lens_alloc": __version__,
            "sae_lens": sae_lens.__version__,
            "torch": torch.__version__,
        },
        "as_saved": of(found.as_saved),
        "at_equal_l0": None
        if equal is None
        else {
            "target_l0": equal.target_l0,
            "saes": of(equal.runs),
            "left_out": equal.left_out,
        },
    }
