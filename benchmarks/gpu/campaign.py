"""Does the tasks of the campaign one by one, in the time there is, and keeps every result."""

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
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
# Where nothing is timed, several tasks run at once: most of their time is spent compiling.
JOBS = {"kernels": 6}
# Parts in which too little memory is a result, that another try would not change.
MEMORY_IS_A_RESULT = ("steps", "memory")


class Results:
    """The results so far, in a file that is never half-written."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.path = folder / FILENAME
        self._lock = Lock()
        self.content = load_results(self.path, about) or {
            **about,
            **{part: {} for part in PARTS},
        }

    def find(self, task: Task) -> Result | None:
        """What was kept of a task."""
        return self.content[task.part].get(task.name)

    def is_done(self, task: Task) -> bool:
        """Whether there is a result that is not to be tried again."""
        result = self.find(task)
        return result is not None and not (
            has_failed(result) or "not_available" in result
        )

    def keep(self, task: Task, result: Result) -> None:
        """Writes the result of a task."""
        with self._lock:
            self.content[task.part][task.name] = {**task.facts, **result}
            write_results(self.path, self.content)

    def expected_seconds(self, task: Task, tasks: Sequence[Task]) -> float:
        """What a task will take: the most that one of its kind took, else its own guess."""
        found = [
            expected_from(result, task.size / other.size)
            for other in tasks
            if task.like
            and other.like == task.like
            and self.is_done(other)
            and (result := self.find(other)) is not None
        ]
        return max(found, default=task.seconds)


def expected_from(result: Result, times_larger: float) -> float:
    """Seconds of a task so many times as large as one that was done, but for what is fixed."""
    fixed = result.get("fixed_seconds", 0.0)
    return fixed + (result["wall_seconds"] - fixed) * max(1.0, times_larger)


def has_failed(result: Result) -> bool:
    """Whether a task gave no result, or found something wrong."""
    return "failed" in result or bool(result.get("wrong"))


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
    tried: set[tuple[str, str]] = set()

    def attempt(task: Task, of_part: Sequence[Task], leave: float) -> None:
        now, key = time.monotonic(), (task.part, task.name)
        if results.is_done(task) or key in tried or now >= leave:
            return
        if _seconds_of_all(results, task, of_part) > deadline - now:
            return
        tried.add(key)
        result = run_task(task, min(task.limit, deadline - now))
        result["wall_seconds"] = round(time.monotonic() - now, 2)
        results.keep(task, result)
        print(f"{': '.join(key)}: {summary(result)}", file=sys.stderr, flush=True)

    for is_first_round in (True, False):
        for part, share in PARTS.items():
            leave = start + 60 * minutes * share if is_first_round else deadline
            of_part = [task for task in tasks if task.part == part]
            # what failed before comes after what was never tried
            order = sorted(of_part, key=lambda t: results.find(t) is not None)
            with ThreadPoolExecutor(JOBS.get(part, 1)) as pool:
                list(pool.map(lambda t: attempt(t, of_part, leave), order))
    found = [results.find(task) for task in tasks]
    return all(result is not None and not has_failed(result) for result in found)


def run_task(task: Task, seconds: float) -> Result:
    """The result of a task, or why there is none."""
    try:
        return in_own_process(task.measure, *task.arguments, seconds=seconds)
    except ProcessFailed as failure:
        if failure.kind == "OutOfMemoryError" and task.part in MEMORY_IS_A_RESULT:
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


def summary(result: Result) -> str:
    """A result in a line."""
    for reason in ("failed", "not_available", "out_of_memory"):
        if reason in result:
            return f"{reason.replace('_', ' ')}: {result[reason]}"
    wrong = f", {len(result['wrong'])} wrong" if result.get("wrong") else ""
    return f"{result['wall_seconds']:.1f} s{wrong}"
