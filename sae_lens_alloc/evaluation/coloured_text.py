"""Colours for text by the number of active features of each token."""

from collections.abc import Sequence
from dataclasses import dataclass

from plotly.colors import sample_colorscale

# This scale of ColorBrewer becomes darker from end to end, so it also works in grey and for every kind
# of colour vision.
SCALE = "YlGnBu"
N_LEVELS = 24
# From this level on, white text has more contrast than black. Both have a contrast of at least 4.5.
FIRST_WITH_WHITE_TEXT = 16


@dataclass(frozen=True)
class Level:
    """Background and text colour of one step of the scale."""

    background: str
    text: str


@dataclass(frozen=True)
class ColouredToken:
    """
    One token, ready to be shown.

    Args:
        text: The token's text, line ends included.
        count: Number of active features, -1 at a special token.
        level: Step of the scale, from 0 to N_LEVELS - 1, or -1 at a special token.
    """

    text: str
    count: int
    level: int


def levels() -> list[Level]:
    """The steps of the scale, from the fewest features to the most."""
    return [
        Level(str(background), "#ffffff" if i >= FIRST_WITH_WHITE_TEXT else "#000000")
        for i, background in enumerate(sample_colorscale(SCALE, N_LEVELS))
    ]


def colour_tokens(
    tokens: Sequence[str], counts: Sequence[int], largest: int
) -> list[ColouredToken]:
    """
    Gives each token its step of a scale that runs from 0 to `largest` features.

    Args:
        tokens: Text of each token.
        counts: Number of active features of each token, -1 at special tokens.
        largest: Count that gets the last step. Larger counts get the last step, too.
    """

    def level(count: int) -> int:
        if count < 0:
            return -1
        return round(min(count / max(largest, 1), 1) * (N_LEVELS - 1))

    return [
        ColouredToken(token, count, level(count))
        for token, count in zip(tokens, counts, strict=True)
    ]
