"""What ranks find out together: an error of one of them, and whether they were given the same."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from sae_lens_alloc.distributed.ranks import Ranks
from sae_lens_alloc.distributed.together import together


@contextmanager
def failing_together(ranks: Ranks) -> Generator[None, None, None]:
    """
    Within it, an error of one rank is an error of all, as with `together`. Nothing may be sent
    within it, since one rank may end it early. All ranks must use it.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        if ranks.is_alone:
            raise
        failed = error

    def report() -> None:
        if failed is not None:
            raise failed

    together(ranks, report)


def require_same(what: str, settings: Mapping[str, Any], ranks: Ranks) -> None:
    """
    Raises ValueError on all ranks, with the first key that differs and both values, if they do
    not have the same settings.

    Args:
        what: What the settings are, in front of the key.
        settings: Settings of this rank, of plain types; what follows from others comes last.
        ranks: The ranks.
    """
    first, *others = ranks.objects(dict(settings))
    for rank, other in enumerate(others, 1):
        for key in {**first, **other}:
            ours, theirs = first.get(key), other.get(key)
            if ours != theirs:
                raise ValueError(
                    f"the processes differ in {what}{key}: rank 0 has {ours!r}, and rank {rank} "
                    f"has {theirs!r}: start them all with the same."
                )
