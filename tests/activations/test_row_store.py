"""Batches of one's own activations: one stream, whatever is resumed and however many ranks read."""

from pathlib import Path

import pytest
import torch

from sae_lens_alloc.activations.row_order import RowOrder
from sae_lens_alloc.activations.row_source import RowSource, open_rows
from sae_lens_alloc.activations.row_store import RowStore, saved_held_out_rows
from sae_lens_alloc.distributed.ranks import ALONE, Ranks

N, BATCH = 1000, 48


def numbered(n: int = N) -> RowSource:
    """Row i holds i."""
    found = open_rows(torch.arange(float(n))[:, None])
    assert isinstance(found, RowSource)
    return found


def store(ranks: Ranks = ALONE, buffer_rows: int = 200) -> RowStore:
    order = RowOrder(N, 30, buffer_rows, seed=1)
    return RowStore(numbered(), order, BATCH, ranks=ranks)


def numbers(store: RowStore, n_batches: int) -> list[int]:
    return torch.cat([next(store) for _ in range(n_batches)])[:, 0].int().tolist()


class SomeRanks(Ranks):
    """One of several, which need not speak to each other here."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size


@pytest.mark.parametrize("buffer_rows", [7, 200, 10**6])
def test_an_epoch_serves_all_but_the_held_out_rows(buffer_rows: int):
    one = store(buffer_rows=buffer_rows)
    held_out = one.held_out()[:, 0].int().tolist()
    assert len(held_out) == 30
    served = numbers(one, 3 * 970 // BATCH + 1)
    for epoch in range(3):
        rows = served[970 * epoch : 970 * (epoch + 1)]
        assert sorted([*rows, *held_out]) == list(range(N))
    assert served[:970] != served[970 : 2 * 970]


@pytest.mark.parametrize("n_first", [0, 1, 5, 20, 21, 50])
def test_a_resumed_store_goes_on_with_the_next_batch(n_first: int, tmp_path: Path):
    first = store()
    numbers(first, n_first) if n_first else None
    first.save_to_checkpoint(tmp_path)
    expected = numbers(first, 30)
    assert saved_held_out_rows(tmp_path) == 30
    resumed = store()
    numbers(resumed, 3)
    resumed.load_from_checkpoint(tmp_path)
    assert numbers(resumed, 30) == expected


def test_ranks_read_parts_of_the_batches_of_one_process(tmp_path: Path):
    whole = numbers(store(), 25)
    parts = [store(SomeRanks(rank, 3)) for rank in range(3)]
    together = [
        number for _ in range(25) for part in parts for number in numbers(part, 1)
    ]
    assert together == whole
    # and one process goes on from what three have saved
    for part in parts:
        part.save_to_checkpoint(tmp_path)
    alone = store()
    alone.load_from_checkpoint(tmp_path)
    assert numbers(alone, 2) == [
        n for _ in range(2) for p in parts for n in numbers(p, 1)
    ]


def test_the_checkpoint_of_other_activations_is_refused(tmp_path: Path):
    store().save_to_checkpoint(tmp_path)
    other = RowStore(numbered(999), RowOrder(999, 30, 200, seed=1), BATCH)
    with pytest.raises(ValueError, match="on 1,000 rows.*has 999: give the same"):
        other.load_from_checkpoint(tmp_path)
