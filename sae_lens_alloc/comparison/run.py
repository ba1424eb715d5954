"""Runs a comparison: activations, training, choice, calibration, test, results, report."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from sae_lens_alloc.comparison.allocation_picture import shown_allocation
from sae_lens_alloc.comparison.cell import Cell
from sae_lens_alloc.comparison.choice import (
    Choice,
    choose,
    other_seeds,
    trained_runs,
)
from sae_lens_alloc.comparison.config import ComparisonConfig, load_comparison
from sae_lens_alloc.comparison.finished import (
    RESULTS_FILENAME,
    Cells,
    Failures,
    earlier_results,
    known_cells,
    known_failures,
    measured_at,
)
from sae_lens_alloc.comparison.measuring import measure_chosen
from sae_lens_alloc.comparison.pool import (
    LOG_FILENAME,
    default_jobs,
    threads_per_job,
    train_cells,
)
from sae_lens_alloc.comparison.progress import progress_bar
from sae_lens_alloc.comparison.report import write_comparison_report
from sae_lens_alloc.comparison.results import (
    comparison_results,
    point_results,
    write_results,
)
from sae_lens_alloc.comparison.shared_activations import SharedActivations
from sae_lens_alloc.comparison.stream import Stream
from sae_lens_alloc.comparison.subject import Subject

CONFIG_FILENAME = "comparison.yaml"
REPORT_FILENAME = "report.html"


def run_comparison(
    config_path: Path,
    overrides: Sequence[str],
    output: Path,
    jobs: int | None,
    finished: bool,
    console: Console,
) -> None:
    """
    Trains the missing SAEs of a comparison, evaluates all, and writes `results.json` and
    `report.html`. Cells that have finished in `output`, or by its `results.json`, are kept and
    not trained again. A cell that fails is listed in the results, and the next command tries it
    again.

    Args:
        config_path: The YAML file, see `load_comparison`.
        overrides: Settings that replace the file's.
        output: Folder for the activations, the SAEs, the results and the report.
        jobs: Cells to train side by side. None means one, or one on each GPU.
        finished: Whether to train nothing, and to compare the cells that have finished.
        console: Where the progress is shown.

    Raises:
        ValueError: if the config is wrong, the folder holds something else or a damaged file,
            no cell has finished, or, at the end, a cell has failed.
    """
    config, settings = load_comparison(config_path, overrides)
    jobs = jobs or default_jobs(config.stream_run().device)
    activations = SharedActivations(config, output, console)
    earlier = earlier_results(output)
    if not finished:
        _claim(output, settings)
        stored = activations.stored()
        if stored is not None:
            stored.verify()

    def train(cells: Sequence[Cell], what: str, known: Cells) -> Cells:
        if finished:
            return known
        return _train_missing(cells, what, known, activations, output, jobs, console)

    at_start = known_cells(output)
    cells = config.cells()
    first = [cell for cell in cells if cell.seed == config.seeds[0]]
    known = train(first, "Training, first seed", at_start)
    choices = choose(first, known, known_failures(output, known))
    chosen = other_seeds(cells, choices)
    known = train(chosen, "Training, all seeds", known)
    failures = known_failures(output, known)
    if not any(cell.key in known for cell in cells):
        _report_failures(cells, failures, output)
        raise ValueError(
            f"no SAE of this comparison has finished in {str(output)!r}: train some without "
            "--finished, or give the output of a comparison with these settings."
        )
    failures |= measure_chosen(config, choices, known, activations, output, console)
    known = known_cells(output)

    points = _points(config, choices, known)
    # without activations here, only an earlier results.json says what they were
    stored = activations.needed() if earlier is None else activations.stored()
    document = comparison_results(
        _subject_facts(config, activations.subject, stored, earlier),
        settings,
        # the machine that trained, which may be another
        earlier["machine"]
        if earlier is not None and known.keys() == at_start.keys()
        else _machine(config.stream_run().device, jobs),
        points,
        known,
        failures,
        shown_allocation(config, points, output, stored, earlier),
        complete=all(cell.key in known for cell in [*first, *chosen]),
    )
    write_results(output / RESULTS_FILENAME, document)
    write_comparison_report(output / REPORT_FILENAME, document)
    console.print(f"Saved in {output}; open {output / REPORT_FILENAME} in a browser")
    _report_failures(cells, failures, output)


def _train_missing(
    cells: Sequence[Cell],
    what: str,
    known: Cells,
    activations: SharedActivations,
    output: Path,
    jobs: int,
    console: Console,
) -> Cells:
    """Trains the cells that are not in `known`, and returns all that have finished since."""
    missing = [cell for cell in cells if cell.key not in known]
    if not missing:
        return known
    activations.needed()
    with progress_bar(console) as progress:
        task = progress.add_task(
            what, total=len(cells), completed=len(cells) - len(missing)
        )
        train_cells(
            missing,
            output / CONFIG_FILENAME,
            activations.folder,
            output,
            jobs,
            lambda: progress.advance(task),
        )
    return known_cells(output)


def _points(
    config: ComparisonConfig, choices: Sequence[Choice], known: Cells
) -> list[dict[str, Any]]:
    """The results of each row at each k, from the cells that have been measured."""
    split, cells = config.measured_on, config.cells()
    return [
        point_results(
            choice,
            [
                cell
                for cell in trained_runs(cells, choice, known)
                if measured_at(known[cell.key], split, choice.k) is not None
            ],
            known,
            split,
        )
        for choice in choices
    ]


def _claim(output: Path, settings: Mapping[str, Any]) -> None:
    """
    Makes the output folder, with the settings of the comparison in it.

    Raises:
        ValueError: if it holds something that is not a comparison.
    """
    if (
        output.exists()
        and any(output.iterdir())
        and not (output / CONFIG_FILENAME).exists()
        and not (output / RESULTS_FILENAME).exists()
    ):
        raise ValueError(
            f"{str(output)!r} holds something that is not a comparison: give another folder."
        )
    output.mkdir(parents=True, exist_ok=True)
    (output / CONFIG_FILENAME).write_text(
        yaml.safe_dump(settings, sort_keys=False), encoding="utf-8"
    )


def _report_failures(cells: Sequence[Cell], failures: Failures, output: Path) -> None:
    """Raises ValueError if one of the cells has failed."""
    failed = [cell.key for cell in cells if cell.key in failures]
    if failed:
        whys = "; ".join(f"{key}: {failures[key]}" for key in failed)
        raise ValueError(
            f"{len(failed)} of {len(cells)} SAEs failed, which the same command tries again "
            f"({LOG_FILENAME} in their folder in {str(output / 'cells')!r} says more): {whys}."
        )


def _subject_facts(
    config: ComparisonConfig,
    subject: Subject,
    stream: Stream | None,
    earlier: Mapping[str, Any] | None,
) -> dict[str, Any]:
    if stream is None:
        # nothing was trained or measured here, so the earlier results have all that is known
        assert earlier is not None
        return earlier["subject"]
    return {
        **subject.facts(),
        "d_in": stream.d_in,
        "d_sae": config.shared["sae"]["d_sae"],
        "tokens": stream.counts,
    }


def _machine(device: str, jobs: int) -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name()
        if torch.device(device).type == "cuda"
        else device,
        "jobs": jobs,
        "threads_per_job": threads_per_job(jobs),
    }
