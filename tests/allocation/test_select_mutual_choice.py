"""Mutual Choice against a Python sort of all (value, token, feature) tuples."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_alloc.allocation.candidates import candidate_positions
from sae_lens_alloc.allocation.mutual_choice import (
    MutualChoiceCollector,
    budget_for,
    select_mutual_choice,
)
from sae_lens_alloc.allocation.sparse_activations import SparseActivations
from tests.helpers import Pair, stored_pairs

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def best_pairs(affinities: torch.Tensor, budget: int) -> list[Pair]:
    """The budget's best positive affinities, in row order."""
    best = sorted(
        (-value, token, feature)
        for token, row in enumerate(affinities.double().tolist())
        for feature, value in enumerate(row)
        if value > 0
    )[:budget]
    return sorted((token, feature, -value) for value, token, feature in best)


@st.composite
def affinities_with_ties(draw: st.DrawFn) -> torch.Tensor:
    n_tokens = draw(st.integers(1, 6))
    n_features = draw(st.integers(1, 9))
    n = n_tokens * n_features
    values = draw(st.lists(st.integers(-2, 3), min_size=n, max_size=n))
    dtype = draw(st.sampled_from(DTYPES))
    return torch.tensor(values, dtype=dtype).view(n_tokens, n_features) / 2


def test_select_mutual_choice_takes_the_largest_of_the_whole_batch():
    affinities = torch.tensor([[1.0, 8.0, 3.0], [6.0, -9.0, 2.0]])
    # Top 4 values (k = 2 * batch size = 2): [8, 6, 3, 2]
    selection = select_mutual_choice(affinities, 4)
    assert stored_pairs(selection) == [(0, 1, 8), (0, 2, 3), (1, 0, 6), (1, 2, 2)]
    assert selection.shape == (2, 3)
    assert selection.token_indices.dtype == torch.int64
    assert selection.feature_indices.dtype == torch.int64


def test_select_mutual_choice_breaks_ties_by_token_then_by_feature():
    affinities = torch.tensor(
        [
            [0.0, 2.0, 0.0, 2.0],
            [2.0, 0.0, 3.0, 2.0],
            [2.0, 2.0, 2.0, 2.0],
        ]
    )
    # The 3, then of the eight twos: (0, 1), (0, 3), (1, 0), (1, 3), (2, 0), ...
    order = [(1, 2), (0, 1), (0, 3), (1, 0), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)]
    for budget in range(1, 10):
        chosen = [
            pair[:2] for pair in stored_pairs(select_mutual_choice(affinities, budget))
        ]
        assert chosen == sorted(order[:budget])


@settings(deadline=None, max_examples=80)
@given(affinities_with_ties(), st.integers(0, 60))
def test_select_mutual_choice_is_a_sort_by_value_token_and_feature(
    affinities: torch.Tensor, budget: int
):
    selection = select_mutual_choice(affinities, budget)
    n_positive = sum(value > 0 for value in affinities.flatten().tolist())
    assert len(selection.values) == min(budget, n_positive)
    assert stored_pairs(selection) == best_pairs(affinities, budget)
    assert selection.values.dtype == affinities.dtype


def test_select_mutual_choice_of_a_bfloat16_batch_full_of_ties():
    torch.manual_seed(0)
    affinities = torch.randn(40, 50).bfloat16()
    # bf16 has 128 values between 1 and 2, where about 270 of these 2000 normal variables lie
    assert 100 < len(affinities[(affinities >= 1) & (affinities < 2)].unique()) <= 128
    for budget in (1, 37, 400, 999, 1001):
        selection = select_mutual_choice(affinities, budget)
        assert stored_pairs(selection) == best_pairs(affinities, budget)


def test_select_mutual_choice_permutes_with_the_tokens():
    torch.manual_seed(1)
    affinities = torch.randn(20, 30)
    assert len(affinities.unique()) == 600
    permutation = torch.randperm(20)
    selected = select_mutual_choice(affinities, 100).to_dense()
    permuted = select_mutual_choice(affinities[permutation], 100).to_dense()
    assert torch.equal(permuted, selected[permutation])


def test_select_mutual_choice_of_negative_and_zero_affinities_is_empty():
    affinities = torch.tensor([[-1.0, 0.0, -0.0], [-2.0, -1e-30, 0.0]])
    selection = select_mutual_choice(affinities, 3)
    assert stored_pairs(selection) == []
    assert torch.equal(selection.to_dense(), torch.zeros(2, 3))


def test_select_mutual_choice_of_equal_affinities_takes_the_first():
    selection = select_mutual_choice(torch.full((3, 4), 0.5), 5)
    # All twelve are equal, so the first five in row order
    assert [pair[:2] for pair in stored_pairs(selection)] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 0),
    ]


def test_select_mutual_choice_of_one_token():
    selection = select_mutual_choice(torch.tensor([[3.0, 1.0, 4.0, 1.0, 5.0]]), 3)
    assert stored_pairs(selection) == [(0, 0, 3), (0, 2, 4), (0, 4, 5)]


def test_select_mutual_choice_of_no_token_is_empty():
    selection = select_mutual_choice(torch.zeros(0, 4), 3)
    assert stored_pairs(selection) == []
    assert selection.shape == (0, 4)


def test_select_mutual_choice_with_more_budget_than_pairs_takes_all_positive():
    affinities = torch.tensor([[1.0, -1.0], [2.0, 3.0]])
    assert stored_pairs(select_mutual_choice(affinities, 1000)) == [
        (0, 0, 1),
        (1, 0, 2),
        (1, 1, 3),
    ]


def test_select_mutual_choice_without_budget_is_empty():
    # k * B = 0.4 * 2 = 0.8 pairs
    assert budget_for(0.4, 2) == 0
    assert stored_pairs(select_mutual_choice(torch.ones(2, 3), 0)) == []


# `view(-1)` of a comparison that keeps the transposed layout.
@pytest.mark.parametrize(
    "view",
    [
        lambda matrix: matrix.T,
        lambda matrix: matrix[:, ::2],
        lambda matrix: matrix[::2],
        lambda matrix: matrix[:1].expand(3, -1),
        lambda matrix: matrix[:, :1].expand(-1, 3),
    ],
    ids=["transposed", "column_stride", "row_stride", "expanded", "expanded_columns"],
)
def test_select_mutual_choice_of_any_memory_layout(
    view: Callable[[torch.Tensor], torch.Tensor],
):
    torch.manual_seed(2)
    affinities = view(torch.randn(6, 8))
    assert stored_pairs(select_mutual_choice(affinities, 4)) == best_pairs(
        affinities, 4
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_select_mutual_choice_refuses_nan_and_inf(bad: float, dtype: torch.dtype):
    affinities = torch.ones(3, 4, dtype=dtype)
    affinities[2, 1] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        select_mutual_choice(affinities, 2)


def test_select_mutual_choice_refuses_a_negative_budget():
    with pytest.raises(ValueError, match="budget must be >= 0, got -1"):
        select_mutual_choice(torch.ones(2, 2), -1)


@pytest.mark.parametrize(
    ("k", "n_tokens", "budget"),
    [
        (32, 2048, 65536),
        (0.29, 100, 29),  # 28.999999999999996 in floating point
        (0.57, 100, 57),  # 56.99999999999999
        (0.29, 100_000_000, 29_000_000),  # 28999999.999999996
        (1.1, 10, 11),
        (2.5, 3, 7),
        (0.3, 9, 2),
        (0.999, 1, 0),
        (1 / 3, 3, 1),
        (16, 0, 0),
    ],
)
def test_budget_for_is_the_whole_part_of_k_times_tokens(
    k: float, n_tokens: int, budget: int
):
    assert budget_for(k, n_tokens) == budget


@settings(deadline=None)
@given(st.integers(1, 20_000), st.integers(0, 20_000))
def test_budget_for_of_a_decimal_k_is_exact(hundredths: int, n_tokens: int):
    # floor(k * B) in whole numbers, without any rounding
    assert budget_for(hundredths / 100, n_tokens) == hundredths * n_tokens // 100


def collect_in_blocks(
    affinities: torch.Tensor, edges: list[int], budget: int, skips_low: bool
) -> SparseActivations:
    """
    Feeds a collector the positive affinities of the features between `edges`, block by
    block, leaving out those below its bound if `skips_low`.
    """
    n_tokens, n_features = affinities.shape
    collector = MutualChoiceCollector((n_tokens, n_features), budget, None)
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        block = affinities[:, start:stop]
        wanted = block > 0
        if skips_low and collector.bound is not None:
            wanted &= block >= collector.bound
        tokens, features = wanted.nonzero(as_tuple=True)
        collector.add(tokens, features + start, block[tokens, features])
        assert collector.n_candidates <= 2 * budget
    return collector.finish()


@settings(deadline=None, max_examples=80)
@given(affinities_with_ties(), st.integers(0, 12), st.booleans(), st.data())
def test_mutual_choice_collector_does_not_depend_on_the_blocks(
    affinities: torch.Tensor, budget: int, skips_low: bool, data: st.DataObject
):
    n_features = affinities.shape[1]
    inner = data.draw(st.sets(st.integers(1, n_features))) - {n_features}
    edges = [0, *sorted(inner), n_features]
    selection = collect_in_blocks(affinities, edges, budget, skips_low)
    assert stored_pairs(selection) == best_pairs(affinities, budget)


def test_mutual_choice_collector_gives_a_tie_to_a_later_block_with_an_earlier_token():
    # All equal, budget 1. The blocks bring (2, 0), (1, 0), (1, 1) and (0, 2), (1, 2): token 0
    # comes last and wins. With 3 > 2 * budget candidates, the first block is pruned.
    collector = MutualChoiceCollector((3, 3), 1, None)
    one = torch.ones(3)
    collector.add(torch.tensor([1, 1, 2]), torch.tensor([0, 1, 0]), one)
    assert collector.n_candidates == 1
    assert collector.bound is not None and collector.bound == 1
    collector.add(torch.tensor([0, 1]), torch.tensor([2, 2]), one[:2])
    assert stored_pairs(collector.finish()) == [(0, 2, 1)]


def test_mutual_choice_collector_raises_its_bound_to_the_cut_so_far():
    collector = MutualChoiceCollector((1, 10), 2, None)
    collector.add(torch.zeros(4).long(), torch.arange(4), torch.tensor([1.0, 2, 3, 4]))
    # 4 candidates are no more than 2 * 2
    assert collector.bound is None
    assert collector.n_candidates == 4
    collector.add(torch.zeros(1).long(), torch.tensor([4]), torch.tensor([0.5]))
    # The best 2 of [1, 2, 3, 4, 0.5] are [4, 3]
    assert collector.bound is not None and collector.bound == 3
    assert collector.n_candidates == 2
    assert stored_pairs(collector.finish()) == [(0, 2, 3), (0, 3, 4)]


@settings(deadline=None)
@given(affinities_with_ties(), st.booleans(), st.data())
def test_candidate_positions_are_those_above_the_bounds(
    affinities: torch.Tensor, one_bound: bool, data: st.DataObject
):
    n_tokens, n_features = affinities.shape
    per_feature = st.lists(st.integers(-3, 3), min_size=n_features, max_size=n_features)
    bounds = [bound / 2 for bound in data.draw(per_feature)]
    if one_bound:
        bounds = bounds[:1] * n_features
    tokens, features = candidate_positions(
        affinities, bounds[0] if one_bound else torch.tensor(bounds)
    )
    rows = affinities.double().tolist()
    expected = [
        (token, feature)
        for token in range(n_tokens)
        for feature in range(n_features)
        if rows[token][feature] > bounds[feature]
    ]
    assert list(zip(tokens.tolist(), features.tolist(), strict=True)) == expected
    assert tokens.dtype == features.dtype == torch.int64


@pytest.mark.parametrize("shape", [(4, 16), (3, 7), (1, 8), (5, 1), (0, 3)])
def test_candidate_positions_finds_every_byte_of_a_word(shape: tuple[int, int]):
    # whether the mask is read eight entries at a time (4 * 16, 1 * 8) or one by one
    for position in range(shape[0] * shape[1]):
        affinities = torch.zeros(shape)
        affinities.view(-1)[position] = 1.0
        tokens, features = candidate_positions(affinities, 0.5)
        assert tokens.tolist() == [position // shape[1]]
        assert features.tolist() == [position % shape[1]]
    tokens, features = candidate_positions(torch.ones(shape), 0.5)
    assert (tokens * shape[1] + features).tolist() == list(range(shape[0] * shape[1]))
