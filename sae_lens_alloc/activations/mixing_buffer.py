"""SAELens' mixing buffer with a state that can be saved."""

from collections.abc import Iterator

import torch
from typing_extensions import Self

from sae_lens_alloc.activations.buffer_setting import buffer_setting


class MixingBuffer(Iterator[torch.Tensor]):
    """
    Yields the batches of `sae_lens.training.mixing_buffer.mixing_buffer`, bit for bit and
    with the same draws from torch's random generator. SAELens' is a generator function, so its
    buffer can be neither read nor restored.

    Args:
        buffer_size: Tokens to collect before batches are served.
        batch_size: Tokens per batch.
        activations_loader: Endless source of activations, each of shape (n_tokens, d_in).
        mix_fraction: Share of the buffer to keep for mixing with later activations. With 0 the
            activations are served in order.

    Raises:
        ValueError: if the buffer is smaller than a batch, or mix_fraction is not in [0, 1].
    """

    def __init__(
        self,
        buffer_size: int,
        batch_size: int,
        activations_loader: Iterator[torch.Tensor],
        mix_fraction: float,
    ) -> None:
        if buffer_size < batch_size:
            raise ValueError(
                f"The buffer of {buffer_size} tokens must hold a batch of {batch_size} "
                f"tokens: raise {buffer_setting()} (it counts contexts) or lower "
                "train_batch_size_tokens."
            )
        if not 0 <= mix_fraction <= 1:
            raise ValueError(f"mix_fraction must be in [0, 1], got {mix_fraction}.")
        self.buffer_size = buffer_size
        self.batch_size = batch_size
        self.activations_loader = activations_loader
        self.mix_fraction = mix_fraction
        # (n_tokens, d_in); the first n_to_serve are served before anything is added
        self.buffer: torch.Tensor | None = None
        self.n_to_serve = 0

    def __iter__(self) -> Self:
        return self

    @torch.no_grad()
    def __next__(self) -> torch.Tensor:
        while self.n_to_serve == 0:
            self._add(next(self.activations_loader))
        assert self.buffer is not None
        batch = self.buffer[: self.batch_size]
        self.buffer = self.buffer[self.batch_size :]
        self.n_to_serve -= self.batch_size
        return batch

    def _add(self, activations: torch.Tensor) -> None:
        if self.buffer is not None:
            activations = torch.cat([self.buffer, activations])
        self.buffer = activations
        n_tokens = len(activations)
        if n_tokens < self.buffer_size:
            return
        if self.mix_fraction > 0:
            self.buffer = activations[torch.randperm(n_tokens)]
        n_new = n_tokens - int(self.buffer_size * self.mix_fraction)
        self.n_to_serve = max(1, n_new // self.batch_size) * self.batch_size
