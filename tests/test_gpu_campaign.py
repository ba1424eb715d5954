"""The campaign on a GPU, rehearsed: every part, one that fails, a second run, and deadlines."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import command, plan
from benchmarks.gpu.campaign import FILENAME, PARTS, Results, run_campaign
from benchmarks.gpu.rates import ADAM_BYTES, floor_of_rates
from benchmarks.gpu.scale import CARD, PRECISIONS, REHEARSAL
from benchmarks.gpu.tables import section, section_of
from benchmarks.gpu.task import NotAvailableError, Task
from benchmarks.own_process import ProcessFailed, in_own_process
from benchmarks.shape import Shape

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


# -- What is planned


def test_the_plan_of_a_card():
    tasks = plan.all_tasks(CARD, "cuda")
    assert list(dict.fromkeys(t.part for t in tasks)) == list(PARTS)
    names = [(t.part, t.name) for t in tasks]
    assert len(set(names)) == len(names)
    steps = [t for t in tasks if t.part == "steps"]
    assert steps[0].name == plan.RATES
    # what the main ratio is of comes first, and each precision has it
    assert [t.name for t in steps[1:3]] == [
        "mutual_choice, triton, float32, d_sae 32768",
        "SAELens batchtopk, float32, d_sae 32768",
    ]
    rows = [t.facts for t in steps[1:]]
    centre = {"d_in": 768, "d_sae": 32768, "k": 32, "batch": 4096}
    for precision in PRECISIONS:
        for aux in (False, True):
            measured = {
                (row["subject"], row["backend"], row["cuda_graph"])
                for row in rows
                if row["precision"] == precision
                and row["aux"] == aux
                and centre.items() <= row.items()
            }
            phases = {"mutual_choice", "mutual_choice, first quarter"}
            backends = {"torch", "triton"}
            if precision == "float32":
                backends.add("triton_prefilter")
            assert measured >= {(p, b, False) for p in phases for b in backends}
            assert measured >= {
                (p, b, True) for p in phases for b in backends - {"torch"}
            }
            assert {subject for subject, _, _ in measured} >= {
                "SAELens batchtopk",
                "SAELens topk",
                "SAELens jumprelu",
                "sparsify topk",
                "dictionary_learning batchtopk",
            }
    wide = {"d_in": 2304, "d_sae": 65536, "batch": 8192}
    assert {r["precision"] for r in rows if wide.items() <= r.items()} == {
        "bfloat16 autocast"
    }
    memory = [t.facts for t in tasks if t.part == "memory"]
    assert {(r["d_in"], r["d_sae"]) for r in memory} == {
        (d_in, 2**bits) for d_in in (768, 4096) for bits in range(15, 21)
    }
    lengths = [t.facts["samples"] for t in tasks if t.part == "synthetic"]
    # by the shortest the others are foretold; the longest of them that fits is done first
    assert lengths[0] == min(lengths)
    assert lengths[4:] == sorted(lengths[4:], reverse=True)


def test_eight_minutes_bring_something_of_every_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With a clock of its own, and tasks that take what is guessed of them."""
    now = 0.0

    def run_task(task: Task, seconds: float) -> dict[str, Any]:
        nonlocal now
        # four of the first part run at once
        taken = 0.25 * task.seconds if task.part == "kernels" else task.seconds / 2
        assert taken <= seconds
        now += taken
        return {}

    monkeypatch.setattr("benchmarks.gpu.campaign.JOBS", {})
    monkeypatch.setattr("benchmarks.gpu.campaign.run_task", run_task)
    monkeypatch.setattr("time.monotonic", lambda: now)
    tasks = plan.all_tasks(CARD, "cuda")
    results = Results(tmp_path, ABOUT)
    assert not run_campaign(results, tasks, minutes=8)
    assert now <= 8 * 60
    for part in PARTS:
        assert len(results.content[part]) >= 3
    centre = [row for row in results.content["steps"].values() if "precision" in row]
    for precision in PRECISIONS:
        measured = {r["subject"] for r in centre if r["precision"] == precision}
        assert {"mutual_choice", "SAELens batchtopk"} <= measured
    # the next run begins where this one ended
    done = {part: set(results.content[part]) for part in PARTS}
    now = 0.0
    again = Results(tmp_path, ABOUT)
    assert not run_campaign(again, tasks, minutes=8)
    for part in PARTS:
        assert done[part] <= set(again.content[part])
    assert len(again.content["steps"]) > len(done["steps"])


def test_the_synthetic_benchmark_is_the_published_one():
    model = plan.synthetic.model_config(CARD.synthetic)
    assert (model.num_features, model.hidden_dim, model.seed) == (16384, 768, 42)
    assert model.hierarchy is not None
    assert model.hierarchy.total_root_nodes == 128
    assert model.firing_probability.to_dict() == {
        "generator_name": "zipfian",
        "exponent": 0.5,
        "max_prob": 0.4,
        "min_prob": 5e-4,
    }
    assert (CARD.synthetic.d_sae, CARD.synthetic.batch) == (4096, 1024)


def test_floor_of_rates_by_hand():
    # 2 * 3 * 5 * 7 operations at 100 a second, and 2 * 5 * 7 + 7 + 5 weights of 28 bytes
    shape = Shape(d_in=5, d_sae=7, k=1, batch=3)
    rates = {
        "flops": {"float32": {"square": 100.0, "encoder": 60.0}},
        "bytes_per_second": 1000.0,
    }
    expected = 210 / 100 + 82 * ADAM_BYTES / 1000
    assert floor_of_rates(rates, shape, "float32") == pytest.approx(expected)


# -- The command


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the results of the whole command, one of whose tasks failed."""
    out = tmp_path_factory.mktemp("campaign")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.delenv("SAE_LENS_ALLOC_BACKEND", raising=False)
        patch.setattr(command, "all_tasks", with_a_broken_one(out / "repaired"))
        assert exit_status(out, "--minutes", "9") == 3
        yield out


def with_a_broken_one(marker: Path) -> Callable[..., list[Task]]:
    def tasks(*arguments: Any) -> list[Task]:
        broken = Task("kernels", "broken", broken_until, (marker,))
        return [broken, *plan.all_tasks(*arguments)]

    return tasks


def exit_status(out: Path, *arguments: str) -> Any:
    try:
        command.main([str(out), "--rehearse", "--device", "cpu", *arguments])
    except SystemExit as stopped:
        return stopped.code
    return 0


def test_the_rehearsal_has_a_result_of_everything(rehearsed: Path):
    report = json.loads((rehearsed / FILENAME).read_text())
    tasks = plan.all_tasks(REHEARSAL, "cpu")
    for planned in tasks:
        result = report[planned.part][planned.name]
        assert "failed" not in result, result
        assert planned.facts.items() <= result.items()
        if planned.facts.get("subject") == "sparsify topk":
            continue  # need not be installed
        assert "not_available" not in result
        if planned.part == "kernels":
            assert result["wrong"] == {}
            assert result["n_cases"] >= 2
        if planned.part == "steps" and planned.name != plan.RATES:
            assert len(result["seconds"]) == len(result["floor_seconds"]) == 1
        if planned.part == "pipeline":
            assert result["tokens_per_second"] > 0
            in_training = "run;training;"
            assert result["seconds"].keys() >= {
                f"{in_training}activation store",
                f"{in_training}activation store;activation store;language model",
                f"{in_training}trainer;SAE forward",
                f"{in_training}trainer;SAE backward",
                f"{in_training}trainer;optimizer",
            }
        if planned.part == "synthetic":
            assert 0 <= result["f1"] <= 1
    backends = [row.get("backend_used") for row in report["steps"].values()]
    assert {"triton", "triton_prefilter", "torch"} <= set(backends)
    assert report["kernels"]["broken"]["failed"] == "RuntimeError: no kernel image"
    # few files come back from a machine that is borrowed
    assert [path.name for path in rehearsed.iterdir()] == [FILENAME]


def test_a_second_run_does_what_failed_and_nothing_else(
    rehearsed: Path, tmp_path: Path
):
    path = tmp_path / FILENAME
    before = json.loads((rehearsed / FILENAME).read_text())
    path.write_text(json.dumps(before))
    # no time: nothing changes
    assert exit_status(tmp_path, "--minutes", "0") == 3
    assert json.loads(path.read_text()) == before
    (rehearsed / "repaired").touch()
    try:
        assert exit_status(tmp_path, "--minutes", "9") == 0
    finally:
        (rehearsed / "repaired").unlink()
    after = json.loads(path.read_text())
    assert after["kernels"]["broken"]["n_cases"] == 1
    changed = [
        name
        for part in PARTS
        for name, result in after[part].items()
        if result != before[part][name] and "not_available" not in result
    ]
    assert changed == ["broken"]


def test_the_section_of_the_documents(rehearsed: Path, tmp_path: Path):
    without = section_of(tmp_path / "performance_gpu.json")
    assert without.startswith("Nothing has been measured on a GPU yet: `python -m ")
    assert without.count(". ") == 0  # one sentence
    shown = section_of(rehearsed / FILENAME)
    report = json.loads((rehearsed / FILENAME).read_text())
    assert shown == section(report)
    assert shown.startswith(report["card"]["name"])
    headings = [line for line in shown.splitlines() if line.startswith("###")]
    assert len(headings) == 6
    rows = [row for row in report["steps"].values() if "seconds" in row]
    assert shown.count("| mutual_choice, first quarter |") == sum(
        row["subject"] == "mutual_choice, first quarter" for row in rows
    )
    assert "- kernels: broken: failed: RuntimeError: no kernel image" in shown


def test_a_card_that_is_not_there_is_told_at_once(tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="^cuda cannot be used: "):
        command.main([str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        command.main([str(tmp_path), "--device", "cpu"])
    assert stopped.value.code == 2
    assert list(tmp_path.iterdir()) == []
