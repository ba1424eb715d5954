"""The few figures of a campaign that a reader wants first, in sentences and a small table."""

from collections import defaultdict

from benchmarks.gpu.rows import (
    BFLOAT16,
    COLUMNS,
    OURS,
    SPARSIFY,
    Column,
    Row,
    Setting,
    by_setting,
    fastest,
    fastest_of_ours,
    scale_of,
    times_as_fast,
    title,
    with_result,
)
from benchmarks.shape import Shape
from benchmarks.tables import REFERENCE, seconds

ROW_SPARSE = Column("mutual_choice, row-sparse Adam")
# The same kernels, measured twice in one campaign, differed by as much.
LEVEL = 0.15
# Rounds of a row whose longest and shortest differ by more are told.
UNSTEADY = 1.3
FIGURES = "performance.md#synthsaebench-16k"
NOT_ON_A_GPU = (
    "Not measured on a GPU are trainings of public language models, trainings on several GPUs, "
    "and trainings that were killed and resumed."
)


def short_table(report: Row) -> str:
    """Milliseconds of a step, a row for each shape and precision, with the ratios."""
    settings = by_setting(report)
    columns = [
        column
        for column in COLUMNS
        if any(fastest(rows, column) for rows in settings.values())
    ]
    lines = [
        f"| d_in → d_sae, B | precision | dead features | {' | '.join(map(str, columns))} |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for (shape, precision), rows in settings.items():
        cells = [_cell(fastest(rows, column), rows) for column in columns]
        lines.append(
            f"| {shape.d_in:,} → {shape.d_sae:,}, {shape.batch:,} | {precision} "
            f"| {'10%' if shape.aux else 'none'} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def _cell(row: Row | None, rows: list[Row]) -> str:
    if row is None:
        return "–"
    ratio = times_as_fast(row, rows)
    is_reference = row["subject"] == REFERENCE
    told = [] if ratio is None or is_reference else [f"{ratio:.1f}×"]
    fewest, most = (1e3 * value for value in (min(row["seconds"]), max(row["seconds"])))
    if most > UNSTEADY * fewest:
        told.append(f"rounds {fewest:.1f}–{most:.1f}")
    return f"{1e3 * seconds(row):.1f}" + (f" ({', '.join(told)})" if told else "")


def short(report: Row) -> str:
    """What the table says in words, how to read it, and the table."""
    return "\n\n".join(
        (
            lead(report),
            "Milliseconds a step, of the fastest of the backends that were measured. In brackets: "
            f"how many times as fast as {REFERENCE}, and the shortest and the longest round where "
            f"they differ by over {UNSTEADY - 1:.0%}. A dash: not measured. sparsify computes in "
            f"{BFLOAT16} in every row.",
            short_table(report),
        )
    )


def lead(report: Row) -> str:
    """How ours compares with the reference and with sparsify, and what was not measured."""
    settings = {
        setting: rows
        for setting, rows in by_setting(report).items()
        if not setting[0].aux
    }
    sentences = [
        _beside_reference(report["card"]["name"], settings),
        _beside_sparsify(settings),
        NOT_ON_A_GPU,
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _beside_reference(card: str, settings: dict[Setting, list[Row]]) -> str:
    """A sentence about all shapes, empty if the reference was not measured."""
    said: defaultdict[Shape, list[str]] = defaultdict(list)
    for (shape, precision), rows in settings.items():
        plain, graph = (
            times_as_fast(fastest(rows, Column(OURS, has_graph)), rows)
            for has_graph in (False, True)
        )
        if plain is None:
            continue
        told = f"{_in_words(plain)} in {precision}"
        if graph is not None:
            told += f" ({graph:.1f} times with a CUDA graph)"
        said[shape].append(told)
    if not said:
        return ""
    shapes = "; ".join(
        f"{_listed(told)} at {title(shape)}" for shape, told in said.items()
    )
    return (
        f"On one {card}, a step of `{OURS}` without dead features is, beside SAELens' "
        f"`batchtopk`, {shapes}."
    )


def _listed(items: list[str]) -> str:
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def _in_words(ratio: float) -> str:
    if abs(ratio - 1) <= LEVEL:
        return f"about as fast ({ratio:.1f} times)"
    return f"{ratio:.1f} times as fast"


def _beside_sparsify(settings: dict[Setting, list[Row]]) -> str:
    """Where sparsify's step is faster than ours, and where slower; empty if not measured."""
    where: dict[str, defaultdict[Shape, list[str]]]
    where = {"faster": defaultdict(list), "slower": defaultdict(list)}
    for (shape, precision), rows in settings.items():
        theirs = fastest(rows, Column(SPARSIFY))
        best = fastest_of_ours(rows)
        if theirs is None or best is None:
            continue
        graph = " with a CUDA graph" if best["cuda_graph"] else ""
        than = "faster" if seconds(theirs) < seconds(best) else "slower"
        where[than][shape].append(
            f"{precision} ({1e3 * seconds(theirs):.1f} ms, ours {1e3 * seconds(best):.1f} ms"
            f"{graph})"
        )
    said = [
        f"{than} than ours in {_listed(found)} at {title(shape)}"
        for than, by_shape in where.items()
        for shape, found in by_shape.items()
    ]
    if not said:
        return ""
    return (
        f"sparsify's `topk` computes in {BFLOAT16} and trains with SignSGD. It is "
        f"{'; '.join(said)}."
    )


def pipeline_shape(report: Row) -> str:
    """What the whole pipeline was measured on."""
    scale = scale_of(report).language_model
    return (
        f"A language model with random weights, {scale.n_layers} blocks of width {scale.d_model} "
        f"and contexts of {scale.context_size} random tokens; d_sae {scale.d_sae:,}, k {scale.k}, "
        f"B {scale.batch:,}"
    )


def pipeline_lead(report: Row) -> str:
    """The tokens per second of the whole pipeline, in sentences."""
    runs = with_result(report["pipeline"])
    if not runs:
        return ""
    told = "; ".join(
        f"{run['tokens_per_second']:,.0f} tokens/s with `{run['architecture']}` in "
        f"{run['precision']}"
        for run in runs.values()
    )
    return (
        f"A whole training on random tokens was measured on one {report['card']['name']}. Its "
        f"loop ran at {told}. {pipeline_shape(report)}."
    )


def row_sparse_lead(report: Row) -> str:
    """The optimizer for wide SAEs beside Adam, in a sentence for each shape and precision."""
    said = []
    for (shape, precision), rows in by_setting(report).items():
        adam = fastest(rows, Column(OURS))
        sparse = fastest(rows, ROW_SPARSE)
        if adam is not None and sparse is not None:
            dead = ", a tenth of them dead" if shape.aux else ""
            said.append(
                f"{1e3 * seconds(sparse):.1f} ms, and with Adam {1e3 * seconds(adam):.1f} ms, in "
                f"{precision} at {shape.d_sae:,} features{dead}"
            )
    if not said:
        return "On a GPU it was not measured."
    return f"A step of it takes, on one {report['card']['name']}, {'; '.join(said)}."


def synthetic_lead(report: Row) -> str:
    """What was trained on the synthetic benchmark."""
    trained = "; ".join(
        f"`{row['architecture']}` on {row['samples']:,} samples"
        for row in with_result(report["synthetic"]).values()
    )
    if not trained:
        return "- SynthSAEBench-16k, which needs a GPU."
    return (
        "- SynthSAEBench-16k to its end, which needs a GPU. On one, only these were trained: "
        f"{trained} ([figures]({FIGURES}))."
    )
