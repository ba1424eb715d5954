"""Markdown tables of what `python -m benchmarks gpu` measured."""

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.campaign import FILENAME, PARTS
from benchmarks.gpu.plan import RATES
from benchmarks.gpu.rates import floor_of_rates
from benchmarks.gpu.scale import PRECISIONS
from benchmarks.shape import Shape
from benchmarks.tables import (
    PIPELINE_PARTS,
    REFERENCE,
    pipeline_parts,
    seconds,
    times_floor,
)

Row = dict[str, Any]
NO_RESULT = ("failed", "not_available", "out_of_memory")
METRICS = {
    "F1": ("f1", ".4f"),
    "MCC": ("mcc", ".4f"),
    "uniqueness": ("uniqueness", ".4f"),
    "variance explained": ("explained_variance", ".4f"),
    "L0": ("l0", ".2f"),
    "dead": ("dead_features", ",.0f"),
}


def section_of(results: Path) -> str:
    """The results of a campaign as a section of a document, or how to get them."""
    if not results.exists():
        return (
            "Nothing has been measured on a GPU yet: `python -m benchmarks gpu OUT --minutes 8` "
            f"measures it where there is one, and its `OUT/{FILENAME}`, kept as "
            f"`docs/results/{results.name}`, is what `make docs` shows here."
        )
    return section(json.loads(results.read_text()))


def section(report: Row) -> str:
    """All tables that there is anything for, and what has no result."""
    tables = {
        "Kernels against plain formulas in float64": [kernels_table(report)],
        "A training step": step_tables(report),
        "Memory": [memory_table(report)],
        "The whole pipeline on a random language model": [pipeline_table(report)],
        "SynthSAEBench": [synthetic_table(report)],
        "Without a result": [missing(report)],
    }
    parts = [measured_on(report)]
    for heading, of_part in tables.items():
        if any(of_part):
            parts += [f"### {heading}", *of_part]
    return "\n\n".join(parts)


def measured_on(report: Row) -> str:
    """The card and the versions, in a sentence."""
    versions = ", ".join(f"{name} {v}" for name, v in report["versions"].items())
    card = report["card"]["name"]
    if "memory_bytes" in report["card"]:
        card += f", {report['card']['memory_bytes'] / 1e9:.0f} GB"
    sizes = ", tiny sizes (a rehearsal)" if report["scale"] == "rehearsal" else ""
    return f"{card}{sizes}; {versions}."


def kernels_table(report: Row) -> str:
    """What was compared with a reference, and how it went."""
    rows = _with_result(report["kernels"])
    if not rows:
        return ""
    lines = ["| kernel, backend | cases | wrong |", "|---|---|---|"]
    for name, row in rows.items():
        cases: defaultdict[str, list[str]] = defaultdict(list)
        for case, complaint in row["wrong"].items():
            cases[complaint].append(case)
        wrong = [f"{what} ({len(of)}: {of[0]})" for what, of in cases.items()]
        lines.append(f"| {name} | {row['n_cases']} | {'; '.join(wrong) or 'none'} |")
    return "\n".join(lines)


def step_tables(report: Row) -> list[str]:
    """A table of training steps for each shape and precision that was measured."""
    rates = report["steps"].get(RATES, {})
    rows = [
        row for row in _with_result(report["steps"]).values() if "floor_seconds" in row
    ]
    shapes = dict.fromkeys(
        (row["d_in"], row["d_sae"], row["k"], row["batch"]) for row in rows
    )
    return [
        _step_table(chosen, precision, rates)
        for shape in shapes
        for precision in PRECISIONS
        if (
            chosen := [
                row
                for row in rows
                if row["precision"] == precision
                and shape == (row["d_in"], row["d_sae"], row["k"], row["batch"])
            ]
        )
    ]


def _step_table(rows: list[Row], precision: str, rates: Row) -> str:
    first = rows[0]
    shape = Shape(first["d_in"], first["d_sae"], first["k"], first["batch"])
    floor = [value for row in rows for value in row["floor_seconds"]]
    told = f"the floor took {_spread(floor)} ms"
    if "flops" in rates:
        counted = 1e3 * floor_of_rates(rates, shape, precision)
        told += f", {counted:.2f} ms at the best rates of this card"
    lines = [
        f"d_in {shape.d_in} → d_sae {shape.d_sae:,}, k {shape.k}, B {shape.batch}, "
        f"{precision}; {told}:\n",
        "| training step | backend | graph | dead features | ms (min–max) | × floor "
        f"| {REFERENCE} / this | tokens/s | working memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["aux"], seconds(row))):
        lines.append(
            f"| {row['subject']} | {_backend(row)} | {_graph(row)} "
            f"| {'10%' if row['aux'] else 'none'} | {_spread(row['seconds'])} "
            f"| {times_floor(row):.2f} | {_times_faster(row, rows)} "
            f"| {row['batch'] / seconds(row):,.0f} "
            f"| {row['working_bytes'] / 1e6:,.0f} MB |"
        )
    return "\n".join(lines)


def _backend(row: Row) -> str:
    used = row.get("backend_used")
    if used is None:
        return ""
    return used if row["backend"] else f"{used} (its own choice)"


def _graph(row: Row) -> str:
    if not row["cuda_graph"]:
        return ""
    return "yes" if row["replays_graph"] else "asked for, none recorded"


def _times_faster(row: Row, rows: list[Row]) -> str:
    """How many times as long SAELens' batchtopk takes."""
    for other in rows:
        if other["subject"] == REFERENCE and other["aux"] == row["aux"]:
            return f"{seconds(other) / seconds(row):.1f}"
    return ""


def memory_table(report: Row) -> str:
    """Peak of the memory over d_sae."""
    rows = [
        row
        for row in report["memory"].values()
        if not {"failed", "not_available"} & row.keys()
    ]
    if not rows:
        return ""
    lines = [
        "| d_in | d_sae | training step | parameters, gradients, Adam | working memory "
        "| all in all |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: (r["d_in"], r["subject"], r["d_sae"])):
        cells = ["", "", "out of memory"]
        if "out_of_memory" not in row:
            parts = (row["persistent_bytes"], row["working_bytes"])
            cells = [f"{n / 1e9:,.2f} GB" for n in (*parts, sum(parts))]
        lines.append(
            f"| {row['d_in']} | {row['d_sae']:,} | {row['subject']} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def pipeline_table(report: Row) -> str:
    """Tokens per second of whole trainings, and the share of each part."""
    runs = _with_result(report["pipeline"])
    if not runs:
        return ""
    speeds = [f"{run['tokens_per_second']:,.0f}" for run in runs.values()]
    shares = [pipeline_parts(run["seconds"]) for run in runs.values()]
    lines = [
        f"| | {' | '.join(runs)} |",
        "|---" * (len(runs) + 1) + "|",
        f"| tokens/s | {' | '.join(speeds)} |",
    ]
    for part in PIPELINE_PARTS:
        cells = [
            f"{share[part] / sum(share.values()):.1%}" if part in share else ""
            for share in shares
        ]
        if any(cells):
            lines.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(lines)


def synthetic_table(report: Row) -> str:
    """SAEs trained on the synthetic benchmark, the longest trainings first."""
    rows = list(_with_result(report["synthetic"]).values())
    if not rows:
        return ""
    lines = [
        f"| samples | SAE | {' | '.join(METRICS)} | samples/s |",
        "|---" * (len(METRICS) + 3) + "|",
    ]
    for row in sorted(rows, key=lambda row: (-row["samples"], -row["f1"])):
        cells = [f"{row[key]:{style}}" for key, style in METRICS.values()]
        lines.append(
            f"| {row['samples']:,} | {row['architecture']} | {' | '.join(cells)} "
            f"| {row['samples'] / row['seconds']:,.0f} |"
        )
    return "\n".join(lines)


def missing(report: Row) -> str:
    """What was tried and has no result, and why."""
    lines = [
        f"- {part}: {name}: {reason.replace('_', ' ')}: {row[reason]}"
        for part in PARTS
        for name, row in report[part].items()
        for reason in NO_RESULT
        if reason in row and not (part == "memory" and reason == "out_of_memory")
    ]
    return "\n".join(lines)


def _with_result(part: dict[str, Row]) -> dict[str, Row]:
    return {name: row for name, row in part.items() if not set(NO_RESULT) & row.keys()}


def _spread(values: list[float]) -> str:
    ms = [1e3 * value for value in values]
    return f"{statistics.median(ms):.2f} ({min(ms):.2f}–{max(ms):.2f})"
