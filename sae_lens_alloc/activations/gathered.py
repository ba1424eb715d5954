"""Activations of all ranks, of which each reads its own."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext

import torch
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.training.types import DataProvider
from typing_extensions import Self

from sae_lens_alloc.activations.on_text import take_tokens
from sae_lens_alloc.distributed.agreement import failing_together
from sae_lens_alloc.distributed.ranks import Ranks


class GatheredBatches(Iterator[torch.Tensor]):
    """
    Batches of the activations of all ranks, the same on all of them. All ranks must ask for them
    at the same time.

    Args:
        own: Batches of this rank, shape (B / S, d_in).
        ranks: The ranks.
        device: Where the SAE is trained.
    """

    def __init__(
        self, own: Iterator[torch.Tensor], ranks: Ranks, device: str | torch.device
    ) -> None:
        self.own = own
        self.ranks = ranks
        self.device = device

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> torch.Tensor:
        """The next batch, of shape (B, d_in)."""
        return self.ranks.gather(next(self.own).to(self.device))

    def take(self, n_tokens: int) -> torch.Tensor:
        """
        As `take_tokens`. If the activations of one rank end or cannot be read, all have the error.
        """
        n_own = -(-n_tokens // self.ranks.size)
        own = torch.empty(0)
        with failing_together(self.ranks):
            own = take_tokens(self.own, n_own)
        return self.ranks.gather(own.to(self.device))


def take_activations(
    batches: DataProvider, n_tokens: int, device: str | torch.device
) -> torch.Tensor:
    """`take_tokens` of the batches of one process or of all ranks, on a device."""
    if isinstance(batches, GatheredBatches):
        return batches.take(n_tokens)
    return take_tokens(batches, n_tokens).to(device)


@contextmanager
def paused(batches: DataProvider | None) -> Generator[None, None, None]:
    """Within it, no rank reads its part of batches of all ranks beforehand."""
    own = batches.own if isinstance(batches, GatheredBatches) else None
    with own.paused() if isinstance(own, PrefetchingIterator) else nullcontext():
        yield


def gathered_rows(
    own: torch.Tensor, ranks: Ranks, device: str | torch.device
) -> torch.Tensor:
    """
    The rows of all ranks, one rank after the other, where ranks may have different numbers of
    them.

    Args:
        own: Rows of this rank, shape (n, ...).
        ranks: The ranks.
        device: That of tensors which the ranks can send.
    """
    if ranks.is_alone:
        return own
    numbers = ranks.objects(len(own))
    if max(numbers) == 0:
        return own
    padded = own.new_zeros(max(numbers), *own.shape[1:])
    padded[: len(own)] = own
    gathered = ranks.gather(padded.to(device)).to(own.device)
    parts = gathered.split(max(numbers))
    return torch.cat([part[:n] for part, n in zip(parts, numbers, strict=True)])
