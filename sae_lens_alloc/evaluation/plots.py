"""The plots of the report, one function each."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import plotly.graph_objects as go
import torch

from sae_lens_alloc.evaluation.report_run import ReportRun, colour
from sae_lens_alloc.evaluation.usage import Usage

INK, MUTED, GRID = "#1f2430", "#5d6472", "#e3e6ec"
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif'
# Runs differ in dashes as well as in colour, for readers and printers without colour.
DASHES = ("solid", "dash", "dot", "dashdot")
N_POINTS = 300
MAX_BARS = 80
MAX_LAWS_IN_LEGEND = 3
SETTLED_SHARE = 0.1


class NamedUsage(Protocol):
    """An SAE's name and what it does with its features."""

    @property
    def name(self) -> str: ...

    @property
    def evaluation(self) -> Usage: ...


def density_plot(runs: Sequence[NamedUsage]) -> go.Figure:
    """Density of every feature over its rank, log-log, with the fitted Zipf law."""
    figure = new_figure("feature rank (1 is the most frequent)", "share of tokens")
    for i, run in enumerate(runs):
        densities = run.evaluation.densities.sort(descending=True).values
        densities = densities[densities > 0]
        ranks = _log_spaced(len(densities))
        figure.add_scatter(
            x=ranks.tolist(),
            y=densities[ranks - 1].tolist(),
            name=run.name,
            mode="lines",
            legendgroup=run.name,
            line={"color": colour(i), "width": 3},
            hovertemplate=f"{run.name}<br>rank %{{x:,}}: active on %{{y:.3%}} of tokens<extra></extra>",
        )
        law = run.evaluation.zipf_law()
        if law is None:
            continue
        ranks = _log_spaced(len(run.evaluation.fitted_densities))
        figure.add_scatter(
            x=ranks.tolist(),
            y=law.density(ranks.double()).tolist(),
            name=f"{run.name}: fitted law, R² {law.r2:.2f}",
            legendgroup=run.name,
            showlegend=len(runs) <= MAX_LAWS_IN_LEGEND,
            mode="lines",
            line={"color": colour(i), "width": 1.5, "dash": "dash"},
            hovertemplate=f"law of {run.name}<br>rank %{{x:,}}: %{{y:.3%}}<extra></extra>",
        )
    figure.update_xaxes(type="log", dtick=1, tickformat=",")
    figure.update_yaxes(type="log", dtick=1, tickformat="~%")
    return figure


def features_per_token_plot(runs: Sequence[NamedUsage]) -> go.Figure:
    """How many tokens get how many features."""
    figure = new_figure("active features on a token", "share of tokens")
    last = max(quantile(run.evaluation.l0_histogram, 0.999) for run in runs)
    width = 1 + last // MAX_BARS
    for i, run in enumerate(runs):
        shares = _binned(run.evaluation.l0_histogram, width) / run.evaluation.n_tokens
        starts = [width * bar for bar in range(last // width + 1)]
        ranges = [f"{x}" if width == 1 else f"{x} to {x + width - 1}" for x in starts]
        figure.add_scatter(
            x=[x + (width - 1) / 2 for x in starts],
            y=shares[: len(starts)].tolist(),
            text=ranges[: len(shares)],
            name=f"{run.name}, mean {run.evaluation.l0:.1f}",
            mode="lines",
            line={"color": colour(i), "width": 2.5, "shape": "hvh"},
            fill="tozeroy",
            fillcolor=faint(colour(i)),
            hovertemplate=f"{run.name}<br>%{{text}} features: %{{y:.2%}} of tokens<extra></extra>",
        )
    figure.update_xaxes(range=[-0.5, last + 0.5])
    figure.update_yaxes(tickformat="~%", rangemode="tozero")
    return figure


def training_plot(
    runs: Sequence[ReportRun],
    key: str,
    label: str,
    tick_format: str = "",
    second: tuple[str, str] | None = None,
    from_zero: bool = False,
) -> go.Figure:
    """
    One training metric over the tokens seen, with what changed on the way.

    Args:
        key: SAELens' name of the metric.
        label: Title of the y axis.
        tick_format: How to write values, as d3 formats.
        second: Name of a related metric and what to call it, drawn as a thin line where a
            run has it.
        from_zero: Start the y axis at 0; otherwise it shows the range of the values after
            the first tenth of training.
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
                mode="lines",
                line={"color": colour(i), "width": width, "dash": dash},
                hovertemplate=f"{name}<br>%{{x:,}} tokens: %{{y:{tick_format or '.4~g'}}}<extra></extra>",
            )
            settled += [
                value
                for seen, value in zip(tokens, values, strict=True)
                if seen >= SETTLED_SHARE * tokens[-1] and math.isfinite(value)
            ]
        for when, what in run.events:
            figure.add_vline(
                x=when,
                line={"color": colour(i), "width": 1, "dash": "dot"},
                annotation={
                    "text": what,
                    "font": {"size": 12, "color": colour(i)},
                    "textangle": -90,
                    "yanchor": "bottom",
                    "y": 0.02,
                    "xanchor": "right",
                },
            )
    if settled:
        low, high = 0.0 if from_zero else min(settled), max(settled)
        margin = 0.06 * (high - low) or 1.0
        figure.update_yaxes(range=[low - margin, high + margin])
    figure.update_xaxes(tickformat="~s", rangemode="tozero")
    figure.update_yaxes(tickformat=tick_format)
    return figure


def new_figure(x: str, y: str) -> go.Figure:
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
    red, green, blue = (int(hex_colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.10)"


def _binned(histogram: torch.Tensor, width: int) -> torch.Tensor:
    """Sums of `width` neighbouring counts each, float64."""
    padding = -len(histogram) % width
    padded = torch.cat([histogram, histogram.new_zeros(padding)])
    return padded.view(-1, width).sum(1).double()


def _dash(index: int) -> str:
    return DASHES[index % len(DASHES)]


def _log_spaced(n: int) -> torch.Tensor:
    """At most N_POINTS ranks from 1 to n, evenly spaced in their logarithm."""
    if n == 0:
        return torch.zeros(0, dtype=torch.long)
    end = torch.tensor(float(n), dtype=torch.float64).log10().item()
    points = torch.logspace(0, end, N_POINTS, dtype=torch.float64)
    return points.round().long().clamp(1, n).unique()


def quantile(histogram: torch.Tensor, share: float) -> int:
    """The smallest count that at least `share` of the tokens do not exceed."""
    cumulative = histogram.cumsum(0)
    return int((cumulative < share * cumulative[-1]).sum())
