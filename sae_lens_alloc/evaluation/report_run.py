"""What the report shows of one trained SAE."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sae_lens_alloc.evaluation.usage import Usage

# Okabe and Ito's palette, which works for every kind of colour vision, and for larger reports some
# colours of Paul Tol's.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
    *("#882255", "#999933", "#44AA99", "#332288", "#AA4499", "#999999", "#661100"),
)


@dataclass(frozen=True, eq=False)
class ReportRun:
    """
    One trained SAE in a report.

    Args:
        name: Its name for readers, unique in a report.
        evaluation: Figures of the saved SAE on held-out text: an Evaluation, or a plain Usage where
            there is no language model.
        seconds: Wall-clock duration of training. None is not known.
        history: Rows of training metrics under SAELens' names, such as "metrics/l0".
        events: Changes during training, as (tokens seen, what changed).
        settings: Settings to show, such as the learning rate.
    """

    name: str
    evaluation: Usage
    seconds: float | None = None
    history: Sequence[Mapping[str, float]] = ()
    events: Sequence[tuple[float, str]] = ()
    settings: Mapping[str, str] = field(default_factory=dict[str, str])

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Tokens seen and values of one training metric, for the rows that have a number there."""
        rows = [row for row in self.history if row.get(key) is not None]
        return [row["details/n_training_samples"] for row in rows], [
            row[key] for row in rows
        ]


@dataclass(frozen=True, eq=False)
class AtEqualL0:
    """
    The runs of a report at the same number of features per token.

    Args:
        target_l0: The number, as wanted.
        runs: Those that could be brought there, measured as the others are.
        left_out: Why not, by the name of each other run.
    """

    target_l0: float
    runs: Sequence[ReportRun]
    left_out: Mapping[str, str]


def colour(index: int) -> str:
    """Colour of the run at `index` in every plot of a report."""
    return COLOURS[index % len(COLOURS)]


def line_dash(index: int) -> str:
    """Kind of the line of the run at `index`: another one where colours come again."""
    return ("solid", "dot", "dashdot")[index // len(COLOURS) % 3]


def read_history(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]
