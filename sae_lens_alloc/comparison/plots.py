"""The plots in the report of a comparison, one function each."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lens_alloc.evaluation.plots import LEAST_SPAN, axis_range, faint, new_figure
from sae_lens_alloc.evaluation.report_run import colour, line_dash

# A point of results.json: one row at one k.
Point = Mapping[str, Any]

# An axis of L0 shows at least this share of it.
LEAST_SHARE = 0.25

RULES = {
    "topk": "TopK: 4 for every token",
    "mutual_choice": "Mutual Choice: the largest",
    "feature_choice": "Feature Choice: a share for every feature",
}
DEAD_COUNTS = {
    "dead_features": "never active",
    "very_rare_features": "on < 1 token in 100,000",
    "rare_features": "on < 1 token in 10,000",
}


def points_by_row(points: Iterable[Point]) -> dict[str, list[Point]]:
    """The points of each row, in the order of `points`."""
    rows: dict[str, list[Point]] = {}
    for point in points:
        rows.setdefault(point["row"], []).append(point)
    return rows


def pareto_plot(
    rows: Mapping[str, Sequence[Point]], metric: str, label: str, tick_format: str
) -> go.Figure:
    """A metric over L0 on the same split: mean over seeds, with the range of the seeds as an area."""
    figure = new_figure("features per token (L0)", label)
    for i, (row, points) in enumerate(rows.items()):
        points = sorted(
            (point for point in points if metric in point["over_seeds"]),
            key=lambda point: point["over_seeds"]["l0"]["mean"],
        )
        l0 = [point["over_seeds"]["l0"]["mean"] for point in points]
        values = [point["over_seeds"][metric] for point in points]
        figure.add_scatter(
            x=l0 + l0[::-1],
            y=[v["max"] for v in values] + [v["min"] for v in reversed(values)],
            mode="lines",
            line={"width": 0},
            fill="toself",
            fillcolor=faint(colour(i)),
            legendgroup=row,
            showlegend=False,
            hoverinfo="skip",
        )
        figure.add_scatter(
            x=l0,
            y=[v["mean"] for v in values],
            name=row,
            legendgroup=row,
            mode="lines+markers",
            line={"color": colour(i), "width": 2, "dash": line_dash(i)},
            text=[f"k {point['k']:g}, {len(point['runs'])} seeds" for point in points],
            hovertemplate=f"{row}, %{{text}}<br>L0 %{{x:.2f}}: %{{y:{tick_format}}}"
            "<extra></extra>",
        )
    shown = [
        point["over_seeds"]
        for points in rows.values()
        for point in points
        if metric in point["over_seeds"]
    ]
    for axis, name, share in (("xaxis", "l0", LEAST_SHARE), ("yaxis", metric, 0.0)):
        low = min((figures[name]["min"] for figures in shown), default=0.0)
        high = max((figures[name]["max"] for figures in shown), default=1.0)
        ends = axis_range(low, high, share * high or LEAST_SPAN)
        figure.update_layout({axis: {"range": ends}})
    figure.update_yaxes(tickformat=tick_format)
    return figure


def dead_plot(rows: Mapping[str, Sequence[Point]], k: float, d_sae: int) -> go.Figure:
    """Share of the features that are dead or rare at one k: mean over seeds, with their range."""
    figure = new_figure("", "share of features")
    shown = {
        row: point["over_seeds"]
        for row, points in rows.items()
        for point in points
        if point["k"] == k and point["runs"]
    }
    for i, (metric, name) in enumerate(DEAD_COUNTS.items()):
        figures = [over_seeds[metric] for over_seeds in shown.values()]
        figure.add_bar(
            x=list(shown),
            y=[f["mean"] / d_sae for f in figures],
            error_y={
                "array": [(f["max"] - f["mean"]) / d_sae for f in figures],
                "arrayminus": [(f["mean"] - f["min"]) / d_sae for f in figures],
                "thickness": 1,
            },
            name=name,
            marker={"color": ("#1f2430", "#7d8597", "#c8cdd8")[i]},
            text=[f"{f['mean']:,.0f}" for f in figures],
            hovertemplate=f"%{{x}}<br>{name}: %{{text}} features, %{{y:.2%}}<extra></extra>",
        )
    figure.update_traces(textposition="none")
    figure.update_layout(barmode="group")
    figure.update_yaxes(tickformat="~%", rangemode="tozero")
    return figure


def allocation_plot(rules: Mapping[str, Sequence[Sequence[float]]]) -> go.Figure:
    """Active token-feature pairs under each rule. Larger affinities are darker."""
    figure = make_subplots(
        rows=1,
        cols=len(rules),
        subplot_titles=[RULES[rule] for rule in rules],
        horizontal_spacing=0.04,
    )
    largest = max(max(map(max, affinities)) for affinities in rules.values())
    for column, affinities in enumerate(rules.values(), start=1):
        figure.add_trace(
            go.Heatmap(
                # the smallest is at half of the scale, so that every active pair can be seen
                z=[
                    [0.5 + value / largest / 2 if value else 0 for value in row]
                    for row in affinities
                ],
                customdata=affinities,
                colorscale=[[0, "#f5f6f8"], [0.5, "#9dc3dd"], [1, "#00395c"]],
                zmin=0,
                zmax=1,
                showscale=False,
                xgap=1,
                ygap=1,
                hovertemplate="token %{y}, feature %{x}: %{customdata}<extra></extra>",
            ),
            row=1,
            col=column,
        )
    style: Any = new_figure("", "").layout
    figure.update_layout(
        template="none",
        font=style.font,
        height=360,
        margin={"l": 40, "r": 12, "t": 40, "b": 44},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    figure.update_annotations(font={"size": 13})
    figure.update_xaxes(title="feature", showticklabels=False, showgrid=False)
    figure.update_yaxes(
        autorange="reversed", showticklabels=False, showgrid=False, zeroline=False
    )
    figure.update_yaxes(title="token", row=1, col=1)
    return figure
