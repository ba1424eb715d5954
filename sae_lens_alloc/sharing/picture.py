"""The density plot of a model card, as an SVG that needs no library to be drawn."""

import math
from collections.abc import Mapping

from jinja2 import Environment, PackageLoader, StrictUndefined

from sae_lens_alloc.evaluation.report_run import colour
from sae_lens_alloc.sharing.known_figures import Curve

WIDTH, HEIGHT = 720, 400
# of the area that the axes enclose
LEFT, RIGHT, BOTTOM = 70, 700, 350
LINE_OF_LEGEND = 20


def density_svg(curves: Mapping[str, Curve]) -> str:
    """
    Share of tokens over the rank of each feature, both logarithmic, one line for each SAE.

    Args:
        curves: By the name of the SAE, each with at least one point.
    """
    top = 20 + LINE_OF_LEGEND * len(curves)
    last = max(ranks[-1] for ranks, _ in curves.values())
    n_decades = max(1, math.ceil(math.log10(last)))
    largest = max(max(shares) for _, shares in curves.values())
    smallest = min(min(shares) for _, shares in curves.values())
    high = math.ceil(math.log10(largest))
    low = min(math.floor(math.log10(smallest)), high - 1)

    def x(rank: float) -> float:
        return LEFT + math.log10(rank) / n_decades * (RIGHT - LEFT)

    def y(share: float) -> float:
        return BOTTOM - (math.log10(share) - low) / (high - low) * (BOTTOM - top)

    environment = Environment(
        loader=PackageLoader("sae_lens_alloc", "sharing"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template("density.svg.jinja").render(
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=RIGHT,
        top=top,
        bottom=BOTTOM,
        lines=[
            {
                "name": name,
                "colour": colour(i),
                "y": 24 + LINE_OF_LEGEND * i,
                "points": " ".join(
                    f"{x(rank):.1f},{y(share):.1f}"
                    for rank, share in zip(ranks, shares, strict=True)
                ),
            }
            for i, (name, (ranks, shares)) in enumerate(curves.items())
        ],
        x_ticks=[(x(10**i), f"{10**i:,}") for i in range(n_decades + 1)],
        y_ticks=[(y(10.0**i), _percent(i)) for i in range(low, high + 1)],
    )


def _percent(decade: int) -> str:
    """10 to a power, as "0.1%"."""
    return f"{10.0 ** (decade + 2):.10f}".rstrip("0").rstrip(".") + "%"
