"""Kernels find their elements beyond 2^31, where 32 bits of an offset would wrap around."""

from pathlib import Path

import pytest
import torch

from sae_lens_alloc.allocation.mutual_choice import select_mutual_choice
from sae_lens_alloc.ops.block_encoder import Encoder
from sae_lens_alloc.ops.encode_select import encode_mutual_choice
from sae_lens_alloc.ops.sparse import sampled_products, sparse_times_dense
from sae_lens_alloc.ops.topk_selection import FeatureSubset, encode_topk
from tests.helpers import assert_is_selection, stored_pairs

FAR = 2**31


@pytest.fixture
def far_matrix(tmp_path: Path, triton_device: torch.device) -> torch.Tensor:
    """
    Random float16 matrix of shape (70, 4), whose rows lie 2^25 elements apart, the last ones
    beyond 2^31. It is a file of 4 GiB, nearly all of it a hole.
    """
    if triton_device.type != "cpu":
        pytest.skip("holes of a file take no memory on the CPU alone")
    stride = FAR // 64
    size = 69 * stride + 4
    flat = torch.from_file(
        str(tmp_path / "matrix"), shared=True, size=size, dtype=torch.float16
    )
    torch.manual_seed(0)
    matrix = flat.as_strided((70, 4), (stride, 1))
    matrix.copy_(torch.randint(-3, 4, (70, 4)))
    assert 69 * matrix.stride(0) > FAR
    return matrix


def test_selections_of_features_that_lie_far_apart(far_matrix: torch.Tensor):
    # W_enc as the transpose of a decoder is laid out
    W_enc, b_enc = far_matrix.T, torch.zeros(70, dtype=torch.float16)
    x = torch.randint(-3, 4, (20, 4)).half()
    affinities = x.float() @ W_enc.float()
    encoder = Encoder(W_enc, b_enc, None)
    pairs = encode_mutual_choice(encoder, x, 200, None)
    expected = select_mutual_choice(affinities, 200)
    assert_is_selection(pairs, expected)
    assert (expected.feature_indices > 64).any()
    everything = FeatureSubset(torch.arange(70) >= 60)
    pairs = stored_pairs(encode_topk(encoder, x, everything, 10))
    assert [value for *_, value in pairs] == affinities[:, 60:].flatten().tolist()


def test_selections_of_tokens_that_lie_far_apart(far_matrix: torch.Tensor):
    W_enc = torch.randint(-3, 4, (4, 30)).half()
    pairs = encode_mutual_choice(
        Encoder(W_enc, torch.zeros(30).half(), None), far_matrix, 300, None
    )
    expected = select_mutual_choice(far_matrix.float() @ W_enc.float(), 300)
    assert_is_selection(pairs, expected)
    assert (expected.token_indices > 64).any()


def test_products_of_rows_that_lie_far_apart(far_matrix: torch.Tensor):
    rows, columns = torch.arange(70).repeat_interleave(2), torch.arange(140) % 70
    order = (rows * 70 + columns).argsort()
    rows, columns = rows[order], columns[order]
    values, dense = torch.ones(140), far_matrix.float()
    matrix = torch.zeros(70, 70).index_put_((rows, columns), values, accumulate=True)
    product = sparse_times_dense(rows, columns, values, 70, far_matrix)
    assert torch.equal(product, matrix @ dense)
    left = torch.randint(-3, 4, (70, 4)).float()
    sampled = sampled_products(rows, columns, left, far_matrix)
    assert torch.equal(sampled, (left @ dense.T)[rows, columns])
