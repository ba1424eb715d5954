"""Markdown tables of what `python -m benchmarks` and `benchmarks.pipeline` measured."""

import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

AXES = {"d_sae": "d_sae", "batch": "B", "k": "k"}
REFERENCE = "SAELens batchtopk"
# The two phases of the default recipe, and what a reader compares them with first.
RECIPE = ("mutual_choice, first quarter", "mutual_choice")
SHORT = (
    *RECIPE,
    *("SAELens batchtopk", "SAELens topk", "SAELens jumprelu"),
    *("sparsify topk", "dictionary_learning batchtopk"),
)
Row = dict[str, Any]


def measured_on(report: Row) -> str:
    """The shape, the machine and the versions, in a sentence."""
    centre = report["centre_shape"]
    return (
        f"d_in {centre['d_in']} → d_sae {centre['d_sae']}, k {centre['k']}, "
        f"B {centre['batch']}, {'bfloat16 autocast' if report['autocast'] else 'float32'}; "
        f"{_where_and_with(report)}."
    )


def _where_and_with(report: Row) -> str:
    versions = report["versions"].items()
    packages = ", ".join(f"{name} {version}" for name, version in versions)
    return f"{report['machine']}; {packages}"


def limits(report: Row) -> str:
    """What the sweeps leave out."""
    return (
        f"A sweep leaves out what would take over {report['limits']['memory_gb']} GB or over "
        f"{report['limits']['step_seconds']:g} s a step, extrapolated from the centre; its "
        "cell says so, and an empty cell was not measured."
    )


def recipe_lead(report: Row) -> str:
    """How many times as fast as the reference the recipe is, where, and on what machine."""
    rows = measured(report["centre"])
    ratios = [_times_faster(row, rows) for row in rows if row["subject"] in RECIPE]
    slowest, fastest = min(ratios, key=float), max(ratios, key=float)
    return (
        f"A training step of the default recipe is **{slowest} to {fastest} times as fast** as "
        "one of SAELens' `batchtopk`. The range is over both phases of the recipe, without dead "
        f"features and with a tenth of them dead. Measured with {measured_on(report)}"
    )


def centre_table(report: Row, subjects: tuple[str, ...] | None = None) -> str:
    """Every subject at the centre, or only the named ones, beside the floor of all of them."""
    rows = measured(report["centre"])
    if not rows:
        return "Nothing is measured at the centre yet."
    floor = floor_seconds(rows)
    batch = report["centre_shape"]["batch"]
    lines = [
        f"| training step | dead features | seconds (min–max) | × floor | {REFERENCE} / this "
        "| tokens/s | working memory |",
        "|---|---|---|---|---|---|---|",
        f"| floor | | {_spread(floor)} | 1.00 | | {batch / statistics.median(floor):,.0f} | |",
    ]
    shown = [row for row in rows if subjects is None or row["subject"] in subjects]
    for row in shown:
        lines.append(
            f"| {row['subject']} | {'10%' if row['aux'] else 'none'} "
            f"| {_spread(row['seconds'])} | {times_floor(row):.2f} "
            f"| {_times_faster(row, rows)} | {batch / seconds(row):,.0f} "
            f"| {_megabytes(row['working_bytes'])} |"
        )
    return "\n".join(lines)


def time_table(report: Row, axis: str) -> str:
    """Seconds of a step along an axis, as multiples of the floor too, and their growth."""
    return _sweep_table(
        report,
        axis,
        lambda row: f"{seconds(row):.2f} s ({times_floor(row):.1f})",
        seconds,
    )


def memory_table(report: Row, axis: str) -> str:
    """Working memory of a step along an axis, and its growth."""
    return _sweep_table(
        report,
        axis,
        lambda row: _megabytes(row["working_bytes"]),
        lambda row: row["working_bytes"],
    )


def memory_line_table(report: Row) -> str:
    """Working memory of ours over d_sae, beside a dense matrix and beside the estimate."""
    lines = [
        "| d_sae | SAE | parameters, gradients, Adam | working memory | estimate of it "
        "| one dense B × d_sae matrix | estimate / measured, all in all |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = measured(report["memory"])
    for row in sorted(rows, key=lambda row: (row["subject"], row["d_sae"])):
        persistent, working = row["persistent_bytes"], row["working_bytes"]
        estimate = row["estimated_working_bytes"]
        lines.append(
            f"| {row['d_sae']:,} | {row['subject']} | {_megabytes(persistent)} "
            f"| {_megabytes(working)} | {_megabytes(estimate)} "
            f"| {_megabytes(4 * row['batch'] * row['d_sae'])} "
            f"| {(persistent + estimate) / (persistent + working):.2f} |"
        )
    return "\n".join(lines)


def sweep(report: Row, axis: str) -> dict[str, list[Row]]:
    """For each subject the rows along an axis, the centre included, in ascending order."""
    centre = report["centre_shape"]
    fixed = {key: value for key, value in centre.items() if key != axis}
    subjects = dict.fromkeys(row["subject"] for row in report["sweeps"])
    rows = report["centre"] + report["sweeps"]
    return {
        subject: sorted(
            (
                row
                for row in rows
                if row["subject"] == subject and fixed.items() <= row.items()
            ),
            key=lambda row: row[axis],
        )
        for subject in subjects
    }


def measured(rows: list[Row]) -> list[Row]:
    return [row for row in rows if "skipped" not in row]


def seconds(row: Row) -> float:
    return statistics.median(row["seconds"])


def floor_seconds(rows: list[Row]) -> list[float]:
    return [value for row in measured(rows) for value in row["floor_seconds"]]


def times_floor(row: Row) -> float:
    """Median of the ratios within each round."""
    return statistics.median(
        a / b for a, b in zip(row["seconds"], row["floor_seconds"], strict=True)
    )


def slope(points: list[tuple[float, float]]) -> float:
    """Exponent of the growth: slope of the least-squares line through the logarithms."""
    x, y = np.log(np.array(points, dtype=float)).T
    return float(np.polyfit(x, y, 1)[0])


def _sweep_table(
    report: Row, axis: str, cell: Callable[[Row], str], cost: Callable[[Row], float]
) -> str:
    by_subject = sweep(report, axis)
    values = sorted({row[axis] for rows in by_subject.values() for row in rows})
    lines = [
        f"| {AXES[axis]} | {' | '.join(f'{value:,}' for value in values)} | grows as |",
        "|---" * (len(values) + 2) + "|",
    ]
    for subject, rows in by_subject.items():
        at = {row[axis]: row for row in rows}
        cells = [
            "" if value not in at else at[value].get("skipped") or cell(at[value])
            for value in values
        ]
        points = [(row[axis], cost(row)) for row in measured(rows)]
        growth = f"{AXES[axis]}^{slope(points):.2f}" if len(points) > 1 else ""
        lines.append(f"| {subject} | {' | '.join(cells)} | {growth} |")
    return "\n".join(lines)


# Rows of the table of the whole pipeline in the order of a run, by what a `Clock` calls them.
PIPELINE_LABELS = {
    "imports": "imports",
    "start-up": "start-up: model, text, SAE, held-out activations",
    "language model": "language model",
    "activation store": "activation store: tokens, mixing buffer",
    "SAE forward": "SAE forward",
    "SAE backward": "SAE backward",
    "replayed step": "SAE forward and backward, replayed",
    "optimizer": "gradient clipping, optimizer",
    "trainer": "rest of the step: firing statistics, schedules",
    "metrics": "metrics",
    "held-out metrics": "metrics on held-out activations",
    "calibration activations": "calibration: activations of 65k tokens",
    "calibration": "calibration: thresholds",
    "saving and check": "saving and self check",
    "other": "other",
}
PIPELINE_PARTS = tuple(PIPELINE_LABELS.values())


def pipeline_table(report: Row) -> str:
    """Seconds and shares of the parts of a training run, a column for each variant."""
    variants = report["variants"]
    tokens = [f"{run['training_tokens']:,}" for run in variants.values()]
    lines = [
        f"`sae-lens-alloc train {report['config']}` on {tokens[0]} tokens; "
        f"{_where_and_with(report)}.\n",
        f"| | {' | '.join(variants)} |",
        "|---" * (len(variants) + 1) + "|",
        f"| training tokens | {' | '.join(tokens)} |",
    ]
    runs = [pipeline_parts(run["seconds"]) for run in variants.values()]
    totals = [sum(run.values()) for run in runs]
    for part in PIPELINE_PARTS:
        cells = [
            f"{run[part]:.1f} s ({run[part] / total:.1%})" if part in run else ""
            for run, total in zip(runs, totals, strict=True)
        ]
        if any(cells):
            lines.append(f"| {part} | {' | '.join(cells)} |")
    whole = " | ".join(f"**{total:.1f} s**" for total in totals)
    lines.append(f"| **whole** | {whole} |")
    background = [
        f"{sum(run['background_seconds'].values()):.1f} s"
        if run["background_seconds"]
        else ""
        for run in variants.values()
    ]
    lines.append(f"| in a thread beside it | {' | '.join(background)} |")
    speeds = " | ".join(
        f"{run['training_tokens'] / _training_seconds(run):,.0f}"
        for run in variants.values()
    )
    lines.append(f"| tokens/s of the training loop | {speeds} |")
    return "\n".join(lines)


def pipeline_parts(seconds: dict[str, float]) -> dict[str, float]:
    """Seconds by row of the table, from what a `Clock` counted."""
    parts: defaultdict[str, float] = defaultdict(float)
    for stack, value in seconds.items():
        parts[PIPELINE_LABELS[_pipeline_part(stack.split(";")[1:])]] += value
    return dict(parts)


def _pipeline_part(names: list[str]) -> str:
    match names:
        case ["calibration", *within] if "activation store" in within:
            return "calibration activations"
        case ["imports" | "start-up" | "calibration" | "saving and check" as part, *_]:
            return part
        case ["training", *_, innermost]:
            return innermost
        case _:
            return "other"


def _training_seconds(run: Row) -> float:
    return sum(
        value
        for stack, value in run["seconds"].items()
        if stack.startswith("run;training")
    )


def _times_faster(row: Row, rows: list[Row]) -> str:
    """Time of the reference with the same auxiliary loss, in units of this row's."""
    for other in rows:
        if other["subject"] == REFERENCE and other["aux"] == row["aux"]:
            return f"{times_floor(other) / times_floor(row):.1f}"
    return ""


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def _megabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:,.0f} MB"
