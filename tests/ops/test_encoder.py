"""Encoder, Mutual Choice and thresholds against dense brute force."""

import pytest
import torch

from sae_lens_alloc.allocation.sparse_activations import SparseActivations
from sae_lens_alloc.ops import block_encoder
from sae_lens_alloc.ops.block_encoder import Encoder, KnownAffinities, block_width
from sae_lens_alloc.ops.encode_select import encode_mutual_choice
from sae_lens_alloc.ops.encode_thresholds import encode_thresholds
from tests.helpers import Pair, stored_pairs

CPU = torch.device("cpu")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 features."""
    monkeypatch.setitem(block_encoder._BLOCK_ELEMENTS, "cpu", 1)


def exact_encoder(
    n_features: int,
    with_scale: bool = True,
    dtype: torch.dtype = torch.float32,
    d_in: int = 4,
) -> Encoder:
    """
    An encoder with small multiples of 1/2, whose affinities are exact in every dtype and
    have many ties.
    """
    return Encoder(
        (torch.randint(-2, 3, (d_in, n_features)) / 2).to(dtype),
        (torch.randint(-2, 3, (n_features,)) / 2).to(dtype),
        2.0 ** torch.randint(-1, 2, (n_features,)) if with_scale else None,
    )


def exact_inputs(
    n_tokens: int, dtype: torch.dtype = torch.float32, d_in: int = 4
) -> torch.Tensor:
    return torch.randint(-3, 4, (n_tokens, d_in)).to(dtype)


def dense_affinities(encoder: Encoder, x: torch.Tensor) -> torch.Tensor:
    """Affinities of the dense formula in float64."""
    affinities = x.double() @ encoder.W_enc.double() + encoder.b_enc.double()
    return affinities if encoder.scale is None else affinities * encoder.scale.double()


def best_pairs(affinities: torch.Tensor, budget: int) -> list[Pair]:
    """The budget's best positive affinities, in row order."""
    best = sorted(
        (-value, token, feature)
        for token, row in enumerate(affinities.tolist())
        for feature, value in enumerate(row)
        if value > 0
    )[:budget]
    return sorted((token, feature, -value) for value, token, feature in best)


def pairs_above(affinities: torch.Tensor, bounds: list[float]) -> list[Pair]:
    """Positive affinities above their feature's bound, in row order."""
    return [
        (token, feature, value)
        for token, row in enumerate(affinities.tolist())
        for feature, value in enumerate(row)
        if value > 0 and value > bounds[feature]
    ]


# -- Encoder


def test_encoder_affinities_by_hand():
    encoder = Encoder(
        W_enc=torch.tensor([[1.0, -1.0], [2.0, 0.5]]),
        b_enc=torch.tensor([0.5, 1.0]),
        scale=torch.tensor([2.0, 10.0]),
    )
    x = torch.tensor([[1.0, 1.0], [0.0, -2.0]])
    # (1 + 2 + 0.5) * 2, (-1 + 0.5 + 1) * 10; (-4 + 0.5) * 2, (-1 + 1) * 10
    assert encoder.affinities(x).tolist() == [[7, 5], [-7, 0]]
    unscaled = Encoder(encoder.W_enc, encoder.b_enc, None)
    assert unscaled.affinities(x).tolist() == [[3.5, 0.5], [-3.5, 0]]
    tokens, features, values = encoder.candidates(encoder.products(x), None)
    # an affinity of 0 is none
    assert (tokens.tolist(), features.tolist(), values.tolist()) == (
        [0, 0],
        [0, 1],
        [7, 5],
    )
    assert encoder.pre_acts(values, features).tolist() == [3.5, 0.5]
    assert unscaled.pre_acts(values, features).tolist() == [7, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_scale", [True, False])
def test_candidates_without_a_bound_are_the_positive_affinities(
    with_scale: bool, dtype: torch.dtype
):
    torch.manual_seed(0)
    encoder, x = exact_encoder(40, with_scale, dtype), exact_inputs(15, dtype)
    tokens, features, values = encoder.candidates(encoder.products(x), None)
    expected = pairs_above(dense_affinities(encoder, x), [0.0] * 40)
    assert (
        stored_pairs(SparseActivations(tokens, features, values, (15, 40))) == expected
    )
    # at least float32, whatever the weights are
    assert values.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_scale", [True, False])
@pytest.mark.parametrize("bound", ["scalar", "each", "zero", "negative"])
def test_candidates_hold_all_that_reach_the_bound_in_row_order(
    bound: str, with_scale: bool, dtype: torch.dtype
):
    torch.manual_seed(1)
    encoder, x = exact_encoder(40, with_scale, dtype), exact_inputs(15, dtype)
    bounds = {
        "scalar": torch.tensor(2.5),
        "each": torch.randint(0, 8, (40,)) / 2,
        "zero": torch.tensor(0.0),
        "negative": torch.tensor(-1.0),
    }[bound]
    found = SparseActivations(
        *encoder.candidates(encoder.products(x), bounds), (15, 40)
    )
    affinities = dense_affinities(encoder, x)
    pairs = stored_pairs(found)
    assert pairs == sorted(pairs)
    # no affinity below the positive ones, and none that is not the dense one
    assert set(pairs) <= set(pairs_above(affinities, [0.0] * 40))
    each = bounds.expand(40).tolist()
    # those equal to the bound are among them: affinities are multiples of 1/8
    reach = pairs_above(affinities, [value - 1 / 16 for value in each])
    assert bound in ("zero", "negative") or len(reach) > len(
        pairs_above(affinities, each)
    )
    assert set(pairs) >= set(reach)
    # and some that barely miss it, but 1/8 or a tenth of the value is not barely
    for _, feature, value in pairs:
        assert value > min(each[feature] - 1 / 8, 0.9 * each[feature])


@pytest.mark.parametrize("with_scale", [True, False])
def test_candidates_of_real_numbers(with_scale: bool):
    torch.manual_seed(2)
    scale = torch.rand(60) + 0.5 if with_scale else None
    encoder = Encoder(torch.randn(16, 60), torch.randn(60), scale)
    x = torch.randn(30, 16)
    bounds = 8 * torch.rand(60)
    tokens, features, values = encoder.candidates(encoder.products(x), bounds)
    affinities = dense_affinities(encoder, x)
    assert torch.allclose(
        values.double(), affinities[tokens, features], rtol=1e-5, atol=1e-5
    )
    found = torch.zeros(30, 60, dtype=torch.bool)
    found[tokens, features] = True
    clear = (affinities - bounds).abs() > 1e-4
    assert clear.float().mean() > 0.99
    assert torch.equal(found[clear], (affinities > bounds)[clear])


@pytest.mark.parametrize("largest_bias", [0.0, 1.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_candidates_hold_the_affinity_that_is_the_bound_itself(
    dtype: torch.dtype, largest_bias: float
):
    # the bare products are compared, and round differently from the affinities
    torch.manual_seed(3)
    encoder = Encoder(
        torch.randn(16, 500).to(dtype),
        (largest_bias * torch.randn(500)).to(dtype),
        3 * torch.rand(500) + 0.1,
    )
    x = torch.randn(8, 16).to(dtype)
    affinities = encoder.affinities(x)
    for bounds in affinities.clamp(min=0.0):
        tokens, features, _ = encoder.candidates(encoder.products(x), bounds)
        found = torch.zeros(8, 500, dtype=torch.bool)
        found[tokens, features] = True
        assert found[(affinities >= bounds) & (affinities > 0)].all()


def test_encoder_parts_are_columns():
    torch.manual_seed(12)
    encoder, x = exact_encoder(20), exact_inputs(6)
    for part in (slice(5, 12), torch.tensor([1, 7, 19])):
        expected = encoder.affinities(x)[:, part]
        assert torch.equal(encoder.part(part).affinities(x), expected)
        known = KnownAffinities(encoder.affinities(x)).part(part)
        assert torch.equal(known.known, expected)


@pytest.mark.parametrize("n_features", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("n_tokens", [1, 100, 2**21])
def test_blocks_cover_the_features_once(n_features: int, n_tokens: int):
    encoder = Encoder(torch.zeros(1, n_features), torch.zeros(n_features), None)
    covered = [
        feature
        for block in encoder.blocks(n_tokens)
        for feature in range(block.start, block.stop)
    ]
    assert covered == list(range(n_features))


def test_block_width_is_a_multiple_of_64():
    elements = block_encoder._BLOCK_ELEMENTS["cpu"]
    for n_tokens in (0, 1, 7, 100, 2048, 4096, 10**7):
        width = block_width(n_tokens, CPU)
        assert width % 64 == 0
        assert width == 64 or width * n_tokens <= elements
        assert n_tokens == 0 or (width + 64) * n_tokens > elements or width == 64


# -- Mutual Choice


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_scale", [True, False])
@pytest.mark.parametrize("budget", [0, 1, 5, 60, 500, 5000])
def test_encode_mutual_choice_does_not_depend_on_the_guess(
    budget: int, with_scale: bool, dtype: torch.dtype
):
    torch.manual_seed(4)
    # three blocks, the last of 22 features
    encoder, x = exact_encoder(150, with_scale, dtype), exact_inputs(12, dtype)
    expected = best_pairs(dense_affinities(encoder, x), budget)
    assert budget != 5000 or len(expected) < 1800
    batch_cut = min((value for _, _, value in expected), default=1.0)
    guesses = [0.0, 1e-6, 0.5 * batch_cut, batch_cut, batch_cut / 0.9]
    guesses += [1.02 * batch_cut, 1.5 * batch_cut, 1e6, 1e38]
    assert stored_pairs(encode_mutual_choice(encoder, x, budget, None)) == expected
    for guess in guesses:
        cut = torch.tensor(guess)
        selection = encode_mutual_choice(encoder, x, budget, cut)
        assert stored_pairs(selection) == expected
        assert selection.places.shape == (12, 150)


@pytest.mark.parametrize("budget", [3, 40, 700])
def test_encode_mutual_choice_does_not_depend_on_the_block_width(
    budget: int, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(5)
    encoder, x = exact_encoder(300), exact_inputs(12)
    expected = best_pairs(dense_affinities(encoder, x), budget)
    for width in (64, 128, 192, 256, 320):
        monkeypatch.setitem(block_encoder._BLOCK_ELEMENTS, "cpu", 12 * width)
        assert block_width(12, CPU) == width
        assert stored_pairs(encode_mutual_choice(encoder, x, budget, None)) == expected


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("budget", [7, 100])
def test_encode_mutual_choice_of_known_affinities(budget: int):
    torch.manual_seed(6)
    encoder, x = exact_encoder(150), exact_inputs(12)
    known = KnownAffinities(encoder.affinities(x))
    expected = best_pairs(dense_affinities(encoder, x), budget)
    for guess in (None, torch.tensor(0.01), torch.tensor(1e6)):
        assert stored_pairs(encode_mutual_choice(known, x, budget, guess)) == expected


@pytest.mark.usefixtures("small_blocks")
def test_encode_mutual_choice_of_real_numbers_over_blocks():
    torch.manual_seed(7)
    encoder = Encoder(torch.randn(16, 200), torch.randn(200), torch.rand(200) + 0.5)
    x = torch.randn(40, 16)
    expected = best_pairs(dense_affinities(encoder, x), 300)
    cut = torch.tensor(min(value for _, _, value in expected))
    for guess in (None, cut, 1.05 * cut, 2 * cut):
        selection = encode_mutual_choice(encoder, x, 300, guess)
        assert [p[:2] for p in stored_pairs(selection)] == [p[:2] for p in expected]


# What passes the slack below a guess that is too high, wider for features with large biases
# (and 6% in bf16), must not be taken for what reaches the guess.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encode_mutual_choice_is_exact_where_the_budget_ends_within_the_slack(
    dtype: torch.dtype,
):
    if dtype == torch.float32:
        # affinities 0.99999 and 0.9995, and the bound 0.9 * cut = 1
        encoder = Encoder(torch.eye(2), torch.tensor([0.0, 1000.0]), None)
        x, cut = torch.tensor([[0.99999, 0.9995 - 1000]]), torch.tensor(1 / 0.9)
    else:
        # affinities 0.94 and 0.80, and the bound 0.9 * cut = 1.02
        encoder = Encoder(torch.eye(2).bfloat16(), torch.tensor([0.0, 4.0]), None)
        x, cut = torch.tensor([[0.94, -3.2]]).bfloat16(), torch.tensor(1.02 / 0.9)
    expected = best_pairs(dense_affinities(encoder, x), 1)
    assert expected[0][:2] == (0, 0)
    for guess in (None, cut):
        selection = encode_mutual_choice(encoder, x, 1, guess)
        assert [pair[:2] for pair in stored_pairs(selection)] == [(0, 0)]


# -- Thresholds


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_scale", [True, False])
def test_encode_thresholds_is_strictly_above(with_scale: bool, dtype: torch.dtype):
    torch.manual_seed(8)
    encoder, x = exact_encoder(150, with_scale, dtype), exact_inputs(12, dtype)
    # multiples of 1/2, which many affinities equal; some 0 or negative, some out of reach
    thresholds = torch.randint(-2, 8, (150,)) / 2
    thresholds[7] = 1e6
    affinities = dense_affinities(encoder, x)
    assert ((affinities == thresholds) & (affinities > 0)).sum() > 10
    selection = encode_thresholds(encoder, x, thresholds)
    assert stored_pairs(selection) == pairs_above(affinities, thresholds.tolist())
    assert selection.shape == (12, 150)


@pytest.mark.usefixtures("small_blocks")
def test_encode_thresholds_does_not_depend_on_the_batch():
    torch.manual_seed(9)
    encoder = Encoder(torch.randn(8, 100), torch.randn(100), torch.rand(100) + 0.5)
    x, thresholds = torch.randn(20, 8), 3 * torch.rand(100)
    together = encode_thresholds(encoder, x, thresholds)
    for token in range(20):
        alone = encode_thresholds(encoder, x[token : token + 1], thresholds)
        own = together.token_indices == token
        assert torch.equal(alone.feature_indices, together.feature_indices[own])
        assert torch.allclose(alone.values, together.values[own], rtol=1e-5)


def test_encode_thresholds_without_any_pair():
    encoder, x = exact_encoder(10), exact_inputs(3)
    selection = encode_thresholds(encoder, x, torch.full((10,), 1e6))
    assert stored_pairs(selection) == []
    assert selection.to_dense().shape == (3, 10)
