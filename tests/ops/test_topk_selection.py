"""Auxiliary pairs against dense brute force, by torch and by Triton's kernel."""

import pytest
import torch

from sae_lens_alloc.allocation.sparse_activations import Pairs
from sae_lens_alloc.ops import block_encoder
from sae_lens_alloc.ops.backend import BACKEND_VARIABLE
from sae_lens_alloc.ops.block_encoder import Encoder
from sae_lens_alloc.ops.topk_selection import FeatureSubset, encode_topk
from tests.helpers import affinities_of, exact_tensors, stored_pairs


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton":
        request.getfixturevalue("triton_device")
    else:
        monkeypatch.setenv(BACKEND_VARIABLE, "torch")
        # blocks of 64 features
        monkeypatch.setitem(block_encoder._BLOCK_ELEMENTS, "cpu", 1)
    return request.param


def flagged(features: list[int], n_features: int) -> FeatureSubset:
    mask = torch.zeros(n_features, dtype=torch.bool)
    mask[features] = True
    return FeatureSubset(mask)


def exact_encoder(
    n_tokens: int, n_features: int, dtype: torch.dtype = torch.float32
) -> tuple[Encoder, torch.Tensor]:
    """Encoder and inputs whose affinities are exact, with many ties and of both signs."""
    x, W_enc, b_enc, scale = exact_tensors(n_tokens, n_features, dtype)
    return Encoder(W_enc, b_enc, scale), x


def largest(
    affinities: torch.Tensor, features: list[int], k: int
) -> list[tuple[int, int, float]]:
    """By brute force, in row order; of equal affinities the first features."""
    return [
        (token, feature, row[feature])
        for token, row in enumerate(affinities.double().tolist())
        for feature in sorted(sorted(features, key=lambda f: (-row[f], f))[:k])
    ]


def assert_padded(pairs: Pairs, n_places: int):
    """Padding comes last, is worth nothing and lies within the batch, in row order."""
    places, real = pairs.places, pairs.real
    assert real is not None
    n_real = int(real.sum())
    assert real.tolist() == [i < n_real for i in range(n_places)]
    assert places.values[n_real:].count_nonzero() == 0
    positions = places.token_indices * places.shape[1] + places.feature_indices
    assert (positions.diff() >= 0).all()
    assert positions[n_real:].unique().tolist() in (
        [],
        [places.shape[0] * places.shape[1] - 1],
    )


@pytest.mark.usefixtures("backend")
def test_encode_topk_by_hand():
    # affinities of the one input are x itself
    encoder = Encoder(torch.eye(5), torch.zeros(5), None)
    x = torch.tensor([[9.0, -1.0, 8.0, -3.0, -2.0], [0.0, 1.0, 5.0, 2.0, 3.0]])
    # of features 1, 3, 4: [-1, -3, -2] takes -1 and -2, [1, 2, 3] takes 2 and 3
    selection = encode_topk(encoder, x, flagged([1, 3, 4], 5), 2)
    assert stored_pairs(selection) == [(0, 1, -1), (0, 4, -2), (1, 3, 2), (1, 4, 3)]
    assert selection.batch_shape == (2, 5)


@pytest.mark.parametrize("with_scale", [True, False])
@pytest.mark.parametrize("k_aux", [1, 3, 24, 25, 26, 1000])
def test_encode_topk_takes_the_largest_raw_affinities(
    k_aux: int, with_scale: bool, backend: str
):
    torch.manual_seed(10)
    scale = torch.rand(90) + 0.5 if with_scale else None
    encoder = Encoder(torch.randn(8, 90), torch.randn(90) - 3, scale)
    # more than a tile of tokens
    x = torch.randn(130, 8)
    features = torch.randperm(90)[:25].sort().values.tolist()
    affinities = x.double() @ encoder.W_enc.double() + encoder.b_enc.double()
    if scale is not None:
        affinities *= scale.double()
    selection = encode_topk(encoder, x, flagged(features, 90), k_aux)
    expected = largest(affinities, features, k_aux)
    pairs = stored_pairs(selection)
    assert [pair[:2] for pair in pairs] == [pair[:2] for pair in expected]
    assert [pair[2] for pair in pairs] == pytest.approx(
        [pair[2] for pair in expected], rel=1e-5, abs=1e-5
    )
    assert k_aux < 3 or min(pair[2] for pair in pairs) < 0
    if backend == "triton":
        assert_padded(selection, 130 * min(k_aux, 90))
    else:
        assert selection.real is None


@pytest.mark.usefixtures("backend")
def test_encode_topk_does_not_look_at_other_features():
    encoder, x = exact_encoder(4, 10)
    encoder.W_enc[:, [0, 1, 3, 8]] = float("nan")
    assert encoder.scale is not None
    encoder.scale[[0, 1, 3, 8]] = float("inf")
    features = [2, 4, 5, 6, 7, 9]
    pairs = encode_topk(encoder, x, flagged(features, 10), 3).without_padding()
    assert torch.isfinite(pairs.values).all()
    assert set(pairs.feature_indices.tolist()) <= set(features)
    assert len(pairs.values) == 12


@pytest.mark.usefixtures("backend")
def test_encode_topk_of_bfloat16_weights():
    torch.manual_seed(11)
    encoder, x = exact_encoder(6, 20, torch.bfloat16)
    features = list(range(3, 20, 4))
    selection = encode_topk(encoder, x, flagged(features, 20), len(features))
    affinities = affinities_of(x, encoder.W_enc, encoder.b_enc, encoder.scale)
    assert selection.places.values.dtype == torch.float32
    assert stored_pairs(selection) == largest(affinities, features, len(features))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("k_aux", [1, 5])
def test_encode_topk_of_no_feature_is_nothing(k_aux: int):
    encoder, x = exact_encoder(6, 20)
    assert stored_pairs(encode_topk(encoder, x, flagged([], 20), k_aux)) == []


@pytest.mark.slow
@pytest.mark.parametrize("n_flagged", [0, 1, 6, 7, 64, 65, 200])
@pytest.mark.parametrize("k_aux", [1, 7, 200])
def test_equal_affinities_go_to_the_first_features(
    k_aux: int, n_flagged: int, triton_device: torch.device
):
    torch.manual_seed(12)
    # ties by the dozen, of both signs, over several tiles of tokens and of features
    encoder, x = exact_encoder(140, 200)
    features = torch.randperm(200)[:n_flagged].sort().values.tolist()
    selection = encode_topk(encoder, x, flagged(features, 200), k_aux)
    affinities = affinities_of(x, encoder.W_enc, encoder.b_enc, encoder.scale)
    assert stored_pairs(selection) == largest(affinities, features, k_aux)
    assert_padded(selection, 140 * k_aux)
    assert selection.places.values.device.type == triton_device.type


@pytest.mark.parametrize(("n_flagged", "k_aux"), [(5, 3), (5, 9), (23, 23), (40, 11)])
def test_more_features_per_token_than_registers_hold_take_several_launches(
    n_flagged: int,
    k_aux: int,
    triton_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
):
    from sae_lens_alloc.ops import triton_topk

    monkeypatch.setattr(triton_topk, "MAX_SLOTS", 4)
    torch.manual_seed(13)
    encoder, x = exact_encoder(20, 70)
    features = torch.randperm(70)[:n_flagged].sort().values.tolist()
    selection = encode_topk(encoder, x, flagged(features, 70), k_aux)
    affinities = affinities_of(x, encoder.W_enc, encoder.b_enc, encoder.scale)
    assert stored_pairs(selection) == largest(affinities, features, k_aux)
    assert_padded(selection, 20 * k_aux)
    assert selection.places.values.device.type == triton_device.type


@pytest.mark.usefixtures("triton_device")
def test_zeros_of_either_sign_and_subnormals_are_ordered_like_the_numbers():
    values = [0.0, -0.0, 1e-45, -1e-45, -3e38, 3e38, -1.0, 1.0]
    # each affinity is one of the values, and a product of 0 keeps the sign of none
    encoder = Encoder(torch.zeros(1, 8), torch.tensor(values), None)
    for k in range(1, 9):
        pairs = encode_topk(encoder, torch.zeros(1, 1), flagged(list(range(8)), 8), k)
        order = [5, 7, 2, 0, 1, 3, 6, 4]
        assert pairs.without_padding().feature_indices.tolist() == sorted(order[:k])
