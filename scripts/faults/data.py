"""
Trains on odd texts, with too little of them, resumed with other settings, and interrupted, and
counts what comes of it.

    python -m scripts.faults.data [--json COUNTS.json] [--every N] [--only TEXT ...]

Every case is a fork of this process in a folder of its own, with an alarm. A good outcome is one
sentence, or a run in which every split is kept apart and every setting has its effect.
"""

import os
import sys
from collections.abc import Iterator

if __name__ == "__main__":
    # read where they are imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["WANDB_MODE"] = "offline"

from scripts.faults.counting import (  # noqa: E402
    OUTCOMES,
    Outcome,
    finish,
    read_options,
)
from scripts.faults.forks import Case  # noqa: E402
from scripts.faults.interrupted import interrupted  # noqa: E402
from scripts.faults.older_run import outcomes_of  # noqa: E402
from scripts.faults.resumed import resumed  # noqa: E402
from scripts.faults.splits import splits  # noqa: E402
from scripts.faults.texts import texts  # noqa: E402


def cases() -> Iterator[Case]:
    yield from texts()
    yield from splits()
    yield from resumed()
    yield from interrupted()


def told_by_the_check(outcome: Outcome) -> Outcome:
    """The checks of these cases begin with the outcome that they have found."""
    kind = outcome.said.split(":")[0]
    if outcome.outcome == "lost" and kind in OUTCOMES:
        return Outcome(outcome.case, kind, outcome.said)
    return outcome


def main() -> int:
    """Runs the cases, prints what came of them, and returns the exit code."""
    options = read_options(__doc__)
    outcomes = outcomes_of(cases(), options)
    return finish([told_by_the_check(each) for each in outcomes], options.json)


if __name__ == "__main__":
    sys.exit(main())
