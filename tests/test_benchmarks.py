"""The benchmarks run at tiny shapes, and compute what they claim from what they measured."""

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import comparison_tables, tables
from benchmarks.clock import Clock
from benchmarks.measure import Pace, peak_memory, time_step
from benchmarks.own_process import in_own_process
from benchmarks.pipeline import Variant, in_fresh_process
from benchmarks.shape import SWEEPS, Shape
from benchmarks.subject import Machine, Subject, SubjectKind
from benchmarks.subjects import SUBJECTS
from sae_lens_alloc.ops.backend import backend_for

pytestmark = pytest.mark.slow

TINY = Shape(d_in=8, d_sae=64, k=2, batch=16)
INSTALLED = [name for name, kind in SUBJECTS.items() if kind.is_installed]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    sizes = ["--d-in", "8", "--d-sae", "64", "--k", "2", "--batch", "16"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *sizes, *arguments])
    benchmarks.main()


def measured_row(**changes: object) -> tables.Row:
    row = {"subject": "ours", "d_in": 8, "d_sae": 64, "k": 2, "batch": 16, "aux": False}
    return {
        **row,
        "seconds": [1.0],
        "floor_seconds": [0.5],
        "working_bytes": 0,
        **changes,
    }


@pytest.mark.parametrize("aux", [False, True])
@pytest.mark.parametrize("name", INSTALLED)
def test_subject_trains_on_every_batch(name: str, aux: bool):
    shape = TINY.with_aux() if aux else TINY
    torch.manual_seed(0)
    subject = SUBJECTS[name].build(shape, Machine())
    before = [parameter.clone() for parameter in subject.parameters]
    n_taken = 0

    def batches() -> Iterator[torch.Tensor]:
        nonlocal n_taken
        for n_taken in range(1, 4):
            yield torch.randn(shape.batch, shape.d_in)

    subject.train(batches())
    assert n_taken == 3
    for old, new in zip(before, subject.parameters, strict=True):
        if name == "SAELens jumprelu" and new.shape == (shape.d_sae,):
            continue  # its threshold and bias move only where a pre-activation is near
        assert not torch.equal(old, new)


def test_working_memory_holds_the_dense_matrices_of_a_dense_step():
    shape = Shape(d_in=8, d_sae=8192, k=2, batch=512)
    result = in_own_process(peak_memory, "SAELens topk", shape, Machine())
    # at least the affinities and their gradient
    assert result["working_bytes"] > 2 * 4 * shape.batch * shape.d_sae
    # parameters, gradients and two moments, and Adam's step counters
    assert result["persistent_bytes"] == 4 * 4 * shape.n_parameters + 4 * 4


def test_a_round_is_so_many_steps_of_both(monkeypatch: pytest.MonkeyPatch):
    steps: list[str] = []

    def build(shape: Shape, machine: Machine) -> Subject:
        def train(batches: Iterator[torch.Tensor]) -> None:
            for batch in batches:
                steps.append("step" if len(batch) == TINY.batch else "tiny")

        return Subject(train, [], [])

    def floor(*_: object) -> Any:
        return lambda _: steps.append("floor")

    monkeypatch.setitem(SUBJECTS, "counted", SubjectKind(build))
    monkeypatch.setattr("benchmarks.measure.floor", floor)
    pace = Pace(warm_up_steps=2, steps_per_round=3, rounds=2)
    result = time_step("counted", TINY, Machine(), pace)
    assert len(result["seconds"]) == len(result["floor_seconds"]) == 2
    steps.remove("floor")  # the one that makes Adam's state
    assert steps == ["tiny", "step", "step", *2 * [*3 * ["floor"], *3 * ["step"]]]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mutual_choice", "its trainer makes none"),  # on a CPU
        ("SAELens topk", "its trainer makes none"),
    ],
)
def test_a_graph_that_was_asked_for_and_not_made_has_its_reason(name: str, reason: str):
    result = in_own_process(peak_memory, name, TINY, Machine(cuda_graph=True))
    assert (result["replays_graph"], result["why_no_graph"]) == (False, reason)
    assert "replays_graph" not in in_own_process(peak_memory, name, TINY, Machine())


def test_a_process_has_the_precision_and_the_backend_of_its_machine(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("SAE_LENS_ALLOC_BACKEND", "torch")
    before = torch.get_float32_matmul_precision()
    try:
        Machine(matmul="high", backend="reference").prepare()
        assert torch.get_float32_matmul_precision() == "high"
        assert backend_for(torch.device("cpu")) == "reference"
        Machine().prepare()
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


def test_measurements_are_kept_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "results.json"
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, str(path), "--minutes", "0")
    assert stopped.value.code == 3
    assert not path.exists()

    run(monkeypatch, str(path), "--parts", "centre", "memory")
    report = json.loads(path.read_text())
    assert {row["subject"] for row in report["centre"]} == set(INSTALLED)
    for row in report["centre"]:
        assert len(row["seconds"]) == len(row["floor_seconds"]) >= 2
        # all in all the process did not shrink
        assert row["working_bytes"] + row["persistent_bytes"] >= 0
    assert [row["d_sae"] for row in report["memory"]] == 4 * [64, 128, 256, 512, 1024]
    assert all(row["estimated_working_bytes"] > 0 for row in report["memory"])
    assert len(tables.centre_table(report).splitlines()) == 3 + len(report["centre"])

    finished = path.read_bytes()
    run(monkeypatch, str(path), "--parts", "centre", "memory", "--minutes", "0")
    assert path.read_bytes() == finished


def test_results_of_another_setting_are_not_mixed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"machine": "an abacus"}))
    with pytest.raises(SystemExit, match="another machine"):
        run(monkeypatch, str(path))
    assert json.loads(path.read_text()) == {"machine": "an abacus"}


def test_lead_is_the_range_of_ratios_to_saelens_with_the_same_auxiliary_loss():
    def row(subject: str, aux: bool, times_floor: float) -> tables.Row:
        times = {"seconds": [times_floor], "floor_seconds": [1.0]}
        return measured_row(subject=subject, aux=aux, **times)

    report = {
        "centre_shape": {"d_in": 8, "d_sae": 64, "k": 2, "batch": 16},
        "autocast": False,
        "machine": "an abacus",
        "versions": {"torch": "2"},
        "centre": [
            row("mutual_choice, first quarter", False, 2.0),  # 4 times as fast
            row("mutual_choice", True, 1.0),  # 9 times as fast
            row("feature_choice", False, 0.1),  # no phase of the recipe
            row("SAELens batchtopk", False, 8.0),
            row("SAELens batchtopk", True, 9.0),
        ],
    }
    lead = tables.recipe_lead(report)
    assert "**4.0 to 9.0 times as fast**" in lead
    assert "an abacus; torch 2." in lead
    # a heading of two lines, the floor, and the rows that were asked for
    short = tables.centre_table(report, ("mutual_choice",)).splitlines()
    assert len(short) == 4
    assert short[3].startswith("| mutual_choice | 10% ")


def test_sweeps_move_one_axis_at_a_time():
    for shape in TINY.sweeps():
        moved = [axis for axis in SWEEPS if getattr(shape, axis) != getattr(TINY, axis)]
        assert len(moved) == 1
    assert [shape.d_sae for shape in TINY.sweeps()][:5] == [16, 32, 128, 256, 512]


def test_what_would_take_too_long_or_too_much_memory_is_left_out():
    at_centre = measured_row(working_bytes=10**9)
    limits = {"step_seconds": 3.0, "memory_gb": 5.0}
    assert benchmarks.too_much(at_centre, TINY.scaled("d_sae", 2), limits) is None
    # 4 times the pairs of the centre, which took 1 s
    slow = benchmarks.too_much(at_centre, TINY.scaled("batch", 4), limits)
    assert slow == "a step would take about 4 s"
    # 8 times the k of the centre, which took 1 GB
    large = benchmarks.too_much(at_centre, TINY.scaled("k", 8), limits)
    assert large == "would take about 8 GB"


def test_growth_is_the_exponent_of_a_power_law():
    points = [(x, 3 * x**1.5) for x in (1.0, 2.0, 8.0, 32.0)]
    assert tables.slope(points) == pytest.approx(1.5)


def test_times_floor_is_taken_within_each_round():
    row = measured_row(seconds=[2.0, 9.0, 4.0], floor_seconds=[1.0, 3.0, 4.0])
    assert tables.times_floor(row) == 2.0


def test_sweep_table_has_the_centre_and_says_what_was_left_out():
    report = {
        "centre_shape": {"d_in": 8, "d_sae": 64, "k": 2, "batch": 16, "aux": False},
        "centre": [measured_row(), measured_row(aux=True)],
        "sweeps": [
            measured_row(d_sae=128, seconds=[2.0]),
            {**measured_row(d_sae=256), "skipped": "would take about 99 GB"},
            measured_row(batch=32),
        ],
    }
    *_, line = tables.time_table(report, "d_sae").splitlines()
    assert line == (
        "| ours | 1.00 s (2.0) | 2.00 s (4.0) | would take about 99 GB | d_sae^1.00 |"
    )


def test_clock_gives_each_moment_to_the_innermost_part(
    monkeypatch: pytest.MonkeyPatch,
):
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    clock = Clock()

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    wait(100)  # in no part
    with clock.part("run"):
        wait(1)
        inner = clock.timed("inner", wait)
        inner(2)
        wait(4)
        with pytest.raises(ZeroDivisionError), clock.part("inner"):
            wait(8)
            _ = 1 / 0
        wait(16)
    assert clock.seconds() == {"run": 1 + 4 + 16, "run;inner": 2 + 8}
    assert clock.seconds_of_other_threads() == {}

    thread = threading.Thread(target=clock.timed("beside", wait), args=(32,))
    thread.start()
    thread.join()
    assert clock.seconds_of_other_threads() == {"beside": 32}
    assert clock.seconds() == {"run": 21, "run;inner": 10}


def test_clock_waits_for_the_device_at_both_ends_of_a_part(
    monkeypatch: pytest.MonkeyPatch,
):
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    queued = 0.0

    def work(seconds: float) -> None:
        nonlocal queued
        queued += seconds

    def wait() -> None:
        nonlocal now, queued
        now, queued = now + queued, 0.0

    clock = Clock(wait)
    with clock.part("run"):
        work(1)
        with clock.part("inner"):
            work(2)
        work(4)
    assert clock.seconds() == {"run": 1 + 4, "run;inner": 2}


def test_all_seams_of_a_run_are_timed():
    sae = "sae={architecture: batchtopk, d_in: 192, d_sae: 64, k: 4}"
    run = in_fresh_process(Variant((sae, "n_batches_in_buffer=16"), 4096, stock=True))
    in_training = "run;training;"
    assert run["seconds"].keys() >= {
        "run;imports",
        "run;start-up",
        f"{in_training}activation store",
        f"{in_training}activation store;activation store;language model",
        f"{in_training}trainer;SAE forward",
        f"{in_training}trainer;SAE backward",
        f"{in_training}trainer;optimizer",
        "run;saving and check",
    }
    assert tables.pipeline_parts(run["seconds"]).keys() <= set(tables.PIPELINE_PARTS)


def test_pipeline_table_adds_up():
    seconds = {
        "run;imports": 1.0,
        "run": 0.5,
        "run;training": 0.5,
        "run;training;trainer;SAE forward": 2.0,
        "run;training;activation store;language model": 4.0,
        "run;calibration;activation store;language model": 1.0,
        "run;calibration": 1.0,
    }
    run = {"training_tokens": 1300, "seconds": seconds, "background_seconds": {}}
    report = {
        "machine": "an abacus",
        "versions": {"torch": "2"},
        "config": "demo.yaml",
        "variants": {"ours": run},
    }
    assert tables.pipeline_table(report).splitlines()[2:] == [
        "| | ours |",
        "|---|---|",
        "| training tokens | 1,300 |",
        "| imports | 1.0 s (10.0%) |",
        "| language model | 4.0 s (40.0%) |",
        "| SAE forward | 2.0 s (20.0%) |",
        "| calibration: activations of 65k tokens | 1.0 s (10.0%) |",
        "| calibration: thresholds | 1.0 s (10.0%) |",
        "| other | 1.0 s (10.0%) |",
        "| **whole** | **10.0 s** |",
        "| in a thread beside it |  |",
        "| tokens/s of the training loop | 200 |",
    ]


def comparison_results() -> dict[str, Any]:
    """Two of four rows at k 8, one for each architecture needed; of them SAELens' at 16, too."""

    def point(row: str, k: float, **figures: tuple[float, ...]) -> dict[str, Any]:
        figures = {"uniqueness": (1,), "l0": (k,), "dead_features": (0,), **figures}
        figures = {"rare_features": (1200,), "seconds": (90.4,), **figures}
        return {
            "row": row,
            "k": k,
            "chosen": {"lr": 0.002},
            "runs": [{}, {}],
            "over_seeds": {
                key: {"mean": sum(v) / len(v), "min": min(v), "max": max(v)}
                for key, v in figures.items()
            },
        }

    return {
        "complete": False,
        "subject": {"kind": "synthetic"},
        "settings": {
            "compare": {
                "k": [8, 16],
                "rows": {
                    "mutual_choice": {"architecture": "mutual_choice"},
                    "stock": {"architecture": "topk"},
                    "late": {"architecture": "topk_aux_zipf"},
                    "stock, too": {"architecture": "topk"},
                },
            }
        },
        "points": [
            point(
                "mutual_choice",
                8,
                explained_variance=(0.9, 0.92),
                f1=(0.7,),
                mcc=(0.6, 0.8),
            ),
            point("stock", 8, explained_variance=(0.88,), f1=(0.8,), mcc=(0.5, 0.7)),
            point("stock", 16, explained_variance=(0.95,), f1=(0.8,), mcc=(0.5,)),
        ],
    }


def test_learning_rates_and_seeds_of_a_rows_own_are_told():
    results: dict[str, Any] = {
        "complete": True,
        "subject": {
            "activations": "here",
            "d_in": 4,
            "d_sae": 8,
            "tokens": {"train": 1000, "test": 100},
        },
        "machine": {
            "machine": "abacus",
            "device": "cpu",
            "jobs": 1,
            "threads_per_job": 1,
        },
        "versions": {"torch": "2", "sae_lens": "6"},
        "settings": {
            "compare": {
                "seeds": [0],
                "lr": [1e-3, "2e-3"],
                "rows": {"topk": {}, "gated": {"lr": [2e-3, 4e-3], "seeds": [0, 1]}},
            }
        },
    }
    told = comparison_tables.compared_on(results, "again")
    assert "learning rates tried: 0.001, 0.002; gated: 0.002, 0.004. abacus" in told
    assert "mean of 1 to 2 seeds (lowest to highest); learning" in told


def test_a_k_that_a_row_to_be_told_has_not_reached_is_left_out_of_tables():
    lines = comparison_tables.all_rows(comparison_results()).splitlines()
    assert lines[0] == "**8 features per token**"
    assert lines[4:] == [
        "| mutual_choice | 0.9100 (0.9000–0.9200) | 0.7000 | 0.7000 (0.6000–0.8000) | 1.0000 | 8.00 "
        "| 0 | 1,200 | 90 | 0.002 | 2 |",
        "| stock | 0.8800 | 0.8000 | 0.6000 (0.5000–0.7000) | 1.0000 | 8.00 "
        "| 0 | 1,200 | 90 | 0.002 | 2 |",
        "| late | not trained yet | – | – | – | – | – | – | – | – | – |",
        "| stock, too | not trained yet | – | – | – | – | – | – | – | – | – |",
    ]


def test_the_lead_is_what_less_is_to_be_desired():
    """0.09 of the variance instead of 0.12, 0.3 of F1 instead of 0.2, 0.3 of MCC of 0.4."""
    lines = comparison_tables.lead_table(
        comparison_results(), "mutual_choice"
    ).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:5]]
    assert [[row[1], *row[3:]] for row in cells] == [
        ["variance explained", "0.8800, stock", "25.0%", "yes"],
        ["F1", "0.8000, stock", "-50.0%", "no"],
        ["MCC", "0.6000 (0.5000–0.7000), stock", "25.0%", "no"],
    ]
