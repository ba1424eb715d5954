"""Wall time by what is running, so that the parts add up to the whole."""

import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any


class Clock:
    """
    Splits the wall time of each thread among named parts. A part's own time is that in which
    no part within it runs, so that all parts of a thread add up to the time that it spent in
    its outermost one.

    Times are kept under the names from the outermost part to the innermost, joined by ";":
    the folded stacks of flame graphs.

    Args:
        wait: Called at both ends of every part. A GPU works on after it was told what to do: its
            time falls to the part that told it only if it is waited for there.
    """

    def __init__(self, wait: Callable[[], object] = lambda: None) -> None:
        self._wait = wait
        self._tracks: defaultdict[int, _Track] = defaultdict(_Track)

    @contextmanager
    def part(self, name: str) -> Generator[None, None, None]:
        """Counts what happens within as a part."""
        track = self._tracks[threading.get_ident()]
        self._wait()
        track.turn()
        track.names.append(name)
        try:
            yield
        finally:
            self._wait()
            track.turn()
            track.names.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted as a part wherever it is called."""

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return counted

    def seconds(self) -> dict[str, float]:
        """Own times of the parts of this thread."""
        return dict(self._tracks[threading.get_ident()].seconds)

    def seconds_of_other_threads(self) -> dict[str, float]:
        """Own times of the parts of all other threads together."""
        total: defaultdict[str, float] = defaultdict(float)
        for thread, track in self._tracks.items():
            if thread != threading.get_ident():
                for names, seconds in track.seconds.items():
                    total[names] += seconds
        return dict(total)


class _Track:
    """The running parts of a thread, and the times so far."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    def turn(self) -> None:
        """Gives the time since the last turn to what has been running."""
        now = time.perf_counter()
        if self.names:
            self.seconds[";".join(self.names)] += now - self._since
        self._since = now
