"""The report page: what it says, that it stands alone, and that a browser draws it."""

import dataclasses
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import torch
from plotly.offline import get_plotlyjs

from sae_lens_alloc.allocation.zipf import ZipfLaw
from sae_lens_alloc.evaluation.coloured_text import (
    N_LEVELS,
    colour_tokens,
    levels,
)
from sae_lens_alloc.evaluation.metrics import Evaluation
from sae_lens_alloc.evaluation.plots import (
    density_plot,
    features_per_token_plot,
    quantile,
    training_plot,
)
from sae_lens_alloc.evaluation.report import render_report, write_report
from sae_lens_alloc.evaluation.report_run import ReportRun
from sae_lens_alloc.evaluation.snippets import Snippet

N_FEATURES = 400
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
PHONE_WIDTH = 500  # Chromium makes no narrower window
SNIPPETS = [Snippet(0, 1, ("<script>", "alert", "('&')", "\n", "end"))]


def make_run(name: str, seed: int = 0) -> ReportRun:
    """A run whose densities follow a known law, with a history of 20 rows."""
    generator = torch.Generator().manual_seed(seed)
    law = ZipfLaw(alpha=1.1, beta=4.0, scale=1.5)
    densities = law.density(torch.arange(1, N_FEATURES + 1, dtype=torch.float64))
    densities[-3:] = 0.0
    counts = torch.randint(0, 40, (100, 64), generator=generator)
    counts[:, 0] = -1
    return ReportRun(
        name=name,
        evaluation=Evaluation(
            explained_variance=0.8123 + seed / 1000,
            loss=3.0,
            loss_with_sae=3.2,
            loss_zero_ablated=8.0,
            loss_mean_ablated=7.0,
            kl_divergence=0.3,
            features_per_token=counts,
            densities=densities[torch.randperm(N_FEATURES, generator=generator)],
        ),
        seconds=61.4,
        history=[
            {
                "step": i,
                "details/n_training_samples": 1000 * (i + 1),
                "metrics/l0": 16.0,
                "metrics/explained_variance": 1 - 1 / (i + 1),
                "sparsity/dead_features": 20 - i,
            }
            for i in range(20)
        ],
        events=[(15_000, "the rule changes")],
        settings={"learning rate": "0.002"},
    )


@pytest.fixture(scope="module")
def runs() -> list[ReportRun]:
    return [make_run("mutual_choice"), make_run("batchtopk", 1), make_run("topk", 2)]


@pytest.fixture(scope="module")
def page(runs: list[ReportRun]) -> str:
    return render_report("A title", "An intro.", runs, SNIPPETS, {"hook": "h.2"})


def traces(figure: go.Figure) -> list[Any]:
    return list(figure.data)


class Sources(HTMLParser):
    """Collects what a page would load, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [
            value or ""
            for name, value in attrs
            if name in ("src", "srcset", "data", "poster")
            or (name == "href" and tag == "link")
        ]


def without_plotly(page: str) -> str:
    assert page.count(get_plotlyjs()) == 1
    return page.replace(get_plotlyjs(), "")


def test_the_page_loads_nothing(page: str):
    own = without_plotly(page)
    sources = Sources()
    sources.feed(own)
    assert sources.loaded == []
    assert "http://" not in own and "https://" not in own
    assert "@import" not in own and "url(" not in own


def test_the_page_holds_the_figures(page: str, runs: list[ReportRun]):
    text = re.sub(r"<[^>]+>", " ", without_plotly(page))
    for run in runs:
        assert run.name in text
        assert f"{run.evaluation.explained_variance:.4f}" in text
        assert f"{run.evaluation.l0:.2f}" in text
    # (7 - 3.2) / (7 - 3) and (8 - 3.2) / (8 - 3)
    assert text.count("0.9500") == 3
    assert text.count("0.9600") == 3
    assert "An intro." in text and "h.2" in text


def test_text_is_shown_and_not_run(page: str):
    own = without_plotly(page)
    assert "<script>alert" not in own
    assert "&lt;script&gt;" in own
    count = make_run("mutual_choice").evaluation.features_per_token[0, 1].item()
    assert f'data-n="{count}">&lt;script&gt;' in own


def test_other_pages_are_linked(runs: list[ReportRun]):
    page = render_report("t", "i", runs, links={"Features & more": "features.html"})
    assert '<a href="features.html">Features &amp; more</a>' in page


@pytest.mark.parametrize("n_runs", [1, 2, 5])
def test_any_number_of_runs(n_runs: int):
    page = render_report("t", "i", [make_run(f"run {i}", i) for i in range(n_runs)])
    assert page.count("Plotly.newPlot(") >= 5
    assert "run 0" in page


def test_a_run_without_history_and_with_hardly_any_feature(runs: list[ReportRun]):
    evaluation = dataclasses.replace(
        runs[0].evaluation, densities=torch.tensor([0.1, 0.0], dtype=torch.float64)
    )
    bare = ReportRun("bare", evaluation, 1.0)
    assert bare.evaluation.zipf_law() is None
    page = render_report("t", "i", [bare])
    assert "R², all ranks" in page
    assert "<h2>Training</h2>" not in page


def test_the_law_is_found_and_drawn(runs: list[ReportRun]):
    law = runs[0].evaluation.zipf_law()
    assert law is not None
    assert law.beta == 4.0
    assert law.alpha == pytest.approx(1.1, abs=0.01)
    assert law.r2 > 0.999
    measured, fitted = traces(density_plot({"a": runs[0].evaluation.density_curve()}))
    assert measured.x[0] == 1 and measured.x[-1] == N_FEATURES - 3
    assert list(measured.y) == sorted(measured.y, reverse=True)
    assert fitted.y[0] == pytest.approx(measured.y[0], rel=0.05)


def test_features_seen_too_seldom_are_not_fitted():
    run = make_run("a")
    n_tokens = run.evaluation.n_tokens
    densities = torch.tensor([9, 10, 200, 300, 400]).double() / n_tokens
    run = dataclasses.replace(
        run, evaluation=dataclasses.replace(run.evaluation, densities=densities)
    )
    assert len(run.evaluation.fitted_densities) == 4


def test_the_histogram_shows_every_token(runs: list[ReportRun]):
    (line,) = traces(features_per_token_plot({"a": runs[0].evaluation.l0_histogram}))
    assert sum(line.y) == pytest.approx(1.0)
    assert line.y[3] == pytest.approx(
        (runs[0].evaluation.l0_counts == 3).double().mean().item()
    )


def test_wide_histograms_are_binned():
    run = make_run("wide")
    counts = run.evaluation.features_per_token
    wide = dataclasses.replace(
        run.evaluation, features_per_token=torch.where(counts < 0, counts, counts * 50)
    )
    (line,) = traces(features_per_token_plot({"wide": wide.l0_histogram}))
    assert len(line.x) <= 80
    assert sum(line.y) == pytest.approx(1.0, abs=0.002)


def test_a_spike_does_not_flatten_the_other_histograms():
    """30% of the tokens have 2 features and 40% have 3; with topk all have 2."""
    spread, topk = torch.tensor([0, 0, 3, 4, 3]), torch.tensor([0, 0, 10])
    together = features_per_token_plot({"spread": spread, "topk": topk})
    layout: Any = together.layout
    assert layout.yaxis.range == pytest.approx((0, 0.5))
    # the spike ends where it should, with no token beyond
    assert list(traces(together)[1].y) == [0, 0, 1, 0, 0]
    for alone in (spread, topk):
        layout = features_per_token_plot({"alone": alone}).layout
        assert layout.yaxis.range is None


def test_training_is_plotted_over_tokens(runs: list[ReportRun]):
    figure = training_plot(runs[:1], "sparsity/dead_features", "features")
    assert list(traces(figure)[0].x) == [1000 * (i + 1) for i in range(20)]
    assert list(traces(figure)[0].y) == [20 - i for i in range(20)]
    layout: Any = figure.layout
    assert layout.shapes[0].x0 == 15_000


def test_early_values_do_not_stretch_the_axis(runs: list[ReportRun]):
    layout: Any = training_plot(runs[:1], "metrics/explained_variance", "EV").layout
    low, high = layout.yaxis.range
    assert 0.4 < low < 0.5 < 0.95 < high  # row 1, at a tenth of training, has 0.5


def test_counts_start_at_zero(runs: list[ReportRun]):
    layout: Any = training_plot(
        runs[:1], "metrics/l0", "features", from_zero=True
    ).layout
    low, high = layout.yaxis.range
    assert -2 < low < 0 and 16 < high < 18


def test_a_second_metric_is_drawn_where_there_is_one(runs: list[ReportRun]):
    with_second = dataclasses.replace(
        runs[0], history=[{**row, "metrics/x": 3.0} for row in runs[0].history]
    )
    figure = training_plot(
        [with_second, runs[1]], "metrics/l0", "l", second=("metrics/x", "by x")
    )
    names = [trace.name for trace in traces(figure)]
    assert names == ["mutual_choice", "mutual_choice, by x", "batchtopk"]


def test_a_bent_curve_is_called_one(runs: list[ReportRun], page: str):
    assert "No power law describes it" not in page
    densities = torch.exp(-torch.arange(N_FEATURES) / 60).double()
    evaluation = dataclasses.replace(runs[0].evaluation, densities=densities)
    bent = dataclasses.replace(runs[0], evaluation=evaluation)
    assert "No power law describes it" in render_report("t", "i", [runs[0], bent])


def test_quantile_of_a_histogram():
    histogram = torch.tensor([0, 5, 3, 1, 1])
    assert quantile(histogram, 0.5) == 1
    assert quantile(histogram, 0.8) == 2
    assert quantile(histogram, 1.0) == 4


def luminance(colour: str) -> float:
    """Relative luminance of "rgb(r, g, b)" as WCAG 2 defines it, from 0 to 1."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (int(channel) / 255 for channel in re.findall(r"\d+", colour))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_on_the_scale_is_readable():
    backgrounds = [luminance(level.background) for level in levels()]
    assert len(backgrounds) == N_LEVELS
    assert backgrounds == sorted(backgrounds, reverse=True)
    for level, background in zip(levels(), backgrounds, strict=True):
        # contrast ratios as WCAG 2 defines them
        with_text = {
            "#ffffff": 1.05 / (background + 0.05),
            "#000000": (background + 0.05) / 0.05,
        }
        assert with_text[level.text] == max(with_text.values()) >= 4.5


def test_tokens_are_coloured_by_their_count():
    tokens = colour_tokens(["a", "b", "c", "d"], [0, 10, 99, -1], largest=20)
    middle = round(0.5 * (N_LEVELS - 1))
    assert [t.level for t in tokens] == [0, middle, N_LEVELS - 1, -1]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page with")
def test_a_browser_draws_the_page_on_a_phone(tmp_path: Path, runs: list[ReportRun]):
    path = tmp_path / "report.html"
    write_report(path, "A title", "An intro.", runs, SNIPPETS)
    html = path.read_text()
    # what the browser laid out, told by the page itself
    probe = (
        "<script>addEventListener('load', () => setTimeout(() => {"
        "document.body.dataset.width = document.documentElement.scrollWidth;"
        "}, 500))</script></body>"
    )
    path.write_text(html.replace("</body>", probe))
    dom = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={PHONE_WIDTH},900",
            "--virtual-time-budget=3000",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    ).stdout
    drawn = dom.split("</main>")[0]
    for plot in (
        "density",
        "features-per-token",
        "metrics-explained_variance",
        "metrics-l0",
        "sparsity-dead_features",
    ):
        after = drawn.split(f'id="plot-{plot}"')[1]
        assert "main-svg" in after[:3000], plot
    # measured curve, law, and one line a run in each of the other four plots
    assert drawn.count('class="js-line"') >= 6 * len(runs)
    (laid_out,) = re.findall(r'data-width="(\d+)"', dom)
    assert int(laid_out) <= PHONE_WIDTH
