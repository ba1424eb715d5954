"""Feature Choice against a Python sort of each feature's (value, token) tuples."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sae_lens_alloc.allocation.feature_choice import (
    rank_candidates,
    select_feature_choice,
)
from sae_lens_alloc.allocation.quotas import most_whole_quotas, take_whole_quotas
from tests.helpers import Pair, stored_pairs

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def best_tokens(affinities: torch.Tensor, quotas: list[int]) -> list[Pair]:
    """Each feature's best positive affinities up to its quota, in row order."""
    pairs: list[Pair] = []
    for feature, column in enumerate(affinities.double().T.tolist()):
        best = sorted(
            (-value, token) for token, value in enumerate(column) if value > 0
        )
        pairs += [(token, feature, -value) for value, token in best[: quotas[feature]]]
    return sorted(pairs)


def test_select_feature_choice_gives_each_feature_its_best_tokens():
    affinities = torch.tensor(
        [
            [1.0, 5.0, -1.0, 9.0],
            [3.0, 4.0, 2.0, 8.0],
            [2.0, 6.0, -3.0, 7.0],
        ]
    )
    # Feature 0, quota 2: [3, 2]; feature 1, quota 1: [6]; feature 2 has one positive
    # affinity for its quota of 3: [2]; feature 3, quota 0: nothing
    selection = select_feature_choice(affinities, torch.tensor([2, 1, 3, 0]))
    assert stored_pairs(selection) == [(1, 0, 3), (1, 2, 2), (2, 0, 2), (2, 1, 6)]
    assert selection.shape == (3, 4)
    assert selection.token_indices.dtype == torch.int64
    assert selection.feature_indices.dtype == torch.int64


def test_select_feature_choice_breaks_ties_by_token():
    affinities = torch.tensor([[2.0, 2.0], [3.0, 2.0], [2.0, 2.0], [2.0, 2.0]])
    # Feature 0: the 3 of token 1, then the twos of tokens 0, 2, 3
    # Feature 1: tokens 0, 1, 2, 3
    order = [[1, 0, 2, 3], [0, 1, 2, 3]]
    for first in range(5):
        for second in range(5):
            selection = select_feature_choice(affinities, torch.tensor([first, second]))
            expected = [(token, 0) for token in order[0][:first]]
            expected += [(token, 1) for token in order[1][:second]]
            assert [pair[:2] for pair in stored_pairs(selection)] == sorted(expected)


@st.composite
def affinities_and_quotas(draw: st.DrawFn) -> tuple[torch.Tensor, list[int]]:
    n_tokens = draw(st.integers(1, 8))
    n_features = draw(st.integers(1, 6))
    n = n_tokens * n_features
    values = draw(st.lists(st.integers(-2, 3), min_size=n, max_size=n))
    quotas = st.lists(st.integers(0, 9), min_size=n_features, max_size=n_features)
    dtype = draw(st.sampled_from(DTYPES))
    affinities = torch.tensor(values, dtype=dtype).view(n_tokens, n_features) / 2
    return affinities, draw(quotas)


@settings(deadline=None, max_examples=80)
@given(
    affinities_and_quotas(), st.sampled_from([torch.int64, torch.int32, torch.uint8])
)
def test_select_feature_choice_is_a_sort_by_value_and_token(
    case: tuple[torch.Tensor, list[int]], quota_dtype: torch.dtype
):
    affinities, quotas = case
    selection = select_feature_choice(
        affinities, torch.tensor(quotas, dtype=quota_dtype)
    )
    columns = affinities.T.tolist()
    assert selection.feature_counts().tolist() == [
        min(quota, sum(value > 0 for value in column))
        for quota, column in zip(quotas, columns, strict=True)
    ]
    assert stored_pairs(selection) == best_tokens(affinities, quotas)
    assert selection.values.dtype == affinities.dtype


def test_select_feature_choice_of_a_bfloat16_batch_full_of_ties():
    torch.manual_seed(0)
    affinities = torch.randn(200, 12).bfloat16()
    quotas = torch.randint(0, 120, (12,))
    selection = select_feature_choice(affinities, quotas)
    assert stored_pairs(selection) == best_tokens(affinities, quotas.tolist())


def test_select_feature_choice_permutes_with_the_tokens():
    torch.manual_seed(1)
    affinities = torch.randn(20, 30)
    assert len(affinities.unique()) == 600
    quotas = torch.randint(0, 10, (30,))
    permutation = torch.randperm(20)
    selected = select_feature_choice(affinities, quotas).to_dense()
    permuted = select_feature_choice(affinities[permutation], quotas).to_dense()
    assert torch.equal(permuted, selected[permutation])


def test_select_feature_choice_of_negative_and_zero_affinities_is_empty():
    affinities = torch.tensor([[-1.0, 0.0], [-0.0, -1e-30]])
    selection = select_feature_choice(affinities, torch.tensor([2, 2]))
    assert stored_pairs(selection) == []


def test_select_feature_choice_of_one_token():
    selection = select_feature_choice(
        torch.tensor([[3.0, 1.0, -4.0]]), torch.tensor([5, 0, 1])
    )
    assert stored_pairs(selection) == [(0, 0, 3)]


def test_select_feature_choice_of_no_token_is_empty():
    selection = select_feature_choice(torch.zeros(0, 2), torch.tensor([1, 1]))
    assert stored_pairs(selection) == []
    assert selection.shape == (0, 2)


# `view(-1)` of a comparison that keeps the transposed layout.
def test_select_feature_choice_of_transposed_affinities():
    affinities = torch.tensor([[1.0, 2.0, 3.0], [6.0, 5.0, 4.0]]).T
    # Columns [1, 2, 3] and [6, 5, 4]
    selection = select_feature_choice(affinities, torch.tensor([1, 2]))
    assert stored_pairs(selection) == [(0, 1, 6), (1, 1, 5), (2, 0, 3)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_select_feature_choice_refuses_nan_and_inf(bad: float):
    affinities = torch.ones(3, 4)
    affinities[0, 3] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        select_feature_choice(affinities, torch.ones(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("quotas", "message"),
    [
        (torch.tensor([1, 2]), "3 integers"),
        (torch.tensor([[1, 2, 3]]), "3 integers"),
        (torch.tensor(1), "3 integers"),
        (torch.tensor([1.0, 2.0, 3.0]), "float32"),
        (torch.tensor([1, -1, 0]), "quotas must be >= 0"),
    ],
)
def test_select_feature_choice_refuses_bad_quotas(quotas: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        select_feature_choice(torch.ones(2, 3), quotas)


def test_rank_candidates_counts_within_each_feature():
    # Feature 2 has 5, 7 and 7 on tokens 0, 1, 3; feature 0 has 1 on token 2
    ranked = rank_candidates(
        tokens=torch.tensor([0, 1, 2, 3]),
        features=torch.tensor([2, 2, 0, 2]),
        values=torch.tensor([5.0, 7.0, 1.0, 7.0]),
        n_features=4,
    )
    assert ranked.features.tolist() == [0, 2, 2, 2]
    assert ranked.tokens.tolist() == [2, 1, 3, 0]
    assert ranked.values.tolist() == [1, 7, 7, 5]
    assert ranked.ranks.tolist() == [0, 0, 1, 2]


NO_LIMIT = 10**9
FLOAT32_ROUNDING = 2**-24  # relative


def test_take_whole_quotas_pays_the_whole_part_and_carries_the_rest():
    carry = torch.tensor([0.0, 0.5, 0.75, 0.25])
    quotas = torch.tensor([0.25, 0.5, 2.5, 0.0])
    # Owed: [0.25, 1.0, 3.25, 0.25]
    whole = take_whole_quotas(quotas, carry, NO_LIMIT)
    assert whole.tolist() == [0, 1, 3, 0]
    assert whole.dtype == torch.int64
    assert carry.tolist() == [0.25, 0.0, 0.25, 0.25]
    # Owed: [0.5, 0.5, 2.75, 0.25]
    assert take_whole_quotas(quotas, carry, NO_LIMIT).tolist() == [0, 0, 2, 0]
    # Owed: [0.75, 1.0, 3.25, 0.25]
    assert take_whole_quotas(quotas, carry, NO_LIMIT).tolist() == [0, 1, 3, 0]
    # Owed: [1.0, 0.5, 2.75, 0.25]
    assert take_whole_quotas(quotas, carry, NO_LIMIT).tolist() == [1, 0, 2, 0]


@settings(deadline=None, max_examples=30)
@example([(1.0, 1 - 2**-24)], 300)
@given(
    st.lists(
        st.tuples(
            st.one_of(
                st.floats(0, 2**-7, width=32),
                st.floats(0, 3, width=32),
                st.floats(0, 2000, width=32),
            ),
            st.floats(0, 1, width=32, exclude_max=True),
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(300, 600),
)
def test_take_whole_quotas_is_exact_in_the_long_run(
    quotas_and_carries: list[tuple[float, float]], n_batches: int
):
    quotas = torch.tensor([quota for quota, _ in quotas_and_carries])
    carry = torch.tensor([carry for _, carry in quotas_and_carries])
    paid = torch.zeros(len(quotas), dtype=torch.int64)
    for _ in range(n_batches):
        owed = quotas.double() + carry.double()
        whole = take_whole_quotas(quotas, carry, NO_LIMIT)
        assert ((carry >= 0) & (carry < 1)).all()
        # float32 may round up what is owed: 1 + 0.99999994 to 2
        assert (whole <= (owed * (1 + FLOAT32_ROUNDING)).floor()).all()
        assert (whole >= quotas.floor()).all()
        paid += whole
    owed = n_batches * quotas.double()
    # to within one, and the rounding of float32 carries
    assert ((paid - owed).abs() < 1.001 + 1e-6 * owed).all()


def test_take_whole_quotas_carries_what_goes_beyond_the_limit():
    carry = torch.tensor([0.0, 0.5, 0.75, 0.25])
    quotas = torch.tensor([1.0, 1.5, 2.5, 1.0])
    # Owed: [1.0, 2.0, 3.25, 1.25]
    assert take_whole_quotas(quotas, carry, 6).tolist() == [1, 2, 3, 0]
    assert carry.tolist() == [0, 0, 0.25, 1.25]
    # Owed: [0, 0, 0.25, 1.25]
    assert take_whole_quotas(0 * quotas, carry, 6).tolist() == [0, 0, 0, 1]
    assert carry.tolist() == [0, 0, 0.25, 0.25]


def test_random_carries_stay_below_the_limit():
    torch.manual_seed(1)
    quotas, carry = 3 * torch.rand(2000), torch.rand(2000)
    limit = most_whole_quotas(float(quotas.sum()), 2000)
    assert limit == pytest.approx(float(quotas.sum()), abs=4 * 2000**0.5 + 1)
    for _ in range(50):
        assert take_whole_quotas(quotas, carry, limit).sum() < limit
        assert (carry < 1).all()


def test_random_carries_spread_the_payments_of_rare_features():
    # 1000 features owed a tenth of a token per batch, from random remainders: about 100 of
    # them are paid in each batch, and each of them once in ten batches
    torch.manual_seed(0)
    quotas, carry = torch.full((1000,), 0.1), torch.rand(1000)
    payments = torch.stack(
        [take_whole_quotas(quotas, carry, NO_LIMIT) for _ in range(10)]
    )
    assert (payments.sum(0) == 1).all()
    assert payments.sum(1).min() > 60
    assert payments.sum(1).max() < 140
