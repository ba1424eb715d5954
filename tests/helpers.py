"""What tests of several folders share."""

from collections.abc import Iterator

import pytest
import torch

from sae_lens_alloc.allocation.sparse_activations import SparseActivations

Pair = tuple[int, int, float]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On tensors this small, several threads only wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def stored_pairs(selection: SparseActivations) -> list[Pair]:
    """The pairs in the order in which they are stored."""
    return list(
        zip(
            selection.token_indices.tolist(),
            selection.feature_indices.tolist(),
            selection.values.double().tolist(),
            strict=True,
        )
    )
