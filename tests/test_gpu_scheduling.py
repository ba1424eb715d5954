"""What the campaign on a GPU does with tasks that fail, hang or do not fit into the time."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.campaign import FILENAME, PARTS, Results, run_campaign
from benchmarks.gpu.task import NotAvailableError, Task
from benchmarks.own_process import ProcessFailed, in_own_process

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
ABOUT = {"card": {"name": "an abacus"}, "scale": "rehearsal", "versions": {}}


# -- What tasks do in their processes


def told(result: Any = None) -> Any:
    sys.stdout.write("nobody sees this")
    return result or {}


def broken_until(marker: Path) -> dict[str, Any]:
    """Fails as long as there is no such file."""
    if not marker.exists():
        raise RuntimeError("no kernel image\nis available")
    return {"n_cases": 1, "wrong": {}}


def out_of_memory() -> dict[str, Any]:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16 GiB")


def not_there() -> dict[str, Any]:
    raise NotAvailableError("sparsify is not installed")


def killed() -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def hanging() -> dict[str, Any]:
    time.sleep(1000)
    return {}


# -- Processes


def test_a_process_gives_what_its_function_returns(capfd: pytest.CaptureFixture[str]):
    assert in_own_process(told, "cpu") == "cpu"
    assert in_own_process(divmod, 17, 5) == (3, 2)
    assert capfd.readouterr().out == ""


def test_a_process_that_fails_says_why_in_one_line(tmp_path: Path):
    with pytest.raises(ProcessFailed) as failed:
        in_own_process(broken_until, tmp_path / "never")
    assert failed.value.kind == "RuntimeError"
    assert failed.value.message == "RuntimeError: no kernel image"
    assert any("in broken_until" in line for line in failed.value.last_lines)
    with pytest.raises(ProcessFailed, match="killed") as dead:
        in_own_process(killed)
    assert dead.value.kind == ""
    with pytest.raises(ProcessFailed, match="longer than 1 s"):
        in_own_process(hanging, seconds=1)


def test_the_server_of_processes_asks_for_no_gpu():
    """CUDA that was asked for anything before a fork does not work after it."""
    code = """
import torch
def refuse(*args):
    raise AssertionError("the GPU was asked for")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = refuse
import benchmarks.preload
assert torch.cuda.is_available is refuse
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# -- Scheduling


def task(name: str, measure: Callable[..., Any] = told, **options: Any) -> Task:
    return Task(options.pop("part", "steps"), name, measure, (), **options)


def test_each_outcome_is_kept_and_none_stops_the_rest(tmp_path: Path):
    tasks = [
        task("killed", killed),
        task("hanging", hanging, limit=1),
        task("large", out_of_memory),
        task("missing", not_there),
        task("fine", facts={"shape": 3}),
    ]
    results = Results(tmp_path, ABOUT)
    assert not run_campaign(results, tasks, minutes=5)
    kept = json.loads((tmp_path / FILENAME).read_text())["steps"]
    assert list(kept) == [t.name for t in tasks]
    assert kept["killed"]["failed"].startswith("the process was killed")
    assert kept["hanging"]["failed"] == "it took longer than 1 s"
    assert kept["large"]["out_of_memory"].startswith("OutOfMemoryError: CUDA out of")
    assert kept["missing"]["not_available"] == "sparsify is not installed"
    assert kept["fine"].keys() == {"shape", "wall_seconds"}
    done = [t.name for t in tasks if results.is_done(t)]
    # more memory will not come, a library may
    assert done == ["large", "fine"]
    assert run_campaign(results, tasks[2:], minutes=5)


def test_nothing_is_started_that_does_not_fit(tmp_path: Path):
    results = Results(tmp_path, ABOUT)
    tasks = [
        task("measured", like="slow", size=2),
        task("twice as large", like="slow", size=4),
        task("smaller", like="slow", size=1),
        task("by its own guess", seconds=1000),
        task("one of a pair", together="pair", seconds=40),
        task("the other", together="pair", seconds=40),
        task("quick", seconds=1),
    ]
    results.keep(tasks[0], {"wall_seconds": 50.0, "fixed_seconds": 10.0})
    assert results.expected_seconds(tasks[1], tasks) == 10 + 2 * 40
    assert results.expected_seconds(tasks[2], tasks) == 50
    assert results.expected_seconds(tasks[3], tasks) == 1000
    assert not run_campaign(results, tasks, minutes=1)
    assert set(results.content["steps"]) == {"measured", "smaller", "quick"}


def test_without_time_nothing_is_started(tmp_path: Path):
    results = Results(tmp_path, ABOUT)
    assert not run_campaign(results, [task("any", seconds=0)], minutes=0)
    assert not (tmp_path / FILENAME).exists()


def test_what_failed_is_tried_again_after_what_is_missing(tmp_path: Path):
    marker = tmp_path / "repaired"
    repaired = Task("steps", "broken", broken_until, (marker,))
    results = Results(tmp_path, ABOUT)
    run_campaign(results, [repaired], minutes=5)
    assert "failed" in results.content["steps"]["broken"]
    marker.touch()
    again = Results(tmp_path, ABOUT)
    assert run_campaign(again, [repaired, task("new")], minutes=5)
    assert list(again.content["steps"]) == ["broken", "new"]
    assert again.is_done(repaired)


def test_parts_are_left_after_their_share_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    order: list[str] = []
    monkeypatch.setattr(
        "benchmarks.gpu.campaign.run_task",
        lambda task, _: order.append(task.name) or {},
    )
    # the first part has used up its share before it starts
    monkeypatch.setitem(PARTS, "kernels", -1.0)
    tasks = [task("late", part="kernels"), task("first", part="memory")]
    assert run_campaign(Results(tmp_path, ABOUT), tasks, minutes=5)
    assert order == ["first", "late"]


def test_results_of_another_card_are_not_mixed_in(tmp_path: Path):
    results = Results(tmp_path, ABOUT)
    results.keep(task("any"), {})
    with pytest.raises(SystemExit, match="another card"):
        Results(tmp_path, {**ABOUT, "card": {"name": "another"}})
