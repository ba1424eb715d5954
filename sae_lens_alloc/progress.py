"""Progress with the remaining time, for whatever may take longer than one wants to wait unseen."""

from collections.abc import Sequence
from typing import Any, TypeVar

from tqdm.auto import tqdm

# What ends sooner shows nothing, in seconds.
DELAY = 2.0

T = TypeVar("T")


def shown(items: Sequence[T], what: str) -> "tqdm[T]":
    """
    Items to go through, with a bar that appears after `DELAY` and goes when they have ended.

    Args:
        items: The items.
        what: What is done with them, such as "measuring".
    """
    return tqdm(items, desc=what, delay=DELAY, leave=False)


def token_bar(n_tokens: int, what: str) -> "tqdm[Any]":
    """A bar as `shown` has it, to be updated with numbers of tokens up to `n_tokens`."""
    return tqdm(
        total=n_tokens,
        desc=what,
        delay=DELAY,
        leave=False,
        unit=" tokens",
        unit_scale=True,
    )
