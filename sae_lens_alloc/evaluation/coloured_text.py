"""Colours for text by how many features each token got."""

from collections.abc import Sequence
from dataclasses import dataclass

# ColorBrewer's YlGnBu: grows darker all the way, so it also works in grey and for every kind
# of colour vision.
SCALE = (
    (255, 255, 217),
    (237, 248, 177),
    (199, 233, 180),
    (127, 205, 187),
    (65, 182, 196),
    (29, 145, 192),
    (34, 94, 168),
    (37, 52, 148),
    (8, 29, 88),
)
N_LEVELS = 24
# Of black and white, one has a contrast of at least 4.5 with any background.
INK, PAPER = "#000000", "#ffffff"


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
        count: Number of active features; -1 at a special token.
        level: Step of the scale, from 0 to N_LEVELS - 1; -1 at a special token.
    """

    text: str
    count: int
    level: int


def levels() -> list[Level]:
    """The steps of the scale, from the fewest features to the most."""
    steps = [_interpolate(i / (N_LEVELS - 1)) for i in range(N_LEVELS)]
    return [
        Level(
            "#{:02x}{:02x}{:02x}".format(*rgb),
            max((INK, PAPER), key=lambda text: contrast(_parse(text), rgb)),
        )
        for rgb in steps
    ]


def colour_tokens(
    tokens: Sequence[str], counts: Sequence[int], largest: int
) -> list[ColouredToken]:
    """
    Gives each token its step of a scale that runs from 0 to `largest` features.

    Args:
        tokens: Text of each token.
        counts: Number of active features of each token; -1 at special tokens.
        largest: Count that gets the last step; larger counts get it, too.
    """

    def level(count: int) -> int:
        if count < 0:
            return -1
        return round(min(count / max(largest, 1), 1) * (N_LEVELS - 1))

    return [
        ColouredToken(token, count, level(count))
        for token, count in zip(tokens, counts, strict=True)
    ]


def contrast(first: tuple[int, ...], second: tuple[int, ...]) -> float:
    """Contrast ratio of two RGB colours as WCAG 2 defines it, from 1 to 21."""
    light, dark = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(rgb: tuple[int, ...]) -> float:
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (channel / 255 for channel in rgb)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _interpolate(share: float) -> tuple[int, ...]:
    place = share * (len(SCALE) - 1)
    i = min(int(place), len(SCALE) - 2)
    return tuple(
        round(low + (high - low) * (place - i))
        for low, high in zip(SCALE[i], SCALE[i + 1], strict=True)
    )


def _parse(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
