"""Runs a comparison: activations, training, choice, calibration, test, results, report."""

import math
import platform
from collections.abc import Mapping, Sequence
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

from sae_lens_alloc.comparison.allocation_picture import allocation_picture
from sae_lens_alloc.comparison.cell import Cell, cell_folder, sae_folder
from sae_lens_alloc.comparison.choice import (
    Choice,
    choose,
    other_seeds,
    validation_ev,
)
from sae_lens_alloc.comparison.config import (
    ComparisonConfig,
    digest,
    load_comparison,
)
from sae_lens_alloc.comparison.finished import (
    FIGURES_FILENAME,
    RESULTS_FILENAME,
    Cells,
    Failures,
    earlier_results,
    known_cells,
    known_failures,
    measured_at,
)
from sae_lens_alloc.comparison.json_files import write_json
from sae_lens_alloc.comparison.language_model import LanguageModelSubject
from sae_lens_alloc.comparison.pool import (
    LOG_FILENAME,
    default_jobs,
    threads_per_job,
    train_cells,
)
from sae_lens_alloc.comparison.report import write_comparison_report
from sae_lens_alloc.comparison.results import (
    comparison_results,
    figures_of,
    middle_k,
    point_results,
    write_results,
)
from sae_lens_alloc.comparison.stream import StoredStream, stored_stream
from sae_lens_alloc.comparison.subject import Subject
from sae_lens_alloc.comparison.synthetic import SyntheticSubject
from sae_lens_alloc.errors import as_reason
from sae_lens_alloc.saes.saved_sae import load_sae

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
    Trains what is missing of a comparison, evaluates, and writes `results.json` and
    `report.html`. Whatever is in `output` already is kept and not done again, and so are the
    cells that its `results.json` tells of, wherever they were trained. A cell that fails is
    told of in the results, and tried again by the next command.

    Args:
        config_path: See `load_comparison`.
        overrides: Settings that replace the file's.
        output: Folder for the activations, the SAEs, the results and the report.
        jobs: Cells to train side by side; None for one, or one on each GPU.
        finished: Compares what has finished so far, and trains nothing.

    Raises:
        ValueError: if the config is wrong, the folder holds something else or a damaged file,
            nothing has finished that should have, or, at the end, a cell has failed.
    """
    config, settings = load_comparison(config_path, overrides)
    device = config.stream_run().device
    jobs = jobs or default_jobs(device)
    subject = make_subject(config)
    folder = output / f"activations-{digest(config.stream_settings())}"
    copy = output / CONFIG_FILENAME
    earlier = earlier_results(output)
    if not finished:
        _claim(output)
        copy.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")

    def stream() -> StoredStream:
        stored = stored_stream(folder)
        if stored is None:
            console.print("Storing the activations that all SAEs train on")
            stored = subject.write(folder)
        return stored

    stored = stored_stream(folder)
    if stored is not None and not finished:
        stored.verify()

    def train(cells: Sequence[Cell], what: str, known: Cells) -> Cells:
        missing = [cell for cell in cells if cell.key not in known]
        if finished or not missing:
            return known
        stream()
        with _progress(console) as progress:
            task = progress.add_task(
                what, total=len(cells), completed=len(cells) - len(missing)
            )
            train_cells(
                missing, copy, folder, output, jobs, lambda: progress.advance(task)
            )
        return known_cells(output)

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

    split = config.measured_on
    unmeasured = [
        (cell, sae_folder(cell_folder(output, cell.key), choice.k))
        for choice in choices
        for cell in _runs(cells, choice, known)
        if measured_at(known[cell.key], split, choice.k) is None
    ]
    for _, path in unmeasured:
        _require_sae(path, split)
    with _progress(console) as progress:
        for cell, path in progress.track(
            unmeasured, description=f"Measuring on the {split} split"
        ):
            activations = stream()
            try:
                _measure(path, device, subject, activations, split)
            except Exception as error:  # of one SAE, which the others can do without
                failures[cell.key] = (
                    f"{path.name} on the {split} split: {as_reason(error)}"
                )
    known = known_cells(output)

    points = [
        point_results(
            choice,
            [
                cell
                for cell in _runs(cells, choice, known)
                if measured_at(known[cell.key], split, choice.k) is not None
            ],
            known,
            split,
        )
        for choice in choices
    ]
    # without activations here, what they were is told by an earlier results.json alone
    stored = stream() if earlier is None else stored_stream(folder)
    document = comparison_results(
        _subject_facts(config, subject, stored, earlier),
        settings,
        # the one that trained, which this command may not have done
        earlier["machine"]
        if earlier is not None and known.keys() == at_start.keys()
        else _machine(device, jobs),
        points,
        known,
        failures,
        _allocation(config, points, output, stored, earlier),
        complete=all(cell.key in known for cell in [*first, *chosen]),
    )
    write_results(output / RESULTS_FILENAME, document)
    write_comparison_report(output / REPORT_FILENAME, document)
    console.print(f"Saved in {output}; open {output / REPORT_FILENAME} in a browser")
    _report_failures(cells, failures, output)


def _runs(cells: Sequence[Cell], choice: Choice, known: Cells) -> list[Cell]:
    """The chosen settings' cells that have been trained, one a seed."""
    return [
        cell
        for cell in other_seeds(cells, [choice])
        if validation_ev(known.get(cell.key), choice.k) is not None
    ]


def _report_failures(cells: Sequence[Cell], failures: Failures, output: Path) -> None:
    """Raises ValueError if one of the cells has failed."""
    failed = [cell.key for cell in cells if cell.key in failures]
    if failed:
        whys = "; ".join(f"{key}: {failures[key]}" for key in failed)
        raise ValueError(
            f"{len(failed)} of {len(cells)} SAEs failed, which the same command tries again "
            f"({LOG_FILENAME} in their folder in {str(output / 'cells')!r} says more): {whys}."
        )


def make_subject(config: ComparisonConfig) -> Subject:
    """What a config compares SAEs on."""
    if config.synthetic is not None:
        return SyntheticSubject(config)
    return LanguageModelSubject(config)


def _claim(output: Path) -> None:
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


def _subject_facts(
    config: ComparisonConfig,
    subject: Subject,
    stream: StoredStream | None,
    earlier: Mapping[str, Any] | None,
) -> dict[str, Any]:
    if stream is None:
        # nothing was trained or measured here, so all that is known is from there
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


def _measure(
    folder: Path, device: str, subject: Subject, stream: StoredStream, split: str
) -> None:
    usage, figures = subject.evaluate(load_sae(folder, device).eval(), stream, split)
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


def _allocation(
    config: ComparisonConfig,
    points: Sequence[dict[str, Any]],
    output: Path,
    stream: StoredStream | None,
    earlier: Mapping[str, Any] | None,
) -> dict[str, Any] | None:
    """
    The picture for the first row of ours at the middle k, else the first row; the earlier one
    where its SAE is not here.
    """
    k = middle_k(config.k)
    shown = [
        (point["row"], sae_folder(cell_folder(output, point["runs"][0]["cell"]), k))
        for point in points
        if point["k"] == k and point["runs"]
    ]
    here = [(row, folder) for row, folder in shown if folder.exists()]
    ours = [
        (row, folder)
        for row, folder in here
        if config.rows[row]["architecture"] == "mutual_choice"
    ]
    picture = None if earlier is None else earlier["allocation"]
    if stream is None or not here or (picture is not None and not ours):
        return picture
    row, folder = (ours or here)[0]
    try:
        sae = load_sae(folder)
    except ValueError:  # damaged since it was measured
        return picture
    activations = stream.split(config.measured_on)
    return {"row": row, "k": k, "rules": allocation_picture(sae, activations)}


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
