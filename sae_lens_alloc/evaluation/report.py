"""The report: one self-contained HTML page about some trained SAEs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from sae_lens_alloc.allocation.zipf import BETA_GRID
from sae_lens_alloc.evaluation.coloured_text import (
    ColouredToken,
    colour_tokens,
    levels,
)
from sae_lens_alloc.evaluation.plots import (
    density_plot,
    features_per_token_plot,
    quantile,
    training_plot,
)
from sae_lens_alloc.evaluation.report_run import ReportRun, colour
from sae_lens_alloc.evaluation.snippets import Snippet
from sae_lens_alloc.evaluation.usage import MIN_FIRINGS


@dataclass(frozen=True)
class TrainingMetric:
    """
    A training metric that the report plots.

    Args:
        key: SAELens' name for it.
        title: Our name for it.
        axis: Title of the y axis.
        caption: How to read the plot.
        tick_format: How to write values, as d3 formats.
        second: Name of a related metric, and what to call its line.
        from_zero: Start the y axis at 0.
    """

    key: str
    title: str
    axis: str
    caption: str
    tick_format: str = ""
    second: tuple[str, str] | None = None
    from_zero: bool = False


TRAINING_METRICS = (
    TrainingMetric(
        "metrics/explained_variance",
        "Variance explained",
        "variance explained",
        "Higher is better. The first tenth of training may lie below the picture.",
        ".3~f",
    ),
    TrainingMetric(
        "metrics/l0",
        "Features per token",
        "mean active features",
        "What the batch was given; the thin dotted line, where a run has one, is what the "
        "thresholds kept for inference would have chosen from the same batch at that moment.",
        second=("metrics/threshold_l0", "by thresholds"),
        from_zero=True,
    ),
    TrainingMetric(
        "sparsity/dead_features",
        "Dead features",
        "features",
        "Features that no token has used for a while (the run's dead_feature_window, in "
        "training steps). They can come back to life; lower is better.",
        ",",
        from_zero=True,
    ),
)


# Share of the tokens within the colour scale of the text; the rest get its last colour.
SCALE_END = 0.95


def write_report(
    path: Path,
    title: str,
    intro: str,
    runs: Sequence[ReportRun],
    snippets: Sequence[Snippet] = (),
    facts: Mapping[str, str] | None = None,
) -> None:
    """
    Writes the report of some runs that were evaluated on the same tokens.

    Args:
        path: HTML file to write.
        intro: What was done, in a sentence or two.
        runs: Any number of runs, the one of interest first.
        snippets: Stretches of the evaluated text to colour.
        facts: What the runs have in common, such as the model's name.
    """
    path.write_text(
        render_report(title, intro, runs, snippets, facts), encoding="utf-8"
    )


def render_report(
    title: str,
    intro: str,
    runs: Sequence[ReportRun],
    snippets: Sequence[Snippet] = (),
    facts: Mapping[str, str] | None = None,
) -> str:
    """The report as HTML; see write_report."""
    environment = Environment(
        loader=PackageLoader("sae_lens_alloc", "evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=False,
    )
    largest = max(quantile(run.evaluation.l0_histogram, SCALE_END) for run in runs)
    return environment.get_template("report.html.jinja").render(
        title=title,
        intro=intro,
        facts=facts or {},
        runs=runs,
        colours=[colour(i) for i in range(len(runs))],
        laws=[run.evaluation.zipf_law() for run in runs],
        n_tokens=runs[0].evaluation.n_tokens,
        min_firings=MIN_FIRINGS,
        max_beta=max(BETA_GRID),
        plotly_js=Markup(get_plotlyjs()),
        plots={
            "density": plot_html(
                density_plot(
                    {run.name: run.evaluation.density_curve() for run in runs}
                ),
                "density",
            ),
            "features_per_token": plot_html(
                features_per_token_plot(
                    {run.name: run.evaluation.l0_histogram for run in runs}
                ),
                "features-per-token",
            ),
            "training": [
                {
                    "title": metric.title,
                    "caption": metric.caption,
                    "html": plot_html(
                        training_plot(
                            runs,
                            metric.key,
                            metric.axis,
                            metric.tick_format,
                            metric.second,
                            metric.from_zero,
                        ),
                        metric.key.replace("/", "-"),
                    ),
                }
                for metric in TRAINING_METRICS
                if any(run.series(metric.key)[0] for run in runs)
            ],
        },
        levels=levels(),
        largest=largest,
        snippets=[
            [_coloured(run, snippet, largest) for snippet in snippets] for run in runs
        ]
        if snippets
        else [],
    )


def _coloured(run: ReportRun, snippet: Snippet, largest: int) -> list[ColouredToken]:
    counts = snippet.counts(run.evaluation.features_per_token)
    return colour_tokens(snippet.tokens, counts, largest)


def plot_html(figure: go.Figure, name: str, height: int = 430) -> Markup:
    """A plot as a part of a page that holds plotly."""
    return Markup(
        figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            div_id=f"plot-{name}",
            default_height=f"{height}px",
            config={"displayModeBar": False, "responsive": True},
        )
    )
