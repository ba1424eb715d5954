"""What the documents say of a campaign on a GPU, from rows made by hand and from the kept ones."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import short, tables
from benchmarks.gpu.plan import all_tasks
from benchmarks.gpu.rows import COLUMNS, Column, by_setting, fastest
from benchmarks.gpu.scale import CARD
from benchmarks.plot import gpu_steps
from benchmarks.shape import Shape
from benchmarks.tables import REFERENCE
from docs.rank_costs import measured_beside_computed

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "docs" / "results" / "performance_gpu.json"
SIZES: dict[str, Any] = {"d_in": 768, "d_sae": 32768, "k": 32, "batch": 4096}
OURS = "mutual_choice"


def row(subject: str, *ms: float, **changes: Any) -> dict[str, Any]:
    """A row without a graph in float32, whose rounds took so many milliseconds."""
    ours = subject.startswith(OURS)
    return {
        **{"subject": subject, "backend": "triton" if ours else None, **SIZES},
        **{"aux": False, "precision": "float32", "cuda_graph": False},
        **{"seconds": [n / 1e3 for n in ms], "floor_seconds": [0.004] * len(ms)},
        **{"working_bytes": 25e7, **({"backend_used": "triton"} if ours else {})},
        **changes,
    }


def replayed(*ms: float, **changes: Any) -> dict[str, Any]:
    return row(OURS, *ms, cuda_graph=True, replays_graph=True, **changes)


def not_recorded(*ms: float, **changes: Any) -> dict[str, Any]:
    return row(OURS, *ms, cuda_graph=True, replays_graph=False, **changes)


def report(*rows: dict[str, Any], **parts: Any) -> dict[str, Any]:
    return {
        **{
            "card": {"name": "card"},
            "scale": CARD.name,
            "versions": {"torch": "2"},
        },
        **{part: {} for part in ("kernels", "memory", "pipeline", "synthetic")},
        "steps": {str(i): row for i, row in enumerate(rows)},
        **parts,
    }


# -- Rows


def test_rows_are_of_one_shape_and_precision_and_those_with_a_result():
    found = by_setting(
        report(
            row(OURS, 4.0, aux=True),
            row(OURS, 1.0, precision="TF32"),
            row(OURS, 2.0),
            row(REFERENCE, 3.0),
            {**row(REFERENCE, 3.0, precision="TF32"), "out_of_memory": "16 GiB"},
        )
    )
    shape = Shape(**SIZES)
    assert list(found) == [
        (shape, "float32"),
        (shape.with_aux(), "float32"),
        (shape, "TF32"),
    ]
    assert [len(rows) for rows in found.values()] == [2, 1, 1]


def test_a_graph_that_was_not_recorded_is_in_no_column():
    rows = [row(OURS, 3.0), row(OURS, 2.0), not_recorded(1.0), replayed(1.5)]
    assert fastest(rows, Column(OURS)) is rows[1]
    assert fastest(rows, Column(OURS, has_graph=True)) is rows[3]
    assert fastest(rows[:3], Column(OURS, has_graph=True)) is None


# -- What is said first


def test_the_lead_says_where_it_is_level_and_where_sparsify_is_faster():
    bf16, tf32 = {"precision": "bfloat16 autocast"}, {"precision": "TF32"}
    lead = short.lead(
        report(
            *(row(OURS, 10.0), row(REFERENCE, 29.0), row("sparsify topk", 7.0)),
            *(row(OURS, 10.0, **bf16), row(REFERENCE, 11.4, **bf16)),
            *(replayed(5.0, **bf16), row("sparsify topk", 7.0, **bf16)),
            *(row(OURS, 10.0, **tf32), row(REFERENCE, 8.0, **tf32)),
            # not without dead features
            *(row(OURS, 1.0, aux=True), row(REFERENCE, 9.0, aux=True)),
        )
    )
    assert lead == (
        "On one card, a step of `mutual_choice` without dead features is, beside "
        "SAELens' `batchtopk`, 2.9 times as fast in float32, about as fast (1.1 times) in "
        "bfloat16 autocast (2.3 times with a CUDA graph) and 0.8 times as fast in TF32 at "
        "d_in 768 → d_sae 32,768. sparsify's `topk` computes in bfloat16 autocast and trains "
        "with SignSGD. It is faster than ours in float32 (7.0 ms, ours 10.0 ms) at d_in 768 → "
        "d_sae 32,768; slower than ours in bfloat16 autocast (7.0 ms, ours 5.0 ms with a "
        f"CUDA graph) at d_in 768 → d_sae 32,768. {short.NOT_ON_A_GPU}"
    )


def test_the_lead_of_a_run_that_ended_early_says_what_there_is():
    assert short.lead(report()) == short.NOT_ON_A_GPU
    assert short.lead(report(row(OURS, 10.0))) == short.NOT_ON_A_GPU


def test_the_short_table_by_hand():
    content = report(
        row(OURS, 10.0, 12.0, 11.0),
        row(OURS, 10.0, 20.0, 30.0, aux=True),
        row(REFERENCE, 22.0),
    )
    assert short.short_table(content).splitlines() == [
        "| d_in → d_sae, B | precision | dead features | mutual_choice | SAELens batchtopk |",
        "|---|---|---|---|---|",
        "| 768 → 32,768, 4,096 | float32 | none | 11.0 (2.0×) | 22.0 |",
        "| 768 → 32,768, 4,096 | float32 | 10% | 20.0 (rounds 10.0–30.0) | – |",
    ]


def test_other_leads_are_of_what_was_measured():
    nothing = report()
    assert short.pipeline_lead(nothing) == ""
    assert short.row_sparse_lead(nothing) == "On a GPU it was not measured."
    assert short.synthetic_lead(nothing) == "- SynthSAEBench-16k, which needs a GPU."
    content = report(
        row(OURS, 10.0),
        row("mutual_choice, row-sparse Adam", 30.0),
        synthetic={
            "1": {"architecture": "batchtopk", "samples": 5000},
            "2": {"architecture": "batchtopk", "samples": 9000, "failed": "killed"},
        },
    )
    assert "30.0 ms, and with Adam 10.0 ms, in float32" in short.row_sparse_lead(
        content
    )
    assert "trained: `batchtopk` on 5,000 samples (" in short.synthetic_lead(content)


# -- Tables


def cells(table: str) -> Iterator[list[str]]:
    for line in table.splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def test_a_step_table_says_why_no_graph_was_recorded():
    (table,) = tables.step_tables(
        report(
            row(REFERENCE, 20.0),
            not_recorded(10.0),
            not_recorded(11.0, why_no_graph="the budget falls"),
            not_recorded(12.0, why_no_graph="the budget falls", aux=True),
            replayed(5.0),
            row("sparsify topk", 8.0),
            row(OURS, 9.0, backend=None),
        )
    )
    _, *rows = cells(table)
    assert [(r[0], r[1], r[2], r[3], r[4].split()[0], r[6]) for r in rows] == [
        (OURS, "triton", "replayed", "none", "5.00", "4.0"),
        ("sparsify topk (bfloat16 autocast)", "", "", "none", "8.00", "2.5"),
        (OURS, "triton (its own choice)", "", "none", "9.00", "2.2"),
        (OURS, "triton", "asked for, none recorded", "none", "10.00", "2.0"),
        (OURS, "triton", "asked for, none recorded", "none", "11.00", "1.8"),
        (REFERENCE, "", "", "none", "20.00", "1.0"),
        (OURS, "triton", "asked for, none recorded", "10%", "12.00", ""),
    ]
    assert table.endswith(
        "Why no graph was recorded:\n\n"
        "- mutual_choice (triton); mutual_choice (triton, 10% dead): the budget falls"
    )
    assert "(bfloat16 autocast)" not in "".join(
        tables.step_tables(
            report(row("sparsify topk", 8.0, precision="bfloat16 autocast"))
        )
    )


def test_memory_has_ours_first_by_width_and_what_did_not_fit():
    def measured(subject: str, d_sae: int, **changes: Any) -> dict[str, Any]:
        return {
            **row(subject, **SIZES | {"d_sae": d_sae}),
            **{"persistent_bytes": 3e9, "working_bytes": 5e8},
            **changes,
        }

    table = tables.memory_table(
        report(
            memory={
                "1": measured(
                    REFERENCE, 2**20, out_of_memory="CUDA out of memory. Tried"
                ),
                "2": measured(OURS, 2**20, estimated_working_bytes=2e9),
                "3": measured(OURS, 2**15, estimated_working_bytes=1e9),
                "4": measured(REFERENCE, 2**15),
                "5": measured(OURS, 2**16, failed="killed"),
            }
        )
    )
    _, *rows = cells(table)
    assert rows == [
        ["768", "32,768", OURS, "3.00 GB", "0.50 GB", "1.00 GB", "3.50 GB"],
        ["768", "1,048,576", OURS, "3.00 GB", "0.50 GB", "2.00 GB", "3.50 GB"],
        ["768", "32,768", REFERENCE, "3.00 GB", "0.50 GB", "", "3.50 GB"],
        ["768", "1,048,576", REFERENCE, "", "", "", "out of memory"],
    ]


def test_kernels_are_in_a_cell_by_backend_and_wrong_cases_below():
    table = tables.kernels_table(
        report(
            kernels={
                "products, triton, float32": {
                    "n_cases": 9,
                    "wrong": {"a": "2 pairs are missing", "b": "2 pairs are missing"},
                },
                "products, triton, bfloat16": {"n_cases": 9, "wrong": {}},
                "gradients, torch": {"n_cases": 16, "wrong": {}},
                "gradients, triton": {"failed": "killed"},
            }
        )
    )
    assert list(cells(table)) == [
        ["kernel", "triton", "triton_prefilter", "torch"],
        ["gradients", "–", "–", "16/16"],
        ["products", "bfloat16: 9/9, float32: 7/9", "–", "–"],
    ]
    assert table.endswith("\n- products, triton, float32: 2 pairs are missing (2: a)")


def test_what_has_no_result_is_told_in_a_line():
    content = report(
        {**row(REFERENCE), "out_of_memory": "OutOfMemoryError: CUDA. Tried. GPU 0 has"},
        {**row(OURS), "not_available": "no Triton"},
        memory={"x": {**row(REFERENCE), "out_of_memory": "is a row of the table"}},
    )
    assert tables.missing(content) == (
        "- steps: 0: out of memory\n- steps: 1: not available: no Triton"
    )


def test_what_was_not_reached_is_counted_and_named():
    tasks = all_tasks(CARD, "cuda")
    content = report()
    for task in tasks:
        content[task.part][task.name] = task.facts
    assert tables.not_reached(content) == ""
    libraries = ("dictionary_learning batchtopk", "dictionary_learning topk")
    left_out = [task for task in tasks if task.facts.get("subject") in libraries]
    left_out += [task for task in tasks if task.part == "pipeline"][:1]
    for task in left_out:
        del content[task.part][task.name]
    n_steps = sum(task.part == "steps" for task in tasks)
    assert tables.not_reached(content).splitlines() == [
        f"- steps: {len(left_out) - 1} of {n_steps} measurements, all of "
        f"{'; '.join(libraries)}",
        "- pipeline: 1 of 4 measurements",
    ]


def test_the_picture_has_a_bar_of_medians_for_each_row_of_the_short_table():
    picture = gpu_steps(
        report(
            row(OURS, 10.0, 12.0, 17.0),
            row(OURS, 14.0, precision="TF32"),
            replayed(5.0),
            row(OURS, 20.0, aux=True),
            row(OURS, 30.0, d_sae=65536),
        )
    )
    found: list[Any] = list(picture.data)
    bars = {
        (bar.name, bar.xaxis): dict(zip(bar.x, bar.y, strict=True)) for bar in found
    }
    assert bars == {
        ("mutual_choice", "x"): pytest.approx({"float32": 12.0, "TF32": 14.0}),
        ("mutual_choice", "x2"): pytest.approx({"float32": 30.0}),
        ("mutual_choice", "x3"): pytest.approx({"float32": 20.0}),
        ("mutual_choice, CUDA graph", "x"): pytest.approx({"float32": 5.0}),
    }
    first = found[0]
    assert first.error_y.array[0] == pytest.approx(5.0)
    assert first.error_y.arrayminus[0] == pytest.approx(2.0)
    assert sum(bar.showlegend for bar in found) == 2


# -- The kept results


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return json.loads(KEPT.read_text())


def test_all_kept_kernels_are_right_and_the_section_has_every_part(
    kept: dict[str, Any],
):
    assert kept["scale"] == CARD.name
    assert all(result["wrong"] == {} for result in kept["kernels"].values())
    section = tables.section(kept)
    for heading in ("A training step", "Memory", "The whole pipeline", "SynthSAEBench"):
        assert f"### {heading}" in section
    for rows in by_setting(kept).values():
        assert any(fastest(rows, column) for column in COLUMNS)


def test_a_step_takes_at_least_what_was_computed_for_many_gpus(kept: dict[str, Any]):
    told = measured_beside_computed(kept).partition("a step takes ")[2].split(";")
    for words in told:
        measured, _, computed = words.partition(" ms in ")
        assert float(measured) > float(computed.partition(" and not ")[2].split()[0])


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_pages_say_what_was_not_measured_on_a_gpu(page: str):
    text = (ROOT / page).read_text()
    assert short.NOT_ON_A_GPU in text
    assert "Nothing has been measured on a GPU" not in text
