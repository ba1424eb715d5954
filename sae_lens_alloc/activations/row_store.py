"""Batches of activations that lie somewhere as rows, with a position that can be saved."""

from collections.abc import Iterator
from pathlib import Path

import torch
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typing_extensions import Self

from sae_lens_alloc.activations.row_order import RowOrder
from sae_lens_alloc.activations.row_source import RowSource
from sae_lens_alloc.distributed.rank_files import file_of_rank, files_of_ranks
from sae_lens_alloc.distributed.ranks import ALONE, Ranks


class RowStore(Iterator[torch.Tensor]):
    """
    Endless batches of rows in the order of `RowOrder`, one epoch after the other. Several ranks have
    one order, and each reads its part of every batch, so that they train on the batches of one
    process.

    Args:
        rows: The activations.
        order: The order.
        batch_size: Rows of a batch of all ranks together.
        device: Where the batches are wanted.
        ranks: The ranks.
    """

    def __init__(
        self,
        rows: RowSource,
        order: RowOrder,
        batch_size: int,
        device: str | torch.device = "cpu",
        ranks: Ranks = ALONE,
    ) -> None:
        self.rows, self.order = rows, order
        self.batch_size, self.device, self.ranks = batch_size, device, ranks
        self._buffer_index = self._n_served = 0  # the place: a buffer, and rows of it
        self._buffer: torch.Tensor | None = None

    def held_out(self) -> torch.Tensor:
        """The rows that are in no batch, shape (n, width)."""
        found = [self.rows.read(start, stop) for start, stop in self.order.held_out]
        return torch.cat(found).to(self.device)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> torch.Tensor:
        """The next batch, or this rank's part of it, shape (batch_size / S, width)."""
        pieces: list[torch.Tensor] = []
        missing = self.batch_size
        while missing:
            buffer = self._filled()
            piece = buffer[self._n_served : self._n_served + missing]
            pieces.append(piece)
            missing -= len(piece)
            self._n_served += len(piece)
            if self._n_served == len(buffer):
                self._go_to(self._buffer_index + 1, 0)
        batch = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        share = self.batch_size // self.ranks.size
        first = self.ranks.rank * share
        return batch[first : first + share].to(self.device)

    def save_to_checkpoint(self, checkpoint_path: str | Path) -> None:
        """Saves the place, which is the same on all ranks."""
        state = {
            "n_rows": self.rows.n_rows,
            "n_held_out_rows": self.rows.n_rows - self.order.n_training_rows,
            "buffer": self._buffer_index,
            "n_served": self._n_served,
        }
        path = Path(checkpoint_path, ACTIVATIONS_STORE_STATE_FILENAME)
        save_file(
            {key: torch.tensor(value) for key, value in state.items()},
            file_of_rank(path, self.ranks),
        )

    def load_from_checkpoint(self, checkpoint_path: str | Path) -> None:
        """
        Goes to the place of a checkpoint, also of one by another number of ranks.

        Raises:
            ValueError: if it is of other activations.
        """
        state = read_state(Path(checkpoint_path))
        if "buffer" not in state or int(state["n_rows"]) != self.rows.n_rows:
            had = f"{int(state['n_rows']):,} rows" if "n_rows" in state else "no rows"
            raise ValueError(
                f"the checkpoint {str(checkpoint_path)!r} is of a training on {had}, but "
                f"{self.rows.name} has {self.rows.n_rows:,}: give the same activations."
            )
        self._go_to(int(state["buffer"]), int(state["n_served"]))

    def _go_to(self, buffer: int, n_served: int) -> None:
        self._buffer_index, self._n_served, self._buffer = buffer, n_served, None

    def _filled(self) -> torch.Tensor:
        if self._buffer is None:
            blocks = self.order.blocks_of(self._buffer_index)
            rows = torch.cat([self.rows.read(start, stop) for start, stop in blocks])
            self._buffer = rows[self.order.within(self._buffer_index, len(rows))]
        return self._buffer


def read_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The state of a store in a checkpoint, that of rank 0 if there are several."""
    return load_file(files_of_ranks(checkpoint / ACTIVATIONS_STORE_STATE_FILENAME)[0])


def saved_held_out_rows(checkpoint: Path) -> int | None:
    """Rows that a run on its own activations has held out, None if the checkpoint is of another."""
    for file in files_of_ranks(checkpoint / ACTIVATIONS_STORE_STATE_FILENAME)[:1]:
        with safe_open(file, "pt") as state:
            if "n_held_out_rows" in state.keys():  # noqa: SIM118
                return int(state.get_tensor("n_held_out_rows"))
    return None
