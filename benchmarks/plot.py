"""Draws the pictures of the documents; plotly needs kaleido and a Chrome for that."""

import hashlib
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from benchmarks.comparison_tables import finished_ks
from benchmarks.gpu.rows import COLUMNS, by_setting, fastest
from benchmarks.gpu.scale import PRECISIONS
from benchmarks.tables import floor_seconds, measured, seconds, sweep
from sae_lens_alloc.comparison.plots import pareto_plot, points_by_row

COLOURS = (
    *("#0b62c4", "#4dabf7", "#16a34a", "#d9480f", "#f08c00"),
    *("#9c36b5", "#868e96", "#e64980", "#5f3dc4"),
)
SYMBOLS = (
    *("circle", "circle-open", "square", "diamond", "cross"),
    *("x", "triangle-up", "hexagram", "star"),
)
# Of ours without and with a CUDA graph, in both phases, and of others.
GPU_COLOURS = ("#0b62c4", "#3b93e0", "#15803d", "#4aa564", "#d9480f", "#9c36b5")
OURS = ("mutual_choice", "mutual_choice, first quarter", "feature_choice")
COMPARED = {
    "language_model": {
        "Explained variance": "explained_variance",
        "CE recovered (mean ablation)": "ce_recovered_mean",
        "Dead features": "dead_features",
    },
    "synthetic": {
        "Explained variance": "explained_variance",
        "F1": "f1",
        "MCC": "mcc",
    },
}

STYLE: dict[str, Any] = {
    "template": "none",
    "font": {"family": "Helvetica, Arial, sans-serif", "size": 13, "color": "#1f2430"},
    "paper_bgcolor": "white",
}
AXIS_STYLE: dict[str, Any] = {"gridcolor": "#e3e6ec", "linecolor": "#5d6472"}
LEGEND_BELOW = {"orientation": "h", "x": 0.5, "xanchor": "center", "y": -0.2}


def growth(report: dict[str, Any]) -> go.Figure:
    """Seconds and working memory of a step over d_sae, log-log."""
    picture = make_subplots(
        cols=2,
        rows=1,
        subplot_titles=("Seconds per training step", "Working memory (GB)"),
        horizontal_spacing=0.09,
    )
    by_subject = {name: measured(rows) for name, rows in sweep(report, "d_sae").items()}
    sizes = sorted({row["d_sae"] for rows in by_subject.values() for row in rows})
    for i, (name, rows) in enumerate(by_subject.items()):
        style: dict[str, Any] = {
            "name": name,
            "legendgroup": name,
            "mode": "lines+markers",
            "line": {"color": COLOURS[i], "width": 3 if name in OURS else 1.8},
            "marker": {"symbol": SYMBOLS[i], "size": 8},
        }
        x = [row["d_sae"] for row in rows]
        picture.add_scatter(
            x=x, y=[seconds(row) for row in rows], **style, row=1, col=1
        )
        picture.add_scatter(
            x=x,
            y=[row["working_bytes"] / 1e9 for row in rows],
            **style,
            showlegend=False,
            row=1,
            col=2,
        )
    floors = [
        sorted(
            floor_seconds(
                [
                    row
                    for rows in by_subject.values()
                    for row in rows
                    if row["d_sae"] == size
                ]
            )
        )
        for size in sizes
    ]
    picture.add_scatter(
        x=sizes,
        y=[values[len(values) // 2] for values in floors],
        name="floor",
        mode="lines",
        line={"color": "#212529", "width": 1.5, "dash": "dot"},
        row=1,
        col=1,
    )
    picture.update_xaxes(
        type="log",
        tickvals=sizes,
        ticktext=[f"{size:,}" for size in sizes],
        title="d_sae",
        **AXIS_STYLE,
    )
    picture.update_yaxes(type="log", dtick="D2", **AXIS_STYLE)
    picture.update_layout(
        width=1100,
        height=470,
        margin={"l": 50, "r": 20, "t": 40, "b": 120},
        legend=LEGEND_BELOW,
        **STYLE,
    )
    return picture


def gpu_steps(report: dict[str, Any]) -> go.Figure:
    """
    Milliseconds of a step on a GPU in groups by precision: medians, and lines from the shortest
    to the longest round. A column of panels for each shape, a row of them without and with dead
    features.
    """
    settings = by_setting(report)
    shapes = list(dict.fromkeys(replace(shape, aux=False) for shape, _ in settings))
    with_dead = sorted({shape.aux for shape, _ in settings})
    panels = [[replace(shape, aux=aux) for shape in shapes] for aux in with_dead]
    measured_shapes = {shape for shape, _ in settings}
    picture = make_subplots(
        cols=len(shapes),
        rows=len(with_dead),
        specs=[
            [{} if shape in measured_shapes else None for shape in row]
            for row in panels
        ],
        subplot_titles=[
            f"d_in {shape.d_in:,} → d_sae {shape.d_sae:,}, B {shape.batch:,}<br>"
            f"{'a tenth of the features dead' if shape.aux else 'no feature dead'}"
            for row in panels
            for shape in row
            if shape in measured_shapes
        ],
        # a group for each precision, and room for the title
        column_widths=[
            1
            + sum(
                any((shape, name) in settings for shape in of_size)
                for name in PRECISIONS
            )
            for of_size in zip(*panels, strict=True)
        ],
        horizontal_spacing=0.07,
        vertical_spacing=0.2,
    )
    for i, column in enumerate(COLUMNS):
        is_in_legend = False
        for y, x in product(range(len(panels)), range(len(shapes))):
            bars = {
                precision: [1e3 * value for value in found["seconds"]]
                for (of, precision), rows in settings.items()
                if of == panels[y][x] and (found := fastest(rows, column)) is not None
            }
            if bars:
                picture.add_bar(
                    **_bars(bars),
                    name=str(column),
                    legendgroup=str(column),
                    showlegend=not is_in_legend,
                    marker={"color": GPU_COLOURS[i]},
                    row=y + 1,
                    col=x + 1,
                )
                is_in_legend = True
    picture.update_xaxes(**{**AXIS_STYLE, "showgrid": False})
    picture.update_xaxes(categoryorder="array", categoryarray=list(PRECISIONS))
    picture.update_yaxes(rangemode="tozero", **AXIS_STYLE)
    picture.update_yaxes(title="ms per training step", col=1)
    picture.update_layout(
        barmode="group",
        width=1100,
        height=120 + 330 * len(with_dead),
        margin={"l": 60, "r": 20, "t": 60, "b": 90},
        legend={**LEGEND_BELOW, "y": -0.1},
        **STYLE,
    )
    return picture


def _bars(ms: dict[str, list[float]]) -> dict[str, Any]:
    """Bars of medians with their range, by names below them."""
    medians = [statistics.median(values) for values in ms.values()]
    ends = list(zip(medians, ms.values(), strict=True))
    return {
        "x": list(ms),
        "y": medians,
        "error_y": {
            "array": [max(values) - median for median, values in ends],
            "arrayminus": [median - min(values) for median, values in ends],
            "thickness": 1.2,
            "width": 3,
        },
        "text": [f"{median:.1f}" for median in medians],
        "textposition": "inside",
        "insidetextanchor": "start",
        "textangle": 0,
        "textfont": {"color": "white", "size": 11},
    }


def continuations(report: dict[str, Any]) -> go.Figure:
    """What became of a TopK SAE that was trained further, one point for each seed."""
    panels = {
        "Explained variance": "explained_variance",
        "CE recovered (mean ablation)": "ce_recovered_mean",
        "Dead features": "dead_features",
    }
    picture = make_subplots(
        cols=3, rows=1, subplot_titles=list(panels), horizontal_spacing=0.08
    )
    seeds = report["seeds"].values()
    for i, name in enumerate(next(iter(seeds))):
        label = "not at all" if name == "start" else name
        for column, figure in enumerate(panels.values(), start=1):
            picture.add_scatter(
                x=[label] * len(seeds),
                y=[seed[name][figure] for seed in seeds],
                mode="markers",
                marker={"color": COLOURS[i], "symbol": SYMBOLS[i], "size": 11},
                showlegend=False,
                row=1,
                col=column,
            )
    picture.update_xaxes(**AXIS_STYLE)
    picture.update_yaxes(**AXIS_STYLE)
    picture.update_layout(
        width=1150, height=480, margin={"l": 60, "r": 140, "t": 40, "b": 180}, **STYLE
    )
    return picture


def comparison(results: dict[str, Any]) -> go.Figure:
    """Every row at every finished k: mean over seeds in their range."""
    panels = COMPARED[results["subject"]["kind"]]
    finished = finished_ks(results)
    rows = points_by_row(point for point in results["points"] if point["k"] in finished)
    picture = make_subplots(
        cols=len(panels), rows=1, subplot_titles=list(panels), horizontal_spacing=0.07
    )
    for column, (title, metric) in enumerate(panels.items(), start=1):
        panel = pareto_plot(rows, metric, title, "")
        if column > 1:
            panel.update_traces(showlegend=False)
        picture.add_traces(panel.data, rows=1, cols=column)
    picture.update_xaxes(title="features per token", rangemode="tozero", **AXIS_STYLE)
    picture.update_yaxes(**AXIS_STYLE)
    picture.update_layout(
        width=1100,
        height=520,
        margin={"l": 60, "r": 20, "t": 40, "b": 150},
        legend=LEGEND_BELOW,
        **STYLE,
    )
    return picture


def is_drawn_from(picture: Path, results: Path) -> bool:
    return picture.exists() and picture.read_text().endswith(_stamp(results))


def draw(
    picture: Path, results: Path, figure: Callable[[dict[str, Any]], go.Figure]
) -> None:
    """Writes an SVG, stamped with the results it shows."""
    svg = figure(json.loads(results.read_text())).to_image(format="svg").decode()
    picture.write_text(svg + _stamp(results))


def _stamp(results: Path) -> str:
    return f"\n<!-- results {hashlib.sha256(results.read_bytes()).hexdigest()} -->\n"
