"""Report pages fit their window, however many SAEs they show, and axes do not enlarge noise."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sae_lens_alloc.comparison.plots import pareto_plot, points_by_row
from sae_lens_alloc.comparison.report import render_comparison_report
from sae_lens_alloc.evaluation.plots import axis_range, training_plot
from sae_lens_alloc.evaluation.report import render_report
from sae_lens_alloc.evaluation.report_run import AtEqualL0
from tests.browser import CHROMIUM, Browser
from tests.evaluation.test_report import SNIPPETS, make_run, traces

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "compare_demo.json"
LONG_NAME = "some-output/matryoshka_mutual_choice_of_a_long_name"
# widths of the page and of each table in it, as laid out and as wide as their contents
WIDTHS = """JSON.stringify([
    [innerWidth, document.documentElement.scrollWidth],
    ...[...document.querySelectorAll(".scroll")].map(e => [e.clientWidth, e.scrollWidth])])"""


def report_of(n_runs: int) -> str:
    runs = [make_run(f"{LONG_NAME}_{i}", i) for i in range(n_runs)]
    left_out = {f"{LONG_NAME}_x": "'temporal' SAEs have no thresholds."}
    equal_l0 = AtEqualL0(16.0, runs, left_out)
    return render_report("t", "i", runs, SNIPPETS, equal_l0=equal_l0)


def comparison_of(n_rows: int) -> str:
    results: dict[str, Any] = json.loads(RESULTS.read_text())
    rows = points_by_row(results["points"])
    names = [*rows][:n_rows]
    results["points"] = [point for name in names for point in rows[name]]
    while len(names) < n_rows:  # the shipped ones, again
        again = f"{names[len(names) - len(rows)]}, once more"
        for point in rows[names[len(names) - len(rows)]]:
            results["points"].append({**copy.deepcopy(point), "row": again})
        names.append(again)
    return render_comparison_report(results)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page with")
def test_pages_of_1_and_of_15_fit_wide_and_narrow_windows(tmp_path: Path):
    pages = {
        "report of 1": report_of(1),
        "report of 4": report_of(4),
        "report of 15": report_of(15),
        "comparison of 1": comparison_of(1),
        "comparison of 15": comparison_of(15),
    }
    with Browser(tmp_path / "profile") as browser:
        for name, html in pages.items():
            path = tmp_path / "page.html"
            path.write_text(html)
            for width in (1200, 400):
                browser.resize(width, 900)
                browser.open(path)
                for room, needed in json.loads(browser.ask(WIDTHS)):
                    assert needed <= room, (name, width)
        assert browser.errors == []


def test_an_axis_shows_a_least_span():
    assert axis_range(0.0, 1.0) == pytest.approx([-0.06, 1.06])
    assert axis_range(0.870, 0.871, 0.05) == pytest.approx([0.8455, 0.8955])
    assert axis_range(0.8, 0.9, 0.05) == pytest.approx([0.794, 0.906])
    assert axis_range(3.0, 3.0) == [2.0, 4.0]


def test_a_training_of_one_row_is_a_point_on_a_calm_axis():
    run = make_run("a")
    run.history[:] = run.history[-1:]  # pyright: ignore
    figure = training_plot(
        [run], "metrics/explained_variance", "EV", ".3~f", least_span=0.05
    )
    assert traces(figure)[0].mode == "markers"
    layout: Any = figure.layout
    assert layout.yaxis.range == pytest.approx((0.95 - 0.025, 0.95 + 0.025))


def test_values_that_were_no_numbers_are_left_out():
    """metrics.jsonl holds null for NaN."""
    run = make_run("a")
    rows: list[Any] = [dict(row) for row in run.history]
    rows[3]["metrics/l0"] = None
    with_null = dataclasses.replace(run, history=rows)
    tokens, values = with_null.series("metrics/l0")
    assert len(tokens) == len(values) == len(rows) - 1
    assert 4000 not in tokens


def test_a_comparison_of_one_point_does_not_enlarge_its_seeds():
    def at(value: float) -> dict[str, float]:
        return {"mean": value, "min": value - 1e-4, "max": value + 1e-4}

    point = {
        "row": "a",
        "k": 8,
        "runs": [1, 2],
        "over_seeds": {"l0": at(8.0), "ev": at(0.9)},
    }
    layout: Any = pareto_plot({"a": [point]}, "ev", "EV", ".3~f").layout
    assert layout.yaxis.range == pytest.approx((0.875, 0.925))
    assert layout.xaxis.range == pytest.approx((7, 9), abs=1e-3)
