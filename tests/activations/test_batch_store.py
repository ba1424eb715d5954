"""Batches of a generator: mixed as SAELens does, resumed, and ended in one sentence."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from sae_lens.training.mixing_buffer import mixing_buffer

from sae_lens_alloc.activations.batch_store import BatchStore
from sae_lens_alloc.activations.row_source import BatchSource, open_rows

N, BATCH = 300, 16


def generated() -> Iterator[torch.Tensor]:
    """Row i holds i, in batches of different sizes."""
    start = 0
    for i in range(1000):
        stop = min(start + 5 + i % 7, N)
        yield torch.arange(float(start), float(stop))[:, None]
        if stop == N:
            return
        start = stop


def store(source: object = generated, n_held_out: int = 8) -> BatchStore:
    rows = open_rows(source)
    assert isinstance(rows, BatchSource)
    made = BatchStore(rows, BATCH, buffer_rows=64, mix_fraction=0.5)
    held_out = made.hold_out(n_held_out)
    assert held_out[:, 0].tolist() == list(range(n_held_out))
    return made


def numbers(batches: Iterator[torch.Tensor], n: int) -> list[int]:
    return torch.cat(list(islice(batches, n)))[:, 0].int().tolist()


def endless() -> Iterator[torch.Tensor]:
    while True:
        yield from generated()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_batches_are_those_of_sae_lens_mixing_buffer():
    source = BatchSource(endless(), "the generator")
    ours = numbers(BatchStore(source, BATCH, 64, 0.5), 30)
    torch.manual_seed(0)
    theirs = numbers(mixing_buffer(64, BATCH, endless(), 0.5), 30)
    assert ours == theirs


@pytest.mark.parametrize("source", [generated, list(generated())])
def test_a_callable_and_a_list_begin_anew_without_the_held_out_rows(source: object):
    served = numbers(store(source), 6 * N // BATCH)
    assert set(served) == set(range(8, N))
    counts = torch.bincount(torch.tensor(served))[8:]
    assert counts.min() >= 4 and counts.max() <= 7


def test_an_iterator_is_served_to_its_end_and_then_is_one_sentence():
    one = store(generated())
    served = numbers(one, (N - 8) // BATCH)
    assert len(set(served)) == len(served) and min(served) >= 8
    with pytest.raises(
        ValueError, match="ended after 300 rows, of which 8 were held"
    ) as e:
        next(one)
    assert "callable" in str(e.value)


@pytest.mark.parametrize("n_first", [0, 1, 9, 17])
@pytest.mark.parametrize("once", [True, False], ids=["iterator", "callable"])
def test_a_resumed_store_goes_on_with_the_next_batch(
    n_first: int, once: bool, tmp_path: Path
):
    n_more = (N - 8) // BATCH - n_first if once else 40
    first = store(generated() if once else generated)
    if n_first:
        numbers(first, n_first)
    first.save_to_checkpoint(tmp_path)
    state = torch.get_rng_state()
    expected = numbers(first, n_more)
    resumed = store(generated() if once else generated)
    resumed.load_from_checkpoint(tmp_path)
    torch.set_rng_state(state)
    assert numbers(resumed, n_more) == expected


def test_a_later_epoch_is_resumed(tmp_path: Path):
    first = store()
    numbers(first, 50)
    first.save_to_checkpoint(tmp_path)
    state = torch.get_rng_state()
    expected = numbers(first, 20)
    resumed = store()
    resumed.load_from_checkpoint(tmp_path)
    torch.set_rng_state(state)
    assert numbers(resumed, 20) == expected


def test_what_is_too_short_is_one_sentence(tmp_path: Path):
    with pytest.raises(ValueError, match="has 300 rows, but 400 are to be held out"):
        store(generated(), n_held_out=400)
    all_held_out = store(n_held_out=N)
    with pytest.raises(ValueError, match="no rows to train on beside the 300"):
        next(all_held_out)
    first = store(generated())
    numbers(first, 15)
    first.save_to_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="ends after .* but the checkpoint had read"):
        store(list(generated())[:20]).load_from_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="give the same activations"):
        store(n_held_out=9).load_from_checkpoint(tmp_path)
