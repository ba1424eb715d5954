"""The plots of the report, one function each."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
import torch

from sae_lens_alloc.evaluation.report_run import ReportRun, colour
from sae_lens_alloc.evaluation.usage import DensityCurve, log_spaced

INK, MUTED, GRID = "#1f2430", "#5d6472", "#e3e6ec"
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif'
# Runs differ in dashes as well as in colour, for readers and printers without colour.
DASHES = ("solid", "dash", "dot", "dashdot")
MAX_BARS = 80
MAX_LAWS_IN_LEGEND = 3
SETTLED_SHARE = 0.1
# An axis of shares shows at least this much of them, so that it does not enlarge noise.
LEAST_SPAN = 0.05
SPIKE_SHARE = 0.9


def density_plot(curves: Mapping[str, DensityCurve | None]) -> go.Figure:
    """
    Density of features over their rank, log-log, with the fitted Zipf law.

    Args:
        curves: By name. None, for a curve that is not known, leaves its colour unused.
    """
    figure = new_figure("feature rank (1 is the most frequent)", "share of tokens")
    for i, (name, curve) in enumerate(curves.items()):
        if curve is None:
            continue
        figure.add_scatter(
            x=curve.ranks,
            y=[count / curve.n_tokens for count in curve.firings],
            name=name,
            mode=_mode(curve.ranks),
            legendgroup=name,
            line={"color": colour(i), "width": 3},
            hovertemplate=f"{name}<br>rank %{{x:,}}: active on %{{y:.3%}} of tokens<extra></extra>",
        )
        if curve.law is None:
            continue
        ranks = log_spaced(curve.n_fitted)
        figure.add_scatter(
            x=ranks.tolist(),
            y=curve.law.density(ranks.double()).tolist(),
            name=f"{name}: fitted law, R² {curve.law.r2:.2f}",
            legendgroup=name,
            showlegend=len(curves) <= MAX_LAWS_IN_LEGEND,
            mode="lines",
            line={"color": colour(i), "width": 1.5, "dash": "dash"},
            hovertemplate=f"law of {name}<br>rank %{{x:,}}: %{{y:.3%}}<extra></extra>",
        )
    figure.update_xaxes(type="log", dtick=1, tickformat=",")
    figure.update_yaxes(type="log", dtick=1, tickformat="~%")
    return figure


def features_per_token_plot(
    histograms: Mapping[str, torch.Tensor | None],
) -> go.Figure:
    """
    How many tokens get how many features.

    A rule that gives every token the same number has a spike. Beside other rules, the picture
    cuts it off, so that the others can be seen.

    Args:
        histograms: Number of tokens with 0, 1, 2, ... features, by name. None, for one that is
            not known, leaves its colour unused.
    """
    figure = new_figure("active features on a token", "share of tokens")
    last = max(quantile(x, 0.999) for x in histograms.values() if x is not None)
    width = 1 + last // MAX_BARS
    starts = [width * bar for bar in range(last // width + 1)]
    ranges = [f"{x}" if width == 1 else f"{x} to {x + width - 1}" for x in starts]
    peaks: list[float] = []
    for i, (name, histogram) in enumerate(histograms.items()):
        if histogram is None:
            continue
        n_tokens = histogram.sum().item()
        shares = (_binned(histogram, width, len(starts)) / n_tokens).tolist()
        peaks.append(max(shares))
        mean = (histogram * torch.arange(len(histogram))).sum().item() / n_tokens
        figure.add_scatter(
            x=[x + (width - 1) / 2 for x in starts],
            y=shares,
            text=ranges,
            name=f"{name}, mean {mean:.1f}",
            mode="lines",
            line={"color": colour(i), "width": 2.5, "shape": "hvh"},
            fill="tozeroy",
            fillcolor=faint(colour(i)),
            hovertemplate=f"{name}<br>%{{text}} features: %{{y:.2%}} of tokens<extra></extra>",
        )
    figure.update_xaxes(range=[-0.5, last + 0.5])
    figure.update_yaxes(tickformat="~%", rangemode="tozero")
    spread = [peak for peak in peaks if peak < SPIKE_SHARE]
    if 0 < len(spread) < len(peaks):
        figure.update_yaxes(range=[0, 1.25 * max(spread)])
    return figure


def training_plot(
    runs: Sequence[ReportRun],
    key: str,
    label: str,
    tick_format: str = "",
    second: tuple[str, str] | None = None,
    from_zero: bool = False,
    least_span: float = 0.0,
) -> go.Figure:
    """
    One training metric over the tokens seen, with vertical lines where the recipe changed.

    Args:
        runs: The runs, one line each.
        key: SAELens' name of the metric.
        label: Title of the y axis.
        tick_format: How to write values, as a d3 format.
        second: Key of a related metric and its label. It is a thin line if a run has it.
        from_zero: Whether the y axis starts at 0. Otherwise it shows the range of the values
            after the first tenth of training.
        least_span: The y axis shows at least this much.
    """
    figure = new_figure("tokens seen in training", label)
    settled: list[float] = []
    for i, run in enumerate(runs):
        lines = [(key, run.name, 2.5, _dash(i))]
        if second is not None:
            lines.append((second[0], f"{run.name}, {second[1]}", 1.2, "dot"))
        for metric, name, width, dash in lines:
            tokens, values = run.series(metric)
            if not tokens:
                continue
            figure.add_scatter(
                x=tokens,
                y=values,
                name=name,
                mode=_mode(tokens),
                line={"color": colour(i), "width": width, "dash": dash},
                hovertemplate=f"{name}<br>%{{x:,}} tokens: %{{y:{tick_format or '.4~g'}}}<extra></extra>",
            )
            settled += [
                value
                for seen, value in zip(tokens, values, strict=True)
                if seen >= SETTLED_SHARE * tokens[-1] and math.isfinite(value)
            ]
        for when, what in run.events:
            _mark(figure, when, what, colour(i))
    if settled:
        low, high = 0.0 if from_zero else min(settled), max(settled)
        figure.update_yaxes(range=axis_range(low, high, least_span))
    figure.update_xaxes(tickformat="~s", rangemode="tozero")
    figure.update_yaxes(tickformat=tick_format)
    return figure


def axis_range(low: float, high: float, least_span: float = 0.0) -> list[float]:
    """
    The ends of an axis that shows the values from `low` to `high` with a margin, and not less than
    `least_span`. If neither is above 0, it shows 1 to both sides.
    """
    margin = max(0.06 * (high - low), (least_span - (high - low)) / 2) or 1.0
    return [low - margin, high + margin]


def _mode(points: Sequence[Any]) -> str:
    """A line of one point would not be seen."""
    return "lines" if len(points) > 1 else "markers"


def _mark(figure: go.Figure, when: float, what: str, its_colour: str) -> None:
    """A vertical line with a label."""
    figure.add_vline(
        x=when,
        line={"color": its_colour, "width": 1, "dash": "dot"},
        annotation={
            "text": what,
            "font": {"size": 12, "color": its_colour},
            "textangle": -90,
            "yanchor": "bottom",
            "y": 0.02,
            "xanchor": "right",
        },
    )


def new_figure(x: str, y: str) -> go.Figure:
    """An empty figure in the style of the report, with titles of its axes."""
    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=430,
        margin={"l": 62, "r": 12, "t": 12, "b": 52},
        font={"family": FONT, "size": 13, "color": INK},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        showlegend=True,
        hoverlabel={"bgcolor": "white", "font": {"family": FONT, "color": INK}},
    )
    axis: dict[str, Any] = {
        "gridcolor": GRID,
        "linecolor": MUTED,
        "showline": True,
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": GRID,
        "automargin": True,
    }
    figure.update_xaxes(**axis, title={"text": x, "font": {"color": MUTED}})
    figure.update_yaxes(**axis, title={"text": y, "font": {"color": MUTED}})
    return figure


def faint(hex_colour: str) -> str:
    """A colour such as "#0072B2", nearly transparent, for areas."""
    red, green, blue = (int(hex_colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.10)"


def _binned(histogram: torch.Tensor, width: int, n_bars: int) -> torch.Tensor:
    """The counts of each bar, which is `width` neighbouring counts wide; float64 of shape (n_bars,)."""
    end = width * n_bars
    padded = torch.cat([histogram, histogram.new_zeros(end)])[:end]
    return padded.view(n_bars, width).sum(1).double()


def _dash(index: int) -> str:
    return DASHES[index % len(DASHES)]


def quantile(histogram: torch.Tensor, share: float) -> int:
    """The smallest number of features that at least `share` of the tokens do not exceed."""
    cumulative = histogram.cumsum(0)
    return int((cumulative < share * cumulative[-1]).sum())
