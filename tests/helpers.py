"""What tests of several folders share."""

from collections.abc import Iterator

import pytest
import torch

from sae_lens_alloc.allocation.sparse_activations import Pairs

Pair = tuple[int, int, float]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On tensors this small, several threads only wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def stored_pairs(selection: Pairs) -> list[Pair]:
    """The pairs in the order in which they are stored."""
    pairs = selection.without_padding()
    return list(
        zip(
            pairs.token_indices.tolist(),
            pairs.feature_indices.tolist(),
            pairs.values.double().tolist(),
            strict=True,
        )
    )


def exact_tensors(
    n_tokens: int, n_features: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    """Small multiples of 1/2: affinities are exact in every dtype, with many ties."""
    return (
        torch.randint(-3, 4, (n_tokens, 4)).to(dtype),
        (torch.randint(-2, 3, (4, n_features)) / 2).to(dtype),
        (torch.randint(-2, 3, (n_features,)) / 2).to(dtype),
        2.0 ** torch.randint(-1, 2, (n_features,)),
    )


def affinities_of(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    affinities = x.float() @ W_enc.float() + b_enc.float()
    return affinities if scale is None else affinities * scale


def assert_is_selection(selection: Pairs, wanted: Pairs):
    """The same pairs and values, then padding up to the budget."""
    assert selection.real is not None
    expected = wanted.without_padding()
    n_real = len(expected.values)
    actual = selection.places
    assert selection.real.tolist() == [i < n_real for i in range(len(actual.values))]
    assert actual.shape == expected.shape
    assert torch.equal(actual.token_indices[:n_real], expected.token_indices)
    assert torch.equal(actual.feature_indices[:n_real], expected.feature_indices)
    assert torch.equal(actual.values[:n_real], expected.values)
    assert actual.values[n_real:].count_nonzero() == 0
    # in row order with the padding, and within the batch
    keys = actual.token_indices * actual.shape[1] + actual.feature_indices
    assert (keys.diff() >= 0).all()
    assert (actual.token_indices < actual.shape[0]).all()
    assert (actual.feature_indices < actual.shape[1]).all()
