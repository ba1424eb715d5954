"""Progress with the remaining time, for whatever may take longer than one wants to wait unseen."""

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm.auto import tqdm

# What ends sooner shows nothing, in seconds.
DELAY = 2.0
# From one sign of life to the next, in seconds, where nothing else moves a bar.
EVERY = 1.0

T = TypeVar("T")


def shown(items: Sequence[T], what: str) -> Iterator[T]:
    """
    Items to go through, with a bar that appears after `DELAY` and goes when they have ended.

    Args:
        items: The items.
        what: What is done with them, such as "measuring".
    """
    bar = tqdm(total=len(items), desc=what, delay=DELAY, leave=False)
    with bar, _alive(bar):
        for item in items:
            yield item
            bar.update()


@contextmanager
def token_bar(n_tokens: int, what: str) -> "Generator[tqdm[Any], None, None]":
    """A bar as `shown` has it, to be updated with numbers of tokens up to `n_tokens`."""
    bar = tqdm(
        total=n_tokens,
        desc=what,
        delay=DELAY,
        leave=False,
        unit=" tokens",
        unit_scale=True,
    )
    with bar, _alive(bar):
        yield bar


@contextmanager
def announced(what: str) -> Generator[None, None, None]:
    """
    Within it, a line says what is done and for how long already, once that takes longer than
    `DELAY`. For what cannot say how far it is. The line goes at the end.

    Args:
        what: What is done, such as "loading the language model".
    """
    bar = tqdm(desc=what, bar_format="{desc}: {elapsed}", delay=DELAY, leave=False)
    with bar, _alive(bar):
        yield


@contextmanager
def _alive(bar: "tqdm[Any]") -> Generator[None, None, None]:
    """Within it, a bar appears after `DELAY` and moves on also while nothing updates it."""
    ended = threading.Event()

    def show() -> None:
        if ended.wait(DELAY):
            return
        bar.delay = 0  # or tqdm would not clear at its end what it has not shown itself
        while not ended.is_set():
            bar.refresh()
            ended.wait(EVERY)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
