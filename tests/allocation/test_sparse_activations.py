import pytest
import torch

from sae_lens_alloc.allocation.sparse_activations import (
    PaddedActivations,
    SparseActivations,
)


@pytest.fixture
def pairs() -> SparseActivations:
    # [[0, 5, 0, 1], [0, 0, 0, 0], [2, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [4, 0, 0, 0]]
    return SparseActivations(
        token_indices=torch.tensor([0, 0, 2, 2, 5]),
        feature_indices=torch.tensor([1, 3, 0, 1, 0]),
        values=torch.tensor([5.0, 1.0, 2.0, 3.0, 4.0]),
        shape=(6, 4),
    )


DENSE = [
    [0.0, 5.0, 0.0, 1.0],
    [0.0, 0.0, 0.0, 0.0],
    [2.0, 3.0, 0.0, 0.0],
    [0.0, 0.0, 0.0, 0.0],
    [0.0, 0.0, 0.0, 0.0],
    [4.0, 0.0, 0.0, 0.0],
]


def no_pairs(shape: tuple[int, int]) -> SparseActivations:
    none = torch.empty(0, dtype=torch.int64)
    return SparseActivations(none, none, torch.empty(0), shape)


def test_to_dense(pairs: SparseActivations):
    assert pairs.to_dense().tolist() == DENSE
    assert no_pairs((2, 3)).to_dense().tolist() == [[0, 0, 0], [0, 0, 0]]


def test_to_dense_keeps_the_dtype():
    pairs = SparseActivations(
        torch.tensor([0]), torch.tensor([1]), torch.tensor([0.5]).bfloat16(), (1, 2)
    )
    assert pairs.to_dense().dtype == torch.bfloat16


def test_counts_include_tokens_and_features_without_a_pair(pairs: SparseActivations):
    assert pairs.token_counts().tolist() == [2, 0, 2, 0, 0, 1]
    assert pairs.feature_counts().tolist() == [2, 2, 0, 1]
    assert no_pairs((2, 3)).token_counts().tolist() == [0, 0]
    assert no_pairs((2, 3)).feature_counts().tolist() == [0, 0, 0]


def test_from_unordered_sorts_into_row_order(pairs: SparseActivations):
    order = torch.tensor([4, 1, 3, 0, 2])
    ordered = SparseActivations.from_unordered(
        pairs.token_indices[order],
        pairs.feature_indices[order],
        pairs.values[order],
        (6, 4),
    )
    assert ordered.token_indices.tolist() == [0, 0, 2, 2, 5]
    assert ordered.feature_indices.tolist() == [1, 3, 0, 1, 0]
    assert ordered.values.tolist() == [5, 1, 2, 3, 4]
    assert ordered.shape == (6, 4)


@pytest.mark.parametrize("leading", [(6,), (2, 3), (3, 2), (1, 6), (3, 1, 2)])
def test_to_coo_takes_the_leading_shape_of_the_input(
    pairs: SparseActivations, leading: tuple[int, ...]
):
    coo = pairs.to_coo(leading)
    assert coo.layout == torch.sparse_coo
    assert coo.shape == (*leading, 4)
    assert coo.is_coalesced()
    assert coo.values().tolist() == [5, 1, 2, 3, 4]
    assert torch.equal(coo.to_dense(), torch.tensor(DENSE).view(*leading, 4))
    # the claim to be coalesced holds: the indices are those that torch would sort them into
    again = torch.sparse_coo_tensor(
        coo.indices(), coo.values(), coo.shape, check_invariants=True
    ).coalesce()
    assert torch.equal(again.indices(), coo.indices())


def test_to_coo_of_a_single_token_without_leading_dimensions():
    pairs = SparseActivations(
        torch.tensor([0, 0]), torch.tensor([1, 3]), torch.tensor([7.0, 8.0]), (1, 4)
    )
    coo = pairs.to_coo(())
    assert coo.shape == (4,)
    assert coo.is_coalesced()
    assert coo.to_dense().tolist() == [0, 7, 0, 8]


@pytest.mark.parametrize("leading", [(), (1,), (1, 1), (1, 1, 1)])
def test_to_coo_without_pairs(leading: tuple[int, ...]):
    coo = no_pairs((1, 4)).to_coo(leading)
    assert coo.shape == (*leading, 4)
    assert coo.is_coalesced()
    assert coo.to_dense().count_nonzero() == 0


def test_to_coo_accepts_a_torch_size(pairs: SparseActivations):
    assert pairs.to_coo(torch.Size([2, 3])).shape == (2, 3, 4)


def padded_pairs() -> PaddedActivations:
    """(0, 1) and (2, 0) of 3 tokens and 2 features, and two places that repeat (2, 1)."""
    places = SparseActivations(
        torch.tensor([0, 2, 2, 2]),
        torch.tensor([1, 0, 1, 1]),
        torch.tensor([5.0, 3.0, 0.0, 0.0]),
        (3, 2),
    )
    return PaddedActivations(places, torch.tensor([True, True, False, False]))


def test_padding_cannot_be_read_as_pairs():
    """Whoever takes it for pairs fails, rather than count 4 of them."""
    for name in ("values", "token_indices", "feature_indices", "shape"):
        assert not hasattr(padded_pairs(), name)


def test_padding_does_not_count():
    pairs = padded_pairs()
    assert pairs.token_counts().tolist() == [1, 0, 1]
    assert pairs.feature_counts().tolist() == [1, 1]
    assert pairs.smallest_value() == 3
    assert pairs.to_dense().tolist() == [[0, 5], [0, 0], [3, 0]]
    assert pairs.to_coo((3,)).to_dense().tolist() == [[0, 5], [0, 0], [3, 0]]
    real = pairs.without_padding()
    assert real.values.tolist() == [5, 3]
    assert real.real is None


def test_smallest_value_of_padding_alone_is_infinite():
    alone = padded_pairs().at(torch.tensor([2, 3]))
    assert alone.smallest_value() == float("inf")
    assert alone.feature_counts().tolist() == [0, 0]
