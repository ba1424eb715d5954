"""Draws the sweep over d_sae as a picture; plotly needs kaleido and a Chrome for that."""

import hashlib
import json
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from benchmarks.tables import floor_seconds, measured, seconds, sweep

COLOURS = ("#0b62c4", "#16a34a", "#d9480f", "#f08c00", "#9c36b5", "#868e96", "#5f3dc4")
SYMBOLS = ("circle", "square", "diamond", "cross", "x", "triangle-up", "star")
OURS = ("mutual_choice", "feature_choice")


def figure(report: dict[str, Any]) -> go.Figure:
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
        gridcolor="#e3e6ec",
        linecolor="#5d6472",
    )
    picture.update_yaxes(
        type="log", dtick="D2", gridcolor="#e3e6ec", linecolor="#5d6472"
    )
    picture.update_layout(
        template="none",
        width=1100,
        height=470,
        margin={"l": 50, "r": 20, "t": 40, "b": 120},
        font={"family": "Helvetica, Arial, sans-serif", "size": 13, "color": "#1f2430"},
        paper_bgcolor="white",
        legend={"orientation": "h", "x": 0.5, "xanchor": "center", "y": -0.2},
    )
    return picture


def is_drawn_from(picture: Path, results: Path) -> bool:
    return picture.exists() and picture.read_text().endswith(_stamp(results))


def draw(picture: Path, results: Path) -> None:
    """Writes an SVG, stamped with the results it shows."""
    svg = figure(json.loads(results.read_text())).to_image(format="svg").decode()
    picture.write_text(svg + _stamp(results))


def _stamp(results: Path) -> str:
    return f"\n<!-- results {hashlib.sha256(results.read_bytes()).hexdigest()} -->\n"
