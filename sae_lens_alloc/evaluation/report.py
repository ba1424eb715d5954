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
    LEAST_SPAN,
    density_plot,
    features_per_token_plot,
    quantile,
    training_plot,
)
from sae_lens_alloc.evaluation.report_run import AtEqualL0, ReportRun, colour
from sae_lens_alloc.evaluation.report_tables import figures_of_laws, figures_of_runs
from sae_lens_alloc.evaluation.snippets import Snippet
from sae_lens_alloc.progress import announced


@dataclass(frozen=True)
class TrainingMetric:
    """
    A training metric that the report plots.

    Args:
        key: SAELens' name of the metric.
        title: Its title in the report.
        axis: Title of the y axis.
        caption: How to read the plot.
        tick_format: How to write values, as a d3 format.
        second: Key of a related metric, and the label of its line.
        from_zero: Whether the y axis starts at 0.
        least_span: The y axis shows at least this much.
    """

    key: str
    title: str
    axis: str
    caption: str
    tick_format: str = ""
    second: tuple[str, str] | None = None
    from_zero: bool = False
    least_span: float = 0.0


TRAINING_METRICS = (
    TrainingMetric(
        "metrics/explained_variance",
        "Variance explained",
        "variance explained",
        "Higher is better. The first tenth of the training may be below the plot.",
        ".3~f",
        least_span=LEAST_SPAN,
    ),
    TrainingMetric(
        "metrics/l0",
        "Features per token",
        "mean active features",
        "The features that were active in training. The thin dotted line, where a run has one, is "
        "the features that the thresholds of inference would have activated on the same batch.",
        second=("metrics/threshold_l0", "by thresholds"),
        from_zero=True,
    ),
    TrainingMetric(
        "sparsity/dead_features",
        "Dead features",
        "features",
        "Features that no token has used for a while (the run's dead_feature_window, in "
        "training steps). They can come back to life. Lower is better.",
        ",",
        from_zero=True,
    ),
)


SAVED_AND_LOADED = (
    "Every SAE was saved, loaded again and run as a user would run it, on {n_tokens:,} tokens of text "
    "that it was not trained on."
)
# With more runs, each is a line of the tables instead of a column, which would be too narrow.
MOST_COLUMNS = 4
# Share of the tokens that the colour scale of the text covers. The others get its last colour.
SCALE_END = 0.95


def write_report(
    path: Path,
    title: str,
    intro: str,
    runs: Sequence[ReportRun],
    snippets: Sequence[Snippet] = (),
    facts: Mapping[str, str] | None = None,
    links: Mapping[str, str] | None = None,
    about_text: str = SAVED_AND_LOADED,
    equal_l0: AtEqualL0 | None = None,
) -> None:
    """
    Writes the report of some runs that were evaluated on the same tokens.

    Args:
        path: HTML file to write.
        title: Heading of the page.
        intro: What was done, in a sentence or two.
        runs: Any number of runs, the one of interest first.
        snippets: Parts of the evaluated text to colour.
        facts: What the runs have in common, such as the model's name.
        links: Other pages, by what is said of them, relative to this one.
        about_text: What the SAEs were measured on, in a sentence with `n_tokens`.
        equal_l0: The same runs at the same number of features per token.
    """
    with announced("writing the report"):
        page = render_report(
            title, intro, runs, snippets, facts, links, about_text, equal_l0
        )
    path.write_text(page, encoding="utf-8")


def render_report(
    title: str,
    intro: str,
    runs: Sequence[ReportRun],
    snippets: Sequence[Snippet] = (),
    facts: Mapping[str, str] | None = None,
    links: Mapping[str, str] | None = None,
    about_text: str = SAVED_AND_LOADED,
    equal_l0: AtEqualL0 | None = None,
) -> str:
    """The report as HTML; see write_report."""
    environment = Environment(
        loader=PackageLoader("sae_lens_alloc", "evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=False,
    )
    evaluations = {run.name: run.evaluation for run in runs}
    largest = max(quantile(of.l0_histogram, SCALE_END) for of in evaluations.values())
    plots = {
        "density": density_plot(
            {name: of.density_curve() for name, of in evaluations.items()}
        ),
        "features_per_token": features_per_token_plot(
            {name: of.l0_histogram for name, of in evaluations.items()}
        ),
    }
    return environment.get_template("report.html.jinja").render(
        title=title,
        intro=intro,
        facts=facts or {},
        links=links or {},
        runs=runs,
        colours={run.name: colour(i) for i, run in enumerate(runs)},
        about_text=about_text.format(n_tokens=runs[0].evaluation.n_tokens),
        figures_of_runs=figures_of_runs,
        figures_of_laws=figures_of_laws,
        most_columns=MOST_COLUMNS,
        is_bent=any(
            (law := run.evaluation.zipf_law()) is not None
            and law.beta == max(BETA_GRID)
            for run in runs
        ),
        max_beta=max(BETA_GRID),
        equal_l0=equal_l0,
        plotly_js=Markup(get_plotlyjs()),
        plots={
            **{
                name: plot_html(figure, name.replace("_", "-"))
                for name, figure in plots.items()
            },
            "training": _training_plots(runs),
        },
        levels=levels(),
        largest=largest,
        snippets=[
            [_coloured(run, snippet, largest) for snippet in snippets] for run in runs
        ]
        if snippets
        else [],
    )


def _training_plots(runs: Sequence[ReportRun]) -> list[dict[str, str]]:
    """Title, caption and plot of each training metric that a run has."""
    return [
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
                    metric.least_span,
                ),
                metric.key.replace("/", "-"),
            ),
        }
        for metric in TRAINING_METRICS
        if any(run.series(metric.key)[0] for run in runs)
    ]


def _coloured(run: ReportRun, snippet: Snippet, largest: int) -> list[ColouredToken]:
    counts = snippet.counts(run.evaluation.features_per_token)
    return colour_tokens(snippet.tokens, counts, largest)


def plot_html(figure: go.Figure, name: str, height: int = 430) -> Markup:
    """A plot as HTML for a page that contains plotly. `height` is in pixels."""
    return Markup(
        figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            div_id=f"plot-{name}",
            default_height=f"{height}px",
            config={"displayModeBar": False, "responsive": True},
        )
    )
