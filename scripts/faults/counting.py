"""What the scripts of this folder have in common: their options, and how they count outcomes."""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")

# How a case can end, and whether that is as it should be.
OUTCOMES = {
    "refused": True,  # in one sentence
    "refused late": True,  # likewise, but after the model was loaded
    "worked": True,  # finished, or ended as it was told to
    "unexpected": False,  # one sentence, of an error that nobody foresaw
    "traceback": False,
    "endless": False,
    "lost": False,  # a file of the user's, or the result
    "leaked": False,  # text that was to be set apart was trained on
    "ignored": False,  # a setting or a fault, without a word
}


@dataclass(frozen=True)
class Outcome:
    """
    How a case ended.

    Args:
        case: What was wrong.
        outcome: One of OUTCOMES.
        said: The sentence, or the error.
    """

    case: str
    outcome: str
    said: str

    def __post_init__(self) -> None:
        assert self.outcome in OUTCOMES


def read_options(description: str | None) -> argparse.Namespace:
    """The command line: where to write the counts, and which cases to run."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write counts and cases")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="cases whose name contains one of these"
    )
    parser.add_argument("--every", type=int, default=1, help="one case of so many")
    options = parser.parse_args()
    if options.json is not None:
        options.json = options.json.absolute()
    return options


def chosen(
    cases: Iterable[tuple[str, Item]], options: argparse.Namespace
) -> list[tuple[str, Item]]:
    """The cases, by their name, that the options ask for."""
    named = [case for case in cases if any(part in case[0] for part in options.only)]
    return named[:: options.every]


def count(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Number of cases by outcome, those that did not occur included."""
    found = Counter(outcome.outcome for outcome in outcomes)
    return {name: found[name] for name in OUTCOMES}


def finish(outcomes: Sequence[Outcome], path: Path | None) -> int:
    """Prints the counts, writes them with the cases, and returns the exit code, 1 for a bad one."""
    counts = count(outcomes)
    print(f"{len(outcomes)} cases: {counts}")
    if path is not None:
        content = {
            "n_cases": len(outcomes),
            "counts": counts,
            "cases": [asdict(outcome) for outcome in outcomes],
        }
        path.write_text(json.dumps(content, indent=1) + "\n")
    return int(any(counts[name] for name, good in OUTCOMES.items() if not good))
