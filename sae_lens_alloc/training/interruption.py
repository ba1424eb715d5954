"""Handlers of SIGINT and SIGTERM that end a run without losing anything."""

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interruptible() -> Generator[None, None, None]:
    """
    Within it, a signal raises KeyboardInterrupt at once. SAELens' InterruptedException would not
    do: it is an Exception, which code that continues after errors would catch.
    """

    def handle(*_: object) -> None:
        raise KeyboardInterrupt

    with _handled_by(handle):
        yield


@contextmanager
def noting(
    note: Callable[[], None], only_once: bool = False
) -> Generator[None, None, None]:
    """
    Within it, the first signal calls `note`, and the second raises KeyboardInterrupt.

    Args:
        note: What the first signal calls.
        only_once: Whether further signals do nothing. Several processes may get the same one from
            torchrun and from the scheduler of their machine, and torchrun kills what does not end.
    """
    noted = False

    def handle(*_: object) -> None:
        nonlocal noted
        if noted and only_once:
            return
        if noted:
            raise KeyboardInterrupt
        noted = True
        note()

    with _handled_by(handle):
        yield


@contextmanager
def postponing_signals() -> Generator[None, None, None]:
    """Within it, signals wait until its end. Only for short operations."""
    arrived: list[int] = []
    with _handled_by(lambda number, _: arrived.append(number)):
        yield
    for number in arrived:
        signal.raise_signal(number)


@contextmanager
def _handled_by(handler: Callable[..., None]) -> Generator[None, None, None]:
    # Python lets only the main thread handle signals
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous or signal.SIG_DFL)
