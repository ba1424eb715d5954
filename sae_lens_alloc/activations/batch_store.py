"""Batches of activations that come from a generator, mixed as SAELens does, which can be resumed."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from safetensors.torch import save_file
from typing_extensions import Self

from sae_lens_alloc.activations.mixing_buffer import MixingBuffer
from sae_lens_alloc.activations.row_source import BatchSource
from sae_lens_alloc.activations.row_store import read_state


class BatchStore(Iterator[torch.Tensor]):
    """
    Batches of what a `BatchSource` yields, through SAELens' mixing buffer. The first rows of each
    epoch may be held out.

    Args:
        source: The activations.
        batch_size: Rows of a batch.
        buffer_rows: Rows that are mixed.
        mix_fraction: As for `MixingBuffer`.
        device: Where the batches are wanted.
    """

    n_held_out = 0

    def __init__(
        self,
        source: BatchSource,
        batch_size: int,
        buffer_rows: int,
        mix_fraction: float,
        device: str | torch.device = "cpu",
    ) -> None:
        self.source, self.device = source, device
        self._n_read = 0  # rows of the running epoch
        self._epoch = source.epoch()
        self.batches = MixingBuffer(
            buffer_rows, batch_size, self._training_rows(), mix_fraction
        )

    def hold_out(self, n_rows: int) -> torch.Tensor:
        """
        Takes the first rows, which are in no batch. To be called before anything else is read.

        Returns:
            Shape (n_rows, width).

        Raises:
            ValueError: if there are too few.
        """
        taken: list[torch.Tensor] = []
        while (n := sum(map(len, taken))) < n_rows:
            batch = next(self._epoch, None)
            if batch is None:
                raise ValueError(
                    f"{self.source.name} has {n:,} rows, but {n_rows:,} are to be held out for "
                    "metrics: give more activations."
                )
            taken.append(batch)
        rows = torch.cat(taken)
        self.n_held_out = self._n_read = n_rows
        self._epoch = chain([rows[n_rows:]], self._epoch)
        return rows[:n_rows].to(self.device)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> torch.Tensor:
        """
        The next batch, shape (batch_size, width).

        Raises:
            ValueError: if an iterator, which is read once, has ended.
        """
        try:
            return next(self.batches).to(self.device)
        except StopIteration:
            self._serve_rest()
            return next(self.batches).to(self.device)

    def save_to_checkpoint(self, checkpoint_path: str | Path) -> None:
        """Saves how much of the epoch has been read, and the buffer."""
        state = {
            "n_held_out_rows": torch.tensor(self.n_held_out),
            "n_read": torch.tensor(self._n_read),
            "n_to_serve": torch.tensor(self.batches.n_to_serve),
        }
        if self.batches.buffer is not None:
            state["rows"] = self.batches.buffer.contiguous()
        save_file(state, Path(checkpoint_path, ACTIVATIONS_STORE_STATE_FILENAME))

    def load_from_checkpoint(self, checkpoint_path: str | Path) -> None:
        """
        Goes to the place of a checkpoint by reading the epoch up to there again.

        Raises:
            ValueError: if the checkpoint is of other activations, or they end before that place.
        """
        state = read_state(Path(checkpoint_path))
        if "n_read" not in state or int(state["n_held_out_rows"]) != self.n_held_out:
            raise ValueError(
                f"the checkpoint {str(checkpoint_path)!r} is not of a training on "
                f"{self.source.name}: give the same activations."
            )
        if not self.source.is_read_once:
            self._begin_epoch()
        n_read = int(state["n_read"])
        while self._n_read < n_read:
            rows = self._next_rows()
            if rows is None:
                raise ValueError(
                    f"{self.source.name} ends after {self._n_read:,} rows, but the checkpoint "
                    f"had read {n_read:,}: give the activations of its run from their beginning."
                )
            if (too_many := self._n_read - n_read) > 0:
                self._epoch = chain([rows[-too_many:]], self._epoch)
                self._n_read = n_read
        self.batches.buffer = state.get("rows")
        self.batches.n_to_serve = int(state["n_to_serve"])

    def _begin_epoch(self) -> None:
        self._epoch, self._n_read = self.source.epoch(), 0

    def _next_rows(self) -> torch.Tensor | None:
        """The next rows of the epoch without those that are held out, None at its end."""
        batch = next(self._epoch, None)
        if batch is None:
            return None
        n_before, self._n_read = self._n_read, self._n_read + len(batch)
        return batch[max(0, self.n_held_out - n_before) :]

    def _training_rows(self) -> Iterator[torch.Tensor]:
        found = True  # the first epoch may be at its end
        while True:
            rows = self._next_rows()
            if rows is not None:
                found = found or len(rows) > 0
                yield rows
            elif self.source.is_read_once:
                return
            elif not found:
                raise ValueError(
                    f"{self.source.name} has no rows to train on beside the {self.n_held_out:,} that "
                    "are held out: give more activations, or a callable that returns new ones."
                )
            else:
                found = False
                self._begin_epoch()

    def _serve_rest(self) -> None:
        """Lets the buffer serve what is left in it, after the last rows have been read."""
        buffer, size = self.batches.buffer, self.batches.batch_size
        if buffer is None or len(buffer) < size:
            raise ValueError(
                f"{self.source.name} ended after {self._n_read:,} rows, of which "
                f"{self.n_held_out:,} were held out, and more are needed: give a callable that "
                "returns a new one for each epoch, or lower training_tokens."
            )
        if self.batches.mix_fraction > 0:
            self.batches.buffer = buffer[torch.randperm(len(buffer))]
        self.batches.n_to_serve = len(buffer) // size * size
