"""The margin below the cut: who is in it, and what it is told, by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_alloc import SparseActivations, select_mutual_choice
from sae_lens_alloc.allocation.margin import (
    Margin,
    gains,
    selection_gradient,
    split_at_budget,
)
from sae_lens_alloc.allocation.sparse_activations import PaddedActivations


def pairs_of(values: list[float]) -> SparseActivations:
    """One feature a token."""
    tokens = torch.arange(len(values))
    return SparseActivations(
        tokens, torch.zeros_like(tokens), torch.tensor(values), (len(values), 1)
    )


def test_split_by_hand():
    best = pairs_of([5.0, 2.0, 9.0, 3.0, 4.0, 1.0])
    selected, margin = split_at_budget(best, budget=4, n_margin=2)
    assert selected.places.values.tolist() == [5, 9, 3, 4]
    assert margin.pairs.places.values.tolist() == [2, 1]
    assert margin.pairs.places.token_indices.tolist() == [1, 5]
    assert margin.width == 1  # from 2 to 1


def test_of_equal_affinities_the_first_are_active():
    selected, margin = split_at_budget(pairs_of([1.0] * 4), budget=2, n_margin=2)
    assert selected.places.token_indices.tolist() == [0, 1]
    assert margin.pairs.places.token_indices.tolist() == [2, 3]
    assert margin.width == 0
    gradient = selection_gradient(margin, torch.tensor([1.0, 3.0]))
    assert gradient.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("values", "selected", "below"),
    [([4.0, 2.0], [4, 2], []), ([4.0, 2.0, 3.0, 1.0], [4, 2, 3], [1])],
)
def test_fewer_pairs_than_the_budget_and_its_margin(
    values: list[float], selected: list[float], below: list[float]
):
    found, margin = split_at_budget(pairs_of(values), budget=3, n_margin=2)
    assert found.places.values.tolist() == selected
    assert margin.pairs.places.values.tolist() == below
    assert margin.width == 0


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.integers(1, 5), min_size=12, max_size=12),
    budget=st.integers(1, 6),
    data=st.data(),
)
def test_the_budget_is_what_mutual_choice_selects(
    values: list[int], budget: int, data: st.DataObject
):
    n_margin = data.draw(st.integers(0, 6))
    affinities = torch.tensor(values, dtype=torch.float64).view(4, 3)
    best = select_mutual_choice(affinities, budget + n_margin)
    selected, margin = split_at_budget(best, budget, n_margin)
    expected = select_mutual_choice(affinities, budget).to_dense()
    assert torch.equal(selected.to_dense(), expected)
    assert torch.equal(margin.pairs.to_dense(), best.to_dense() - expected)


def test_gains_are_differences_of_squared_errors():
    error, row = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.3, 0.1, -2.0])
    z = 1.5
    without = error.square().sum()
    with_it = (error - z * row).square().sum()
    gained = gains(torch.tensor(z), error @ row, row.square().sum())
    torch.testing.assert_close(gained, without - with_it)


def test_the_price_is_the_mean_gain():
    margin = Margin(pairs_of([1.0, 2.0, 3.0]), torch.tensor(2.0))
    gradient = selection_gradient(margin, torch.tensor([4.0, 1.0, 1.0]))
    # gain above the price of 2: descent raises the affinity
    assert gradient.tolist() == [-1.0, 0.5, 0.5]


def test_padding_sets_no_price_and_learns_nothing():
    places = SparseActivations(
        torch.tensor([0, 1, 1]),
        torch.tensor([0, 0, 0]),
        torch.tensor([2.0, 1.0, 0.0]),
        (2, 1),
    )
    padded = PaddedActivations(places, torch.tensor([True, True, False]))
    margin = Margin(padded, torch.tensor(2.0))
    gradient = selection_gradient(margin, torch.tensor([3.0, 1.0, 100.0]))
    assert gradient.tolist() == pytest.approx([-0.5, 0.5, 0.0])
