"""The campaign on a GPU, rehearsed: every part, one that fails, a second run, and deadlines."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import command, plan
from benchmarks.gpu.campaign import FILENAME, PARTS, Results, run_campaign
from benchmarks.gpu.rates import ADAM_BYTES, floor_of_rates
from benchmarks.gpu.scale import CARD, PRECISIONS, REHEARSAL
from benchmarks.gpu.tables import section
from benchmarks.gpu.task import Task
from benchmarks.shape import Shape
from tests.test_gpu_scheduling import ABOUT, broken_until

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
        broken = Task("kernels", "broken, triton", broken_until, (marker,))
        return [broken, *plan.all_tasks(*arguments)]

    return tasks


def exit_status(out: Path, *arguments: str) -> Any:
    try:
        command.main([str(out), "--rehearse", "--device", "cpu", *arguments])
    except SystemExit as stopped:
        return stopped.code
    return 0


@pytest.mark.slow
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
            asked = planned.facts["cuda_graph"]  # on a CPU there is none
            assert ("why_no_graph" in result) == asked
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
    assert (
        report["kernels"]["broken, triton"]["failed"] == "RuntimeError: no kernel image"
    )
    # few files come back from a machine that is borrowed
    assert [path.name for path in rehearsed.iterdir()] == [FILENAME]


@pytest.mark.slow
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
    assert after["kernels"]["broken, triton"]["n_cases"] == 1
    changed = [
        name
        for part in PARTS
        for name, result in after[part].items()
        if result != before[part][name] and "not_available" not in result
    ]
    assert changed == ["broken, triton"]


@pytest.mark.slow
def test_the_section_of_the_documents(rehearsed: Path):
    report = json.loads((rehearsed / FILENAME).read_text())
    shown = section(report)
    assert shown.startswith(report["card"]["name"])
    headings = [line for line in shown.splitlines() if line.startswith("###")]
    assert len(headings) == 6
    rows = [row for row in report["steps"].values() if "seconds" in row]
    assert shown.count("\n| mutual_choice, first quarter |") == sum(
        row["subject"] == "mutual_choice, first quarter" for row in rows
    )
    assert "- kernels: broken, triton: failed: RuntimeError: no kernel image" in shown


def test_a_card_that_is_not_there_is_told_at_once(tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="^cuda cannot be used: "):
        command.main([str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        command.main([str(tmp_path), "--device", "cpu"])
    assert stopped.value.code == 2
    assert list(tmp_path.iterdir()) == []
