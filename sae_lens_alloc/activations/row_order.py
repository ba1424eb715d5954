"""The order in which rows are trained on, without a list of all of them."""

from functools import lru_cache

import numpy as np
import torch

# Rows that are read at a stroke. A row of a small source is a block by itself.
LARGEST_BLOCK = 128
FEWEST_BLOCKS = 1024


class RowOrder:
    """
    Some rows that are held out, and an order of the rest that is another one in each epoch. Every row
    comes once an epoch. Neighbouring rows are a block; blocks come in random order, so many of them
    at a time as fit into a buffer, and the rows of a buffer in random order. All of it follows from
    the seed, so a place in it is two numbers.

    Args:
        n_rows: Number of rows.
        n_held_out: Rows to hold out, in random blocks. The number is rounded up to whole blocks.
        buffer_rows: Rows that are shuffled together.
        seed: Seed of the order.
        shuffles: Whether the rest comes in random order, or as it is stored.

    Attributes:
        held_out: First and last row, which is left out, of each block that is held out.
    """

    def __init__(
        self,
        n_rows: int,
        n_held_out: int,
        buffer_rows: int,
        seed: int,
        shuffles: bool = True,
    ) -> None:
        self.n_rows = n_rows
        self.block_rows = min(LARGEST_BLOCK, max(1, n_rows // FEWEST_BLOCKS))
        self.seed, self.shuffles = seed, shuffles
        n_blocks = -(-n_rows // self.block_rows)
        blocks = self._rng(0).permutation(n_blocks)
        n_out = -(-n_held_out // self.block_rows)
        self.held_out = [self._rows_of(b) for b in np.sort(blocks[:n_out])]
        self._blocks = np.sort(blocks[n_out:])
        self._per_buffer = max(1, buffer_rows // self.block_rows)
        self.n_training_rows = n_rows - sum(
            stop - start for start, stop in self.held_out
        )

    @property
    def buffers_per_epoch(self) -> int:
        """Buffers in which an epoch comes."""
        return -(-len(self._blocks) // self._per_buffer)

    def blocks_of(self, buffer: int) -> list[tuple[int, int]]:
        """First and last row, which is left out, of each block of a buffer, counted over epochs."""
        epoch, i = divmod(buffer, self.buffers_per_epoch)
        taken = slice(i * self._per_buffer, (i + 1) * self._per_buffer)
        return [self._rows_of(block) for block in self._epoch(epoch)[taken]]

    def within(self, buffer: int, n_rows: int) -> torch.Tensor:
        """The order of the rows of a buffer, int64 of shape (n_rows,)."""
        if not self.shuffles:
            return torch.arange(n_rows)
        return torch.from_numpy(self._rng(2, buffer).permutation(n_rows))

    @lru_cache(maxsize=1)  # noqa: B019 (one array, for as long as the run)
    def _epoch(self, epoch: int) -> np.ndarray:
        if not self.shuffles:
            return self._blocks
        return self._rng(1, epoch).permutation(self._blocks)

    def _rng(self, *what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed % 2**64, *what])

    def _rows_of(self, block: int) -> tuple[int, int]:
        start = int(block) * self.block_rows
        return start, min(start + self.block_rows, self.n_rows)
