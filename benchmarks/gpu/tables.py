"""Markdown tables of what `python -m benchmarks gpu` measured."""

import statistics
from collections import defaultdict
from dataclasses import replace
from typing import Any

from benchmarks.gpu.campaign import PARTS
from benchmarks.gpu.plan import BACKENDS, MEMORY_ROWS, RATES, all_tasks
from benchmarks.gpu.rates import floor_of_rates
from benchmarks.gpu.rows import (
    BFLOAT16,
    NO_RESULT,
    SPARSIFY,
    by_setting,
    scale_of,
    times_as_fast,
    title,
    with_result,
)
from benchmarks.gpu.short import pipeline_shape, short
from benchmarks.gpu.task import Task
from benchmarks.shape import Shape
from benchmarks.tables import (
    PIPELINE_PARTS,
    REFERENCE,
    pipeline_parts,
    seconds,
    times_floor,
)

Row = dict[str, Any]
METRICS = {
    "F1": ("f1", ".4f"),
    "MCC": ("mcc", ".4f"),
    "uniqueness": ("uniqueness", ".4f"),
    "variance explained": ("explained_variance", ".4f"),
    "L0": ("l0", ".2f"),
    "dead": ("dead_features", ",.0f"),
}


def section(report: Row) -> str:
    """All tables that there is anything for, and what has no result."""
    tables = {
        "A training step": step_tables(report),
        "Memory": [memory_table(report)],
        "The whole pipeline on a random language model": [pipeline_table(report)],
        "SynthSAEBench-16k": [synthetic_table(report)],
        "Kernels against plain formulas in float64": [kernels_table(report)],
        "Without a result": [missing(report)],
        "Not reached": [not_reached(report)],
    }
    parts = [measured_on(report)]
    if by_setting(report):
        parts.append(short(report))
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
    """What was compared with a reference, and how it went: kernels by backends."""
    rows = with_result(report["kernels"])
    if not rows:
        return ""
    cells: defaultdict[str, defaultdict[str, list[str]]]
    cells = defaultdict(lambda: defaultdict(list))
    wrong = []
    for name, row in rows.items():
        kernel, backend, *dtype = name.split(", ")
        cells[kernel][backend].append(
            ": ".join(
                (*dtype, f"{row['n_cases'] - len(row['wrong'])}/{row['n_cases']}")
            )
        )
        by_complaint: defaultdict[str, list[str]] = defaultdict(list)
        for case, complaint in row["wrong"].items():
            by_complaint[complaint].append(case)
        wrong += [
            f"- {name}: {what} ({len(cases)}: {cases[0]})"
            for what, cases in by_complaint.items()
        ]
    lines = [
        "Cases that were right, of all cases:\n",
        f"| kernel | {' | '.join(BACKENDS)} |",
        "|---" * (1 + len(BACKENDS)) + "|",
    ]
    for kernel, found in sorted(cells.items()):
        told = [", ".join(sorted(found[backend])) or "–" for backend in BACKENDS]
        lines.append(f"| {kernel} | {' | '.join(told)} |")
    return "\n".join(lines + [""] * bool(wrong) + wrong)


def step_tables(report: Row) -> list[str]:
    """A table of training steps for each shape and precision that was measured."""
    settings = by_setting(report)
    return [
        _step_table(
            [
                settings.get((replace(shape, aux=aux), precision), [])
                for aux in (False, True)
            ],
            precision,
            report["steps"].get(RATES, {}),
        )
        for shape, precision in dict.fromkeys(
            (replace(shape, aux=False), precision) for shape, precision in settings
        )
    ]


def _step_table(groups: list[list[Row]], precision: str, rates: Row) -> str:
    """
    Args:
        groups: The rows without dead features, and those with.
        precision: How all of them compute.
        rates: What the card can do.
    """
    rows = [row for group in groups for row in group]
    first = rows[0]
    shape = Shape(first["d_in"], first["d_sae"], first["k"], first["batch"])
    floor = [value for row in rows for value in row["floor_seconds"]]
    told = f"the floor took {_spread(floor)} ms"
    if "flops" in rates:
        counted = 1e3 * floor_of_rates(rates, shape, precision)
        told += f", {counted:.2f} ms at the best rates of this card"
    lines = [
        f"{title(shape)}, k {shape.k}, B {shape.batch:,}, {precision}; {told}:\n",
        "| training step | backend | CUDA graph | dead features | ms, median (min–max) "
        f"| × floor | {REFERENCE} / this | tokens/s | working memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for group in groups:
        for row in sorted(group, key=seconds):
            ratio = times_as_fast(row, group)
            lines.append(
                f"| {_subject(row)} | {_backend(row)} | {_graph(row)} "
                f"| {'10%' if row['aux'] else 'none'} | {_spread(row['seconds'])} "
                f"| {times_floor(row):.2f} | {'' if ratio is None else f'{ratio:.1f}'} "
                f"| {row['batch'] / seconds(row):,.0f} "
                f"| {row['working_bytes'] / 1e6:,.0f} MB |"
            )
    return "\n".join(lines + _without_graph(rows))


def _subject(row: Row) -> str:
    """What is trained, and its precision where it is not that of the table."""
    other = row["subject"].startswith(SPARSIFY) and row["precision"] != BFLOAT16
    return f"{row['subject']} ({BFLOAT16})" if other else row["subject"]


def _without_graph(rows: list[Row]) -> list[str]:
    """Why graphs that were asked for were not recorded, where that was kept."""
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for row in rows:
        if "why_no_graph" in row:
            dead = ", 10% dead" if row["aux"] else ""
            reasons[row["why_no_graph"]].append(
                f"{row['subject']} ({_backend(row)}{dead})"
            )
    if not reasons:
        return []
    told = [f"- {'; '.join(found)}: {why}" for why, found in reasons.items()]
    return ["", "Why no graph was recorded:", "", *told]


def _backend(row: Row) -> str:
    used = row.get("backend_used")
    if used is None:
        return ""
    return used if row["backend"] else f"{used} (its own choice)"


def _graph(row: Row) -> str:
    if not row["cuda_graph"]:
        return ""
    return "replayed" if row["replays_graph"] else "asked for, none recorded"


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
        "Peaks of allocated memory; a tenth of the features is dead, and rows of ours name their "
        "backend, so that none is tried. The estimate is what `train` prints before a run, which "
        "has to hold for every backend.\n",
        "| d_in | d_sae | training step | parameters, gradients, Adam | working memory "
        "| estimate of it | all in all |",
        "|---|---|---|---|---|---|---|",
    ]
    order = [subject for subject, _ in MEMORY_ROWS]
    for row in sorted(
        rows, key=lambda r: (r["d_in"], order.index(r["subject"]), r["d_sae"])
    ):
        cells = ["", "", "", "out of memory"]
        if "out_of_memory" not in row:
            parts = (row["persistent_bytes"], row["working_bytes"])
            cells = [_gigabytes(n) for n in (*parts, sum(parts))]
            estimate = row.get("estimated_working_bytes")
            cells.insert(2, "" if estimate is None else _gigabytes(estimate))
        lines.append(
            f"| {row['d_in']:,} | {row['d_sae']:,} | {row['subject']} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def pipeline_table(report: Row) -> str:
    """Tokens per second of whole trainings, and the share of each part."""
    runs = with_result(report["pipeline"])
    if not runs:
        return ""
    speeds = [f"{run['tokens_per_second']:,.0f}" for run in runs.values()]
    tokens = [f"{run['training_tokens']:,}" for run in runs.values()]
    shares = [pipeline_parts(run["seconds"]) for run in runs.values()]
    lines = [
        f"{pipeline_shape(report)}. Tokens per second are those of the training loop. Shares are "
        "of another whole run, in which the host waits for the device around every part.\n",
        f"| | {' | '.join(runs)} |",
        "|---" * (len(runs) + 1) + "|",
        f"| training tokens | {' | '.join(tokens)} |",
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
    rows = list(with_result(report["synthetic"]).values())
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
        f"- {part}: {name}: {_why(reason, row[reason])}"
        for part in PARTS
        for name, row in report[part].items()
        for reason in NO_RESULT
        if reason in row and not (part == "memory" and reason == "out_of_memory")
    ]
    return "\n".join(lines)


def _why(reason: str, message: str) -> str:
    # what torch adds about its memory is long, and no figure of the step
    if reason == "out_of_memory":
        return "out of memory"
    return f"{reason.replace('_', ' ')}: {message}"


def not_reached(report: Row) -> str:
    """How much of each part the minutes did not suffice for, and which subjects have no row."""
    planned: defaultdict[str, list[Task]] = defaultdict(list)
    for task in all_tasks(scale_of(report), "cuda"):
        planned[task.part].append(task)
    lines = []
    for part, tasks in planned.items():
        n_missing = sum(task.name not in report[part] for task in tasks)
        if n_missing == 0:
            continue
        tried = {_trained(row) for row in report[part].values()}
        never = dict.fromkeys(_trained(task.facts) for task in tasks)
        never = [name for name in never if name is not None and name not in tried]
        line = f"- {part}: {n_missing} of {len(tasks)} measurements"
        lines.append(f"{line}, all of {'; '.join(never)}" if never else line)
    return "\n".join(lines)


def _trained(facts: Row) -> str | None:
    """What a row or a task trains, None if nothing."""
    return facts.get("subject", facts.get("architecture"))


def _gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:,.2f} GB"


def _spread(values: list[float]) -> str:
    ms = [1e3 * value for value in values]
    return f"{statistics.median(ms):.2f} ({min(ms):.2f}–{max(ms):.2f})"
