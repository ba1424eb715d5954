"""Does the tasks of the campaign one by one, in the time there is, and keeps every result."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.task import NotAvailableError, Result, Task
from benchmarks.own_process import ProcessFailed, in_own_process
from benchmarks.results import load_results, write_results

FILENAME = "campaign.json"
# Parts in their order, and the share of the minutes after which the first round leaves each. The
# second round goes on with what is left of all of them.
PARTS = {
    "kernels": 0.2,
    "steps": 0.6,
    "memory": 0.7,
    "pipeline": 0.85,
    "synthetic": 1.0,
}


class Results:
    """The results so far, in a file that is never half-written."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.path = folder / FILENAME
        self.content = load_results(self.path, about) or {
            **about,
            **{part: {} for part in PARTS},
        }

    def find(self, task: Task) -> Result | None:
        """What was kept of a task."""
        return self.content[task.part].get(task.name)

    def is_done(self, task: Task) -> bool:
        """Whether there is a result that another try would not change."""
        result = self.find(task)
        return result is not None and not {"failed", "not_available"} & result.keys()

    def keep(self, task: Task, result: Result) -> None:
        """Writes the result of a task."""
        self.content[task.part][task.name] = {**task.facts, **result}
        write_results(self.path, self.content)

    def expected_seconds(self, task: Task, tasks: Sequence[Task]) -> float:
        """What a task will take: the most that one of its kind took, else its own guess."""
        found = [
            expected_from(result, task.size / other.size)
            for other in tasks
            if other.like == task.like
            and self.is_done(other)
            and (result := self.find(other)) is not None
        ]
        return max(found, default=task.seconds)


def expected_from(result: Result, times_larger: float) -> float:
    """Seconds of a task so many times as large as one that was done, but for what is fixed."""
    fixed = result.get("fixed_seconds", 0.0)
    return fixed + (result["wall_seconds"] - fixed) * max(1.0, times_larger)


def run_campaign(results: Results, tasks: Sequence[Task], minutes: float) -> bool:
    """
    Does what is missing or failed, starting nothing that will not fit into the minutes.

    Args:
        results: What has been done.
        tasks: All tasks, in the order in which they matter within their parts.
        minutes: Time from now.

    Returns:
        Whether none is missing or failed. What needs something that is not there is tried
        again in the next run, but is not missing.
    """
    start = time.monotonic()
    deadline = start + 60 * minutes
    tried: set[str] = set()
    for is_first_round in (True, False):
        for part, share in PARTS.items():
            leave = start + 60 * minutes * share if is_first_round else deadline
            of_part = [task for task in tasks if task.part == part]
            # what failed before comes after what was never tried
            for task in sorted(of_part, key=lambda t: results.find(t) is not None):
                key = f"{part}: {task.name}"
                if results.is_done(task) or key in tried or time.monotonic() >= leave:
                    continue
                left = deadline - time.monotonic()
                if _seconds_of_all(results, task, of_part) > left:
                    continue
                tried.add(key)
                began = time.monotonic()
                result = run_task(task, min(task.limit, left))
                result["wall_seconds"] = round(time.monotonic() - began, 2)
                results.keep(task, result)
                print(f"{key}: {_summary(result)}", file=sys.stderr, flush=True)
    found = [results.find(task) for task in tasks]
    return all(result is not None and "failed" not in result for result in found)


def run_task(task: Task, seconds: float) -> Result:
    """The result of a task, or why there is none."""
    try:
        return in_own_process(task.measure, *task.arguments, seconds=seconds)
    except ProcessFailed as failure:
        if failure.kind == "OutOfMemoryError":
            return {"out_of_memory": failure.message}
        if failure.kind == NotAvailableError.__name__:
            return {"not_available": failure.message.split(": ", 1)[1]}
        return {"failed": failure.message, "traceback": failure.last_lines}


def _seconds_of_all(results: Results, task: Task, of_part: Sequence[Task]) -> float:
    """What a task takes, with those that are to be done together with it."""
    group = [task]
    if task.together is not None:
        group = [
            other
            for other in of_part
            if other.together == task.together and not results.is_done(other)
        ]
    return sum(results.expected_seconds(other, of_part) for other in group)


def _summary(result: Result) -> str:
    for reason in ("failed", "not_available", "out_of_memory"):
        if reason in result:
            return f"{reason.replace('_', ' ')}: {result[reason]}"
    return f"{result['wall_seconds']:.1f} s"
