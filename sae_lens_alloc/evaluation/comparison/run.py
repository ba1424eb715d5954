"""Runs a comparison: activations, training, choice, calibration, test, results, report."""

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from sae_lens import SAE
from safetensors.torch import load_file, save_file

from sae_lens_alloc.evaluation.comparison.allocation_picture import allocation_picture
from sae_lens_alloc.evaluation.comparison.cell import Cell, sae_folder
from sae_lens_alloc.evaluation.comparison.choice import (
    Results,
    choose,
    other_seeds,
    validation_ev,
)
from sae_lens_alloc.evaluation.comparison.config import (
    ComparisonConfig,
    digest,
    load_comparison,
)
from sae_lens_alloc.evaluation.comparison.language_model import LanguageModelSubject
from sae_lens_alloc.evaluation.comparison.pool import (
    default_jobs,
    threads_per_job,
    train_cells,
)
from sae_lens_alloc.evaluation.comparison.report import write_comparison_report
from sae_lens_alloc.evaluation.comparison.results import (
    comparison_results,
    figures_of,
    middle_k,
    point_results,
)
from sae_lens_alloc.evaluation.comparison.stream import StoredStream, stored_stream
from sae_lens_alloc.evaluation.comparison.subject import Subject
from sae_lens_alloc.evaluation.comparison.synthetic import SyntheticSubject
from sae_lens_alloc.evaluation.usage import Usage

CONFIG_FILENAME = "comparison.yaml"
RESULTS_FILENAME = "results.json"
REPORT_FILENAME = "report.html"
# of what was measured on a split
FIGURES_FILENAME = "{split}.json"
DENSITIES_FILENAME = "{split}-densities.safetensors"


def run_comparison(
    config_path: Path,
    overrides: Sequence[str],
    output: Path,
    jobs: int | None,
    finished: bool,
    console: Console,
) -> None:
    """
    Trains what is missing of a comparison, evaluates, and writes `results.json` and
    `report.html`. Whatever is in `output` already is kept and not done again.

    Args:
        config_path: See `load_comparison`.
        overrides: Settings that replace the file's.
        output: Folder for the activations, the SAEs, the results and the report.
        jobs: Cells to train side by side; None for one, or one on each GPU.
        finished: Compares what has finished so far, and trains nothing.

    Raises:
        ValueError: if the config is wrong, the folder holds something else, a cell fails, or
            nothing has finished that should have.
    """
    config, settings = load_comparison(config_path, overrides)
    device = config.stream_run().device
    jobs = jobs or default_jobs(device)
    subject = make_subject(config)
    folder = output / f"activations-{digest(config.stream_settings())}"
    stream = stored_stream(folder)
    copy = output / CONFIG_FILENAME
    if not finished:
        _claim(output)
        copy.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        if stream is None:
            console.print("Storing the activations that all SAEs train on")
            stream = subject.write(folder)

    def train(cells: Sequence[Cell], what: str) -> Results:
        """What training gave, of all of them or of those that have finished."""
        if not finished:
            done = sum(cell.result(output) is not None for cell in cells)
            with _progress(console) as progress:
                task = progress.add_task(what, total=len(cells), completed=done)
                train_cells(
                    cells, copy, folder, output, jobs, lambda: progress.advance(task)
                )
        found = {cell.key: cell.result(output) for cell in cells}
        return {key: result for key, result in found.items() if result is not None}

    cells = config.cells()
    first = [cell for cell in cells if cell.seed == config.seeds[0]]
    results = train(first, "Training, first seed")
    choices = choose([cell for cell in first if cell.key in results], results)
    chosen = other_seeds(cells, choices)
    results = {**results, **train(chosen, "Training, all seeds")}
    if stream is None or not results:
        raise ValueError(
            f"no SAE of this comparison has finished in {str(output)!r}: train some without "
            "--finished, or give the output of a comparison with these settings."
        )

    runs = {
        (choice.row, choice.k, cell.seed): (choice, cell)
        for choice in choices
        for cell in other_seeds(cells, [choice])
        if cell.key in results
        and validation_ev(results[cell.key], choice.k) is not None
    }
    split = config.measured_on
    with _progress(console) as progress:
        measured = {
            key: _measure(
                sae_folder(output / "cells" / cell.key, choice.k),
                device,
                subject,
                stream,
                split,
            )
            for key, (choice, cell) in progress.track(
                runs.items(), description=f"Measuring on the {split} split"
            )
        }
    points = [
        point_results(
            choice,
            [
                (cell, measured[key])
                for key, (of_choice, cell) in runs.items()
                if of_choice is choice
            ],
            results,
        )
        for choice in choices
    ]
    document = comparison_results(
        {
            **subject.facts(),
            "d_in": stream.d_in,
            "d_sae": config.shared["sae"]["d_sae"],
            "tokens": stream.counts,
        },
        settings,
        {
            "machine": platform.machine(),
            "device": torch.cuda.get_device_name()
            if torch.device(device).type == "cuda"
            else device,
            "jobs": jobs,
            "threads_per_job": threads_per_job(jobs),
        },
        points,
        _allocation(config, points, output, stream),
        complete=all(cell.key in results for cell in [*first, *chosen]),
    )
    text = json.dumps(document, indent=1, allow_nan=False)
    (output / RESULTS_FILENAME).write_text(text + "\n")
    usages = {
        (point["row"], point["k"]): load_usage(
            sae_folder(output / point["runs"][0]["folder"], point["k"]), split
        )
        for point in points
        if point["runs"]
    }
    write_comparison_report(output / REPORT_FILENAME, document, usages)
    console.print(f"Saved in {output}; open {output / REPORT_FILENAME} in a browser")


def make_subject(config: ComparisonConfig) -> Subject:
    """What a config compares SAEs on."""
    if config.synthetic is not None:
        return SyntheticSubject(config)
    return LanguageModelSubject(config)


def load_usage(folder: Path, split: str) -> Usage:
    """What an SAE was found to do on a split, from the files beside it."""
    figures = json.loads((folder / FIGURES_FILENAME.format(split=split)).read_text())
    histogram = torch.tensor(figures["l0_histogram"])
    return Usage(
        explained_variance=figures["explained_variance"],
        features_per_token=torch.arange(len(histogram)).repeat_interleave(histogram),
        densities=load_file(folder / DENSITIES_FILENAME.format(split=split))[
            "densities"
        ],
    )


def _claim(output: Path) -> None:
    if (
        output.exists()
        and any(output.iterdir())
        and not (output / CONFIG_FILENAME).exists()
    ):
        raise ValueError(
            f"{str(output)!r} holds something that is not a comparison: give another folder."
        )
    output.mkdir(parents=True, exist_ok=True)


def _measure(
    folder: Path, device: str, subject: Subject, stream: StoredStream, split: str
) -> dict[str, Any]:
    path = folder / FIGURES_FILENAME.format(split=split)
    if not path.exists():
        sae = SAE.load_from_disk(folder, device=device).eval()
        usage, figures = subject.evaluate(sae, stream, split)
        save_file(
            {"densities": usage.densities},
            folder / DENSITIES_FILENAME.format(split=split),
        )
        path.write_text(json.dumps(figures_of(usage, figures), allow_nan=False))
    return json.loads(path.read_text())


def _allocation(
    config: ComparisonConfig,
    points: Sequence[dict[str, Any]],
    output: Path,
    stream: StoredStream,
) -> dict[str, Any] | None:
    """The picture for the first row of ours, else the first row, at the middle k."""
    k = middle_k(config.k)
    shown = [point for point in points if point["k"] == k and point["runs"]]
    if not shown:
        return None
    ours = [
        point
        for point in shown
        if config.rows[point["row"]]["architecture"] == "mutual_choice"
    ]
    point = (ours or shown)[0]
    sae = SAE.load_from_disk(sae_folder(output / point["runs"][0]["folder"], k))
    return {
        "row": point["row"],
        "k": k,
        "rules": allocation_picture(sae, stream.split(config.measured_on)),
    }


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
