"""One measurement of the campaign."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Result = dict[str, Any]


class NotAvailableError(Exception):
    """A measurement needs what is not there: a library, or a part of ours."""


@dataclass(frozen=True)
class Task:
    """
    Args:
        part: Part of the campaign.
        name: Unique within the part.
        measure: Function of a module, run in a process of its own.
        arguments: Its arguments.
        facts: What the result is of, kept beside it.
        seconds: What it takes, as long as nothing alike has been measured.
        like: Tasks of this kind take alike, in proportion to their sizes.
        size: Its size.
        together: It starts only if all of this name that are to be done fit into the time.
        limit: It is ended after so many seconds.
    """

    part: str
    name: str
    measure: Callable[..., Result]
    arguments: tuple[Any, ...]
    facts: Result = field(default_factory=dict)
    seconds: float = 10
    like: str = ""
    size: float = 1
    together: str | None = None
    limit: float = 120
