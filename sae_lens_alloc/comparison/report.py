"""The report of a comparison: one self-contained HTML page, from its results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from sae_lens_alloc.comparison.finished import measured_at
from sae_lens_alloc.comparison.plots import (
    Point,
    allocation_plot,
    dead_plot,
    pareto_plot,
    points_by_row,
)
from sae_lens_alloc.comparison.results import (
    middle_k,
    numbers_of_seeds,
)
from sae_lens_alloc.evaluation.figures import density_curve
from sae_lens_alloc.evaluation.plots import density_plot, features_per_token_plot
from sae_lens_alloc.evaluation.report import plot_html
from sae_lens_alloc.evaluation.report_run import colour
from sae_lens_alloc.progress import announced


@dataclass(frozen=True)
class Metric:
    """
    A figure measured on held-out activations.

    Args:
        key: Its name in results.json.
        name: Its name for readers.
        meaning: What it is, in one sentence.
        form: How to write a value in a table.
        plotted: Whether a curve over L0 is drawn.
    """

    key: str
    name: str
    meaning: str
    form: str = "{:.4f}"
    plotted: bool = False


SHARED = (
    Metric(
        "explained_variance",
        "variance explained",
        "1 − squared error ÷ variance of the activations, over all tokens.",
        plotted=True,
    ),
)
LANGUAGE_MODEL = (
    Metric(
        "ce_recovered_mean",
        "CE recovered, against the mean",
        "The mean activation for every token adds to the next-token loss. This is the share of "
        "that loss that the SAE's reconstruction recovers.",
        plotted=True,
    ),
    Metric(
        "ce_recovered_zero",
        "CE recovered, against zero",
        "The same with zero for every activation.",
        plotted=True,
    ),
    Metric(
        "kl_divergence",
        "KL divergence",
        "Divergence of the model's next-token distribution with the SAE from its own, in nats. "
        "Lower is better.",
    ),
)
SYNTHETIC = (
    Metric(
        "f1",
        "F1",
        "How well the firing of each feature of the SAE predicts when its nearest known feature "
        "is active, mean over features.",
        plotted=True,
    ),
    Metric(
        "mcc",
        "MCC",
        "Mean cosine similarity of decoder rows and known features, matched one to one.",
        plotted=True,
    ),
    Metric("uniqueness", "uniqueness", "Share of different known features found."),
)
# One's own activations have nothing further to be measured by.
OF_KIND = {
    "language_model": LANGUAGE_MODEL,
    "synthetic": SYNTHETIC,
    "own_activations": (),
}
COUNTS = (
    Metric("l0", "features per token", "L0, as measured.", "{:.2f}"),
    Metric("dead_features", "dead", "Features active on no token.", "{:,.0f}"),
    Metric("very_rare_features", "< 1e-5", "On fewer than 1 in 100,000.", "{:,.0f}"),
    Metric("rare_features", "< 1e-4", "On fewer than 1 in 10,000.", "{:,.0f}"),
)
LAWS = (
    Metric("zipf_alpha", "α", "Exponent of the fitted law.", "{:.2f}"),
    Metric("zipf_beta", "β", "Length of its flat head, in ranks.", "{:.0f}"),
    Metric("zipf_r2", "R²", "How well the law fits, on a log-log scale.", "{:.3f}"),
)


def write_comparison_report(path: Path, results: Mapping[str, Any]) -> None:
    """
    Writes the report of a comparison.

    Args:
        path: HTML file to write.
        results: The content of results.json.
    """
    with announced("writing the report"):
        path.write_text(render_comparison_report(results), encoding="utf-8")


def render_comparison_report(results: Mapping[str, Any]) -> str:
    """The report as HTML; see write_comparison_report."""
    points: list[Point] = results["points"]
    rows = points_by_row(points)
    ks = sorted({point["k"] for point in points})
    middle = middle_k(ks)
    metrics = (*SHARED, *OF_KIND[results["subject"]["kind"]], *COUNTS)
    split = results["settings"]["compare"].get("measured_on", "test")
    shown = {
        row: _one_run(results["cells"], point, split)
        for row, points in rows.items()
        for point in points
        if point["k"] == middle
    }
    curves = {
        row: density_curve(run) if run and "density_curve" in run else None
        for row, run in shown.items()
    }
    allocation = results["allocation"]
    environment = Environment(
        loader=PackageLoader("sae_lens_alloc", ""),
        autoescape=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("comparison/report.html.jinja").render(
        results={"failed": {}, **results},  # earlier versions wrote no "failed"
        split=split,
        rows=rows,
        seeds=numbers_of_seeds(results["settings"]["compare"]),
        ks=ks,
        middle=middle,
        metrics=metrics,
        laws=LAWS,
        colours={row: colour(i) for i, row in enumerate(rows)},
        cell=_cell,
        why_empty=_why_empty,
        plotly_js=Markup(get_plotlyjs()),
        pareto=_pareto_plots(rows, metrics),
        dead=plot_html(
            dead_plot(rows, middle, results["subject"]["d_sae"]), "dead-features"
        ),
        density=plot_html(density_plot(curves), "density")
        if any(curves.values())
        else None,
        features_per_token=_features_per_token(shown),
        allocation=plot_html(allocation_plot(allocation["rules"]), "allocation", 360)
        if allocation
        else None,
    )


def _pareto_plots(
    rows: Mapping[str, list[Point]], metrics: Sequence[Metric]
) -> list[dict[str, Any]]:
    return [
        {
            "metric": metric,
            "html": plot_html(
                pareto_plot(rows, metric.key, metric.name, ".3~f"),
                f"pareto-{metric.key}",
            ),
        }
        for metric in metrics
        if metric.plotted
    ]


def _features_per_token(shown: Mapping[str, dict[str, Any] | None]) -> Markup | None:
    """The plot of features per token, None if no SAE has been measured."""
    if not any(shown.values()):
        return None
    histograms = {
        row: torch.tensor(run["l0_histogram"]) if run else None
        for row, run in shown.items()
    }
    return plot_html(features_per_token_plot(histograms), "features-per-token")


def _cell(point: Point, metric: Metric) -> Markup:
    """Mean over seeds and, below it, their range."""
    figures = point["over_seeds"].get(metric.key)
    if figures is None:
        return Markup("–")
    mean, low, high = (metric.form.format(figures[x]) for x in ("mean", "min", "max"))
    if low == high:
        return Markup(mean)
    return Markup("{}<small>{}–{}</small>").format(mean, low, high)


def _why_empty(point: Point) -> str:
    """Why a row has no SAE at this k."""
    whys = [tried["failed"] for tried in point["tried"] if "failed" in tried]
    if whys and len(whys) == len(point["tried"]):
        return f"failed: {whys[0]}"
    if point["chosen"] is not None:
        return "could not be measured"
    return "no thresholds reach this L0"


def _one_run(
    cells: Mapping[str, Any], point: Point, split: str
) -> dict[str, Any] | None:
    """Figures of the SAE of one seed, with its density curve if one of the seeds has a curve."""
    runs = [
        measured
        for run in point["runs"]
        if (measured := measured_at(cells[run["cell"]], split, point["k"]))
    ]
    with_curve = [run for run in runs if "density_curve" in run]
    return next(iter(with_curve + runs), None)
