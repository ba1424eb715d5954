"""Progress with the remaining time, for whatever may take longer than one wants to wait unseen."""

import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm.auto import tqdm

# What ends sooner shows nothing, in seconds.
DELAY = 2.0
# Seconds from one sign of life of `announced` to the next.
EVERY = 1.0

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


@contextmanager
def announced(what: str) -> Generator[None, None, None]:
    """
    Within it, a line says what is done and for how long already, once that takes longer than
    `DELAY`. For what cannot say how far it is. The line goes at the end.

    Args:
        what: What is done, such as "loading the language model".
    """
    ended = threading.Event()

    def show() -> None:
        if ended.wait(DELAY):
            return
        with tqdm(desc=what, bar_format="{desc}: {elapsed}", leave=False) as line:
            while not ended.wait(EVERY):
                line.refresh()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
