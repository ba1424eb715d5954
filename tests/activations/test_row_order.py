"""An order of rows that is not kept: every row once an epoch, held-out ones never."""

import pytest

from sae_lens_alloc.activations.row_order import RowOrder

# rows of a block by themselves, and blocks of 4 with a last one of 3
SIZES = [37, 2048, 4 * 1024 + 3]


def epoch_of(order: RowOrder, epoch: int) -> list[int]:
    found: list[int] = []
    for i in range(order.buffers_per_epoch):
        buffer = epoch * order.buffers_per_epoch + i
        rows = [
            r for start, stop in order.blocks_of(buffer) for r in range(start, stop)
        ]
        found += [rows[j] for j in order.within(buffer, len(rows)).tolist()]
    return found


def held_out_of(order: RowOrder) -> list[int]:
    return [row for start, stop in order.held_out for row in range(start, stop)]


@pytest.mark.parametrize("n_rows", SIZES)
@pytest.mark.parametrize("buffer_rows", [1, 64, 10**6])
def test_every_row_comes_once_an_epoch_or_is_held_out(n_rows: int, buffer_rows: int):
    order = RowOrder(n_rows, 5, buffer_rows, seed=3)
    held_out = held_out_of(order)
    assert 5 <= len(held_out) < 5 + order.block_rows
    assert order.n_training_rows == n_rows - len(held_out)
    epochs = [epoch_of(order, epoch) for epoch in (0, 1, 5)]
    for rows in epochs:
        assert sorted([*rows, *held_out]) == list(range(n_rows))
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_follows_from_the_seed():
    first, again, other = (RowOrder(2048, 20, 64, seed) for seed in (1, 1, 2))
    assert epoch_of(first, 3) == epoch_of(again, 3) != epoch_of(other, 3)
    assert first.held_out == again.held_out != other.held_out
    assert epoch_of(RowOrder(50, 2, 8, -5), 0) != epoch_of(first, 0)


def test_neighbours_come_apart():
    order = RowOrder(64 * 1024, 0, 64 * 64, seed=0)
    assert order.block_rows == 64
    rows = epoch_of(order, 0)
    # of 63 of 64 neighbours the next would come next, if blocks were not shuffled together
    together = sum(b - a == 1 for a, b in zip(rows, rows[1:], strict=False))
    assert together < len(rows) / 500
    # and the rows of the first buffer are from all over
    first = sorted(rows[: 64 * 64])
    assert first[0] < 6000 and first[-1] > 60_000


def test_without_shuffling_rows_come_as_they_lie():
    order = RowOrder(2050, 10, 64, seed=0, shuffles=False)
    held_out = set(held_out_of(order))
    expected = [row for row in range(2050) if row not in held_out]
    assert epoch_of(order, 0) == epoch_of(order, 1) == expected
