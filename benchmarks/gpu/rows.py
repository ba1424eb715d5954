"""Rows of the step tables: which are of one setting, and which is a subject's best."""

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.gpu.scale import CARD, PRECISIONS, REHEARSAL, Scale
from benchmarks.shape import Shape
from benchmarks.tables import RECIPE, REFERENCE, seconds

Row = dict[str, Any]
# A shape, and how precisely all rows of it compute.
Setting = tuple[Shape, str]
# What a task may have instead of a result.
NO_RESULT = ("failed", "not_available", "out_of_memory")
FIRST_PHASE, OURS = RECIPE
SPARSIFY = "sparsify topk"
# sparsify computes under it on every GPU that can, whatever precision is asked for.
BFLOAT16 = "bfloat16 autocast"


@dataclass(frozen=True)
class Column:
    """Rows of a subject: with a recorded CUDA graph, or without one."""

    subject: str
    has_graph: bool = False

    def __str__(self) -> str:
        return f"{self.subject}, CUDA graph" if self.has_graph else self.subject


COLUMNS = (
    *(Column(OURS), Column(OURS, has_graph=True)),
    *(Column(FIRST_PHASE), Column(FIRST_PHASE, has_graph=True)),
    *(Column(REFERENCE), Column(SPARSIFY)),
)


def with_result(part: dict[str, Row]) -> dict[str, Row]:
    """The tasks of a part that have one."""
    return {name: row for name, row in part.items() if not set(NO_RESULT) & row.keys()}


def scale_of(report: Row) -> Scale:
    """How large the campaign was."""
    return CARD if report["scale"] == CARD.name else REHEARSAL


def by_setting(report: Row) -> dict[Setting, list[Row]]:
    """
    The rows of each shape and precision: shapes in the order in which they were measured, and of
    each precision those without dead features first.
    """
    found: defaultdict[Setting, list[Row]] = defaultdict(list)
    for row in with_result(report["steps"]).values():
        if "seconds" in row:  # the rates of the card have none
            found[_shape(row), row["precision"]].append(row)
    shapes = list(dict.fromkeys(replace(shape, aux=False) for shape, _ in found))
    precisions = list(PRECISIONS)

    def place(setting: Setting) -> tuple[int, int, bool]:
        shape, precision = setting
        without_dead = replace(shape, aux=False)
        return shapes.index(without_dead), precisions.index(precision), shape.aux

    return {setting: found[setting] for setting in sorted(found, key=place)}


def _shape(row: Row) -> Shape:
    return Shape(row["d_in"], row["d_sae"], row["k"], row["batch"], row["aux"])


def fastest(rows: list[Row], column: Column) -> Row | None:
    """The row of a column's fastest backend, None if it was not measured."""
    found = [
        row
        for row in rows
        if row["subject"] == column.subject
        and row["cuda_graph"] == column.has_graph
        and row.get("replays_graph", False) == column.has_graph
    ]
    return min(found, key=seconds, default=None)


def fastest_of_ours(rows: list[Row]) -> Row | None:
    """The fastest row of `mutual_choice`, with a CUDA graph or without."""
    found = [fastest(rows, Column(OURS, has_graph)) for has_graph in (False, True)]
    return min((row for row in found if row is not None), key=seconds, default=None)


def times_as_fast(row: Row | None, rows: list[Row]) -> float | None:
    """How many times as long the reference takes with the same shape and precision."""
    reference = fastest(rows, Column(REFERENCE))
    if row is None or reference is None:
        return None
    return seconds(reference) / seconds(row)


def title(shape: Shape) -> str:
    """A shape as sentences name it."""
    return f"d_in {shape.d_in:,} → d_sae {shape.d_sae:,}"
