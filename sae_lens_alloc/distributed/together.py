"""What ranks do at the same time and each by itself: it fails on all of them or on none."""

import pickle
from collections.abc import Callable
from typing import TypeVar

from sae_lens_alloc.distributed.ranks import Ranks
from sae_lens_alloc.errors import in_one_sentence

T = TypeVar("T")


def together(ranks: Ranks, action: Callable[[], T]) -> list[T]:
    """
    Calls on each rank what sends nothing, such as writing a file. All ranks must call it.

    Args:
        ranks: The ranks.
        action: What this rank does. What it returns must be possible to pickle.

    Returns:
        What it returned, by rank.

    Raises:
        Exception: on all ranks the first rank's error, if it failed on any of them. So all
            ranks go on in the same way after it.
    """
    if ranks.is_alone:
        return [action()]
    found: T | None = None
    error: Exception | None = None
    try:
        found = action()
    except Exception as raised:
        error = raised
    answers = ranks.objects((found, None if error is None else _portable(error)))
    for _, failure in answers:
        if failure is not None:
            raise failure from error
    return [answer for answer, _ in answers]  # pyright: ignore[reportReturnType]


def _portable(error: Exception) -> Exception:
    """The error as another process can raise it."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # not every library's can be pickled
        return RuntimeError(in_one_sentence(error))
