"""The page of a comparison: what it says, that it stands alone, and that a browser draws it."""

import copy
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from plotly.offline import get_plotlyjs

from sae_lens_alloc.allocation.zipf import ZipfLaw
from sae_lens_alloc.comparison.allocation_picture import allocation_picture
from sae_lens_alloc.comparison.plots import dead_plot, pareto_plot
from sae_lens_alloc.comparison.report import (
    render_comparison_report,
    write_comparison_report,
)
from sae_lens_alloc.comparison.results import (
    comparison_results,
    summary,
)
from sae_lens_alloc.evaluation.figures import density_curve, figures_of
from sae_lens_alloc.evaluation.usage import Usage
from tests.evaluation.test_report import CHROMIUM, PHONE_WIDTH, traces

ROWS = ("mutual_choice, <aux>", "topk", "standard")
KS = (8.0, 16.0, 32.0)
D_SAE = 300


def make_usage(seed: int, k: float) -> Usage:
    generator = torch.Generator().manual_seed(seed)
    law = ZipfLaw(alpha=1.1, beta=4.0, scale=1.5)
    densities = law.density(torch.arange(1, D_SAE + 1, dtype=torch.float64))
    densities[-3:] = 0.0
    counts = torch.randint(0, int(2 * k), (5000,), generator=generator)
    return Usage(
        explained_variance=0.7 + k / 200 + seed / 1000,
        features_per_token=counts,
        densities=densities,
    )


def make_cell(seed: int, k: float) -> dict[str, Any]:
    usage = make_usage(seed, k)
    figures = {
        **usage.to_dict(),
        "ce_recovered_mean": 0.9,
        "ce_recovered_zero": 0.95,
        "kl_divergence": 0.1,
    }
    return {
        "seconds": 10.0 * (seed + 1),
        "peak_memory_bytes": 200_000_000,
        "measured": {"test": {f"{k:g}": figures_of(usage, figures)}},
    }


CELLS = {
    f"{row}-{k:g}-{seed}": make_cell(seed, k)
    for row in ROWS
    for k in KS
    for seed in range(3)
}


def make_point(row: str, k: float) -> dict[str, Any]:
    keys = [f"{row}-{k:g}-{seed}" for seed in range(3)]
    reached = not (row == "standard" and k == 32)
    runs = [{**CELLS[key], **CELLS[key]["measured"]["test"][f"{k:g}"]} for key in keys]
    return {
        "row": row,
        "k": k,
        "chosen": {"lr": 1e-3, "sparsity": {"k": k}} if reached else None,
        "tried": [],
        "runs": [{"seed": i, "cell": key} for i, key in enumerate(keys)]
        if reached
        else [],
        "over_seeds": summary(runs) if reached else {},
    }


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    torch.manual_seed(0)
    block = torch.rand(40, 40).mul(3).sub(2).relu().tolist()
    return comparison_results(
        {
            "kind": "language_model",
            "activations": "a model at a hook",
            "d_in": 64,
            "d_sae": D_SAE,
            "tokens": {"train": 1000, "validation": 100, "test": 5000},
        },
        {
            "compare": {
                "lr": [1e-3],
                "seeds": [0, 1, 2],
                "rows": {row: {} for row in ROWS},
            }
        },
        {"machine": "x86_64", "device": "cpu", "jobs": 1, "threads_per_job": 2},
        [make_point(row, k) for row in ROWS for k in KS],
        CELLS,
        {},
        {
            "row": "mutual_choice",
            "k": 16,
            "rules": {
                name: block for name in ("topk", "mutual_choice", "feature_choice")
            },
        },
        complete=True,
    )


def test_the_page_stands_alone(results: dict[str, Any]):
    own = render_comparison_report(results).replace(get_plotlyjs(), "")
    assert "http://" not in own and "https://" not in own
    assert "url(" not in own and " src=" not in own
    assert "<aux>" not in own.split("<script")[0]


def test_the_page_holds_means_and_ranges(results: dict[str, Any]):
    """Explained variance at k = 16: .78, .781 and .782."""
    own = render_comparison_report(results).replace(get_plotlyjs(), "")
    assert "0.7810<small>0.7800–0.7820</small>" in own
    assert own.count("no thresholds reach this L0") == 1
    # 10, 20 and 30 seconds for 1,000 tokens
    costs = re.findall(
        r"<td data-name[^>]*>([^<>]*)</td>", own.split("Cost of training")[1]
    )
    assert costs[:3] == ["20.0", "50", "200 MB"]


def test_the_page_says_how_many_seeds_rows_have(results: dict[str, Any]):
    assert "seeds <b>3</b>" in render_comparison_report(results)
    compare = copy.deepcopy(results["settings"]["compare"])
    compare["rows"][ROWS[0]]["seeds"] = [0, 1, 2, 3]
    page = render_comparison_report({**results, "settings": {"compare": compare}})
    assert "seeds <b>3 to 4</b>" in page


def test_curves_are_drawn_of_what_is_known(results: dict[str, Any]):
    """Of topk no curve is known at k = 16, of mutual_choice only the last seed's."""
    cells = copy.deepcopy(results["cells"])
    for key in ("topk-16-0", "topk-16-1", "topk-16-2"):
        del cells[key]["measured"]["test"]["16"]["density_curve"]
    for seed in (0, 1):
        measured = cells[f"{ROWS[0]}-16-{seed}"]["measured"]["test"]["16"]
        del measured["density_curve"]
    page = render_comparison_report({**results, "cells": cells})
    curves = page.split('id="plot-density"')[1].split('id="plot-')[0]
    assert "law of standard" in curves
    assert "law of mutual_choice" in curves
    assert "law of topk" not in curves
    tokens = page.split('id="plot-features-per-token"')[1].split('id="plot-')[0]
    assert "topk, mean" in tokens


def test_a_curve_is_the_same_after_it_was_written():
    usage = make_usage(0, 16)
    written = json.loads(json.dumps(figures_of(usage, usage.to_dict())))
    assert density_curve(written) == usage.density_curve()


def test_the_pareto_curve_is_the_mean_in_the_range_of_the_seeds(
    results: dict[str, Any],
):
    points = [point for point in results["points"] if point["row"] == "topk"]
    band, line = traces(
        pareto_plot({"topk": points}, "explained_variance", "EV", ".3f")
    )
    assert list(line.y) == pytest.approx([0.741, 0.781, 0.861])
    assert list(line.x) == sorted(line.x)
    assert list(band.y) == pytest.approx([0.742, 0.782, 0.862, 0.86, 0.78, 0.74])


def test_dead_features_are_shares_of_all(results: dict[str, Any]):
    points = [point for point in results["points"] if point["row"] == "topk"]
    dead, _, _ = traces(dead_plot({"topk": points}, 16, D_SAE))
    assert list(dead.y) == [3 / D_SAE]


def test_the_three_rules_spend_the_same_budget():
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig

    torch.manual_seed(1)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=16, d_sae=100))
    with torch.no_grad():
        sae.W_enc.normal_()
    activations = torch.randn(60, 16)
    rules = allocation_picture(sae, activations)
    active = {name: torch.tensor(rule) > 0 for name, rule in rules.items()}
    for pairs in active.values():
        assert pairs.shape == (40, 40)
        assert pairs.sum() == 160
    assert (active["topk"].sum(1) == 4).all()
    assert active["mutual_choice"].sum(1).unique().numel() > 1
    # shares that fall with the rank, at most 60% of the tokens
    shares = active["feature_choice"].sum(0)
    assert (shares.diff() <= 1).all() and 4 < shares.max() <= 24


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page with")
def test_a_browser_draws_the_page_on_a_phone(
    tmp_path: Path,
    results: dict[str, Any],
):
    path = tmp_path / "report.html"
    write_comparison_report(path, results)
    probe = (
        "<script>addEventListener('load', () => setTimeout(() => {"
        "document.body.dataset.width = document.documentElement.scrollWidth;"
        "}, 500))</script></body>"
    )
    path.write_text(path.read_text().replace("</body>", probe))
    dom = subprocess.run(
        [
            str(CHROMIUM),
            *("--headless", "--no-sandbox", "--disable-gpu"),
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={PHONE_WIDTH},900",
            "--virtual-time-budget=3000",
            *("--dump-dom", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    ).stdout
    for plot in (
        "pareto-explained_variance",
        "pareto-ce_recovered_mean",
        "dead-features",
        "density",
        "features-per-token",
        "allocation",
    ):
        assert "main-svg" in dom.split(f'id="plot-{plot}"')[1][:3000], plot
    (laid_out,) = re.findall(r'data-width="(\d+)"', dom)
    assert int(laid_out) <= PHONE_WIDTH


def test_what_failed_is_said(results: dict[str, Any]):
    failed = {"lr": 1.0, "sparsity": {"k": 8}, "validation_explained_variance": None}
    point = {
        **make_point("standard", 32),
        "tried": [{**failed, "failed": "the training has diverged"}],
    }
    others = [p for p in results["points"] if (p["row"], p["k"]) != ("standard", 32)]
    page = render_comparison_report(
        {
            **results,
            "points": [*others, point],
            "failed": {"standard-k32-lr1": "the training has diverged"},
        }
    )
    assert ">the training has diverged</td>" in page
    assert ">failed: the training has diverged</td>" in page
    assert "no thresholds reach this L0" not in page
    assert "What failed" not in render_comparison_report(results)
