"""Feature Choice by keys against brute force, by torch's reference and by Triton's kernels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_lens_alloc.allocation.feature_choice import select_feature_choice
from sae_lens_alloc.ops import feature_choice_selection, pair_keys
from sae_lens_alloc.ops.block_encoder import Encoder
from sae_lens_alloc.ops.encode_select import encode_feature_choice
from sae_lens_alloc.ops.feature_choice_keys import FeatureKeyEncoder
from sae_lens_alloc.ops.feature_choice_selection import (
    FeatureChoiceSelection,
    feature_key_encoder,
    select_by_feature_keys,
)
from tests.helpers import affinities_of, assert_is_selection, exact_tensors
from tests.ops.reference import ReferenceFeatureKeyEncoder

MakeEncoder = Callable[..., FeatureKeyEncoder]


@pytest.fixture(params=["reference", "triton"])
def make_encoder(request: pytest.FixtureRequest) -> MakeEncoder:
    """A FeatureKeyEncoder of exact tensors by default, with many ties."""
    # also for the reference: where the tests' tensors are
    request.getfixturevalue("triton_device")
    from sae_lens_alloc.ops.triton_feature_choice import TritonFeatureKeyEncoder

    is_reference = request.param == "reference"
    kind = ReferenceFeatureKeyEncoder if is_reference else TritonFeatureKeyEncoder

    def make(*tensors: Tensor | None, **options: Any) -> FeatureKeyEncoder:
        _, W_enc, *_ = tensors
        assert W_enc is not None
        thresholds = torch.randint(0, 8, (W_enc.shape[1],)) / 2
        limits = {"thresholds": thresholds, "cut": torch.tensor(1.5), **options}
        return kind(*tensors, **limits)  # type: ignore[arg-type]

    return make


@pytest.fixture(params=["search", "all positive"])
def small_capacity(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Just the places that are needed, or enough for all positive affinities."""
    factor = 1.0 if request.param == "search" else 100.0
    monkeypatch.setattr(feature_choice_selection, "CAPACITY_FACTOR", factor)


def assert_is_exact(
    selection: FeatureChoiceSelection,
    encoder: FeatureKeyEncoder,
    quotas: Tensor,
    max_pairs: int,
):
    affinities = affinities_of(encoder.x, encoder.W_enc, encoder.b_enc, encoder.scale)
    assert len(selection.pairs.places.values) == min(max_pairs, affinities.numel())
    assert_is_selection(selection.pairs, select_feature_choice(affinities, quotas))
    positive = affinities.clamp(min=0)
    assert torch.equal(selection.demand, (positive > encoder.cut).sum(0))
    assert torch.equal(selection.above, (positive > encoder.thresholds).sum(0))


def own_keys(encoder: FeatureKeyEncoder) -> list[list[int]]:
    """Each feature's keys without the feature, by hand: float bits above inverted tokens."""
    affinities = affinities_of(encoder.x, encoder.W_enc, encoder.b_enc, encoder.scale).T
    mask = 2 ** (len(encoder.x) - 1).bit_length() - 1
    bits = affinities.contiguous().view(torch.int32).tolist()
    return [
        [
            b * (mask + 1) + mask - token
            for token, (b, a) in enumerate(zip(row_bits, row, strict=True))
            if a > 0
        ]
        for row_bits, row in zip(bits, affinities.tolist(), strict=True)
    ]


# -- Keys


# 150 tokens and 200 features end within a tile of 128 x 64
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_scale", [True, False])
@pytest.mark.parametrize("share_chosen", [None, 0.0, 0.4, 1.0])
def test_collect_gives_the_keys_that_reach_the_bounds_and_counts(
    share_chosen: float | None,
    with_scale: bool,
    dtype: torch.dtype,
    make_encoder: MakeEncoder,
):
    torch.manual_seed(0)
    x, W_enc, b_enc, scale = exact_tensors(150, 200, dtype)
    encoder = make_encoder(x, W_enc, b_enc, scale if with_scale else None)
    share = 1.0 if share_chosen is None else share_chosen
    mask = torch.rand(200) < share
    chosen = None if share_chosen is None else mask
    # one of the feature's keys, or one that all reach or none
    all_own = own_keys(encoder)
    bounds = [
        [own[len(own) // 2] if own else 0, encoder.least_key, encoder.above_all][j % 3]
        for j, own in enumerate(all_own)
    ]
    expected = [
        (199 - j) * 2 ** (31 + 8) + key
        for j, own in enumerate(all_own)
        for key in own
        if key >= bounds[j] and mask[j]
    ]
    keys, count = torch.zeros(30000, dtype=torch.int64), torch.tensor(7)
    counts = encoder.collect(torch.tensor(bounds), keys, count, chosen)
    assert count.item() == 7 + len(expected)
    assert keys[:7].count_nonzero() == 0
    assert sorted(keys[7 : 7 + len(expected)].tolist()) == sorted(expected)
    assert keys[7 + len(expected) :].count_nonzero() == 0
    affinities = affinities_of(x, W_enc, b_enc, encoder.scale)
    positive = affinities.clamp(min=0) * mask
    reached = [sum(k >= b for k in own) for own, b in zip(all_own, bounds, strict=True)]
    assert counts.tolist() == [
        (torch.tensor(reached) * mask).tolist(),
        (positive > 0).sum(0).tolist(),
        ((positive > encoder.thresholds) & mask).sum(0).tolist(),
        ((positive > encoder.cut) & mask).sum(0).tolist(),
    ]


def test_collect_counts_what_does_not_fit(make_encoder: MakeEncoder):
    torch.manual_seed(1)
    encoder = make_encoder(*exact_tensors(150, 200))
    all_own = own_keys(encoder)
    bounds = torch.full((200,), encoder.least_key)
    keys, count = torch.zeros(70, dtype=torch.int64), torch.tensor(20)
    reached, *_ = encoder.collect(bounds, keys, count, None)
    assert reached.tolist() == [len(own) for own in all_own]
    assert count == 20 + reached.sum()
    # those that were stored are keys, each once
    stored = keys[20:]
    assert len(stored.unique()) == 50
    for feature, key in zip(
        encoder.features_of(stored).tolist(), stored.tolist(), strict=True
    ):
        assert key % 2 ** (31 + 8) in all_own[feature]
    # a full buffer stays as it is
    before = keys.clone()
    encoder.collect(bounds, keys, count, None)
    assert torch.equal(keys, before)


@pytest.mark.slow
@pytest.mark.parametrize("n_tokens", [1, 2, 150])
def test_the_search_finds_bounds_that_give_the_candidates_wanted(
    n_tokens: int, make_encoder: MakeEncoder
):
    torch.manual_seed(2)
    encoder = make_encoder(*exact_tensors(n_tokens, 200))
    all_own = own_keys(encoder)
    n_positive = torch.tensor([len(own) for own in all_own])
    fewest = torch.randint(0, n_tokens + 1, (200,)).minimum(n_positive)
    # nothing to spare for every third
    spare = torch.where(torch.arange(200) % 3 == 0, 0, 10)
    most = (fewest + spare).minimum(n_positive)
    mask = torch.rand(200) < 0.6
    bounds = encoder.find_bounds(mask, fewest, most).tolist()
    for j, own in enumerate(all_own):
        reached = sum(key >= bounds[j] for key in own)
        if mask[j]:
            assert fewest[j] <= reached <= most[j]
        else:
            assert reached == len(own)


# -- The selection


GUESSES = [0.0, 1e-6, 0.5, 1.0, 1.5, 1e6, float("inf"), float("nan"), "mixed"]


@pytest.mark.slow
@pytest.mark.usefixtures("small_capacity")
@pytest.mark.parametrize("largest_quota", [0, 1, 6, 100])
def test_the_selection_is_exact_for_any_guess(
    largest_quota: int, make_encoder: MakeEncoder
):
    torch.manual_seed(3)
    encoder = make_encoder(*exact_tensors(20, 80))
    # many ties; a quota of 100 is beyond the 20 tokens, let alone their positive affinities
    quotas = torch.randint(0, largest_quota + 1, (80,))
    max_pairs = int(quotas.sum()) + 3
    for guess in GUESSES:
        if guess == "mixed":
            guesses = torch.tensor([0.0, 0.5, 1.0, 2.5, 1e6])[torch.arange(80) % 5]
        else:
            guesses = torch.full((80,), float(guess))
        before = guesses.clone()
        selection = select_by_feature_keys(encoder, quotas, max_pairs, guesses)
        assert_is_exact(selection, encoder, quotas, max_pairs)
        assert torch.equal(guesses.nan_to_num(), before.nan_to_num())


@pytest.mark.usefixtures("small_capacity")
@pytest.mark.parametrize("n_positive", [0, 1, 13])
def test_too_few_positive_affinities_leave_padding(
    n_positive: int, make_encoder: MakeEncoder
):
    torch.manual_seed(4)
    W_enc = -torch.rand(20, 40)
    W_enc.view(-1)[torch.randperm(800)[:n_positive]] = 1.0
    encoder = make_encoder(torch.eye(20), W_enc, torch.zeros(40), None)
    quotas = torch.full((40,), 2)
    for guess in (0.0, 0.5, 1.0, 2.0):
        guesses = torch.full((40,), guess)
        selection = select_by_feature_keys(encoder, quotas, 80, guesses)
        assert_is_exact(selection, encoder, quotas, 80)


@pytest.mark.slow
@pytest.mark.usefixtures("small_capacity")
def test_equal_affinities_that_overflow_the_buffer_go_to_the_first_tokens(
    make_encoder: MakeEncoder,
):
    # 6000 ties, of which the buffer holds 4 for each feature and 3 for each quota
    encoder = make_encoder(torch.ones(150, 1), torch.ones(1, 40), torch.zeros(40), None)
    quotas = torch.arange(40) % 5
    for guess in (0.0, 1.0, 2.0):
        guesses = torch.full((40,), guess)
        selection = select_by_feature_keys(encoder, quotas, 80, guesses)
        tokens = selection.pairs.to_dense().nonzero()[:, 0]
        assert tokens.tolist() == [0] * 32 + [1] * 24 + [2] * 16 + [3] * 8
        assert_is_exact(selection, encoder, quotas, 80)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_few_short_features_are_gone_through_again_beside_the_others(
    factor: float, make_encoder: MakeEncoder, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(feature_choice_selection, "CAPACITY_FACTOR", factor)
    torch.manual_seed(5)
    exact = exact_tensors(20, 80)
    encoder = make_encoder(*exact)
    quotas = torch.randint(1, 4, (80,))
    first = select_by_feature_keys(encoder, quotas, 250, torch.zeros(80))
    guesses = first.bounds.clone()
    guesses[::9] = 1e6
    selection = select_by_feature_keys(encoder, quotas, 250, guesses)
    assert_is_exact(selection, encoder, quotas, 250)
    # their next bounds are as good as those of the others
    counts = (affinities_of(*exact) > 0).sum(0)
    assert (selection.bounds < 100)[counts > 0].all()


@pytest.mark.slow
@pytest.mark.usefixtures("small_capacity")
def test_the_selection_follows_data_that_shift(make_encoder: MakeEncoder):
    torch.manual_seed(6)
    W_enc, b_enc = torch.randn(8, 200), torch.randn(200)
    guesses = torch.zeros(200)
    # batches of other sizes and scales, one of zeros alone
    for n_tokens, size in [(30, 1), (30, 1), (9, 100), (40, 1e-3), (30, 0), (30, 1)]:
        x = size * torch.randn(n_tokens, 8)
        encoder = make_encoder(x, W_enc, b_enc, None)
        quotas = torch.randint(0, 6, (200,))
        selection = select_by_feature_keys(encoder, quotas, 1000, guesses)
        expected = select_feature_choice(x @ W_enc + b_enc, quotas)
        pairs = selection.pairs.without_padding()
        assert torch.equal(pairs.token_indices, expected.token_indices)
        assert torch.equal(pairs.feature_indices, expected.feature_indices)
        assert torch.allclose(pairs.values, expected.values, rtol=1e-4)
        guesses = selection.bounds


def test_bounds_settle_where_about_twice_the_quota_passes():
    torch.manual_seed(7)
    W_enc, quotas = torch.randn(8, 100), torch.randint(0, 20, (100,))
    bounds, never = torch.zeros(100), torch.full((100,), 1e6)
    passing: list[Tensor] = []
    for step in range(24):
        x = torch.randn(256, 8)
        if step >= 16:
            passing.append((x @ W_enc > bounds).sum(0))
        encoder = ReferenceFeatureKeyEncoder(
            x, W_enc, torch.zeros(100), None, never, never[0]
        )
        bounds = select_by_feature_keys(encoder, quotas, 2000, bounds).bounds
    mean = torch.stack(passing).float().mean(0)
    wanted = 2 * quotas + 6.0
    # those without a quota collect nothing, and leave their bounds as they are
    assert (bounds[quotas == 0] == 0).all()
    assert mean[quotas > 0].mean() == pytest.approx(
        wanted[quotas > 0].mean().item(), rel=0.25
    )


@pytest.mark.slow
def test_the_selection_is_the_same_bit_for_bit_twice_and_for_any_guess(
    make_encoder: MakeEncoder,
):
    torch.manual_seed(8)
    tensors = (torch.randn(140, 40), torch.randn(40, 100), torch.randn(100), None)
    quotas = torch.randint(0, 9, (100,))
    first = select_by_feature_keys(
        make_encoder(*tensors), quotas, 900, torch.zeros(100)
    )
    for share in (0.0, 0.9, 1.0, 1.5):
        again = select_by_feature_keys(
            make_encoder(*tensors), quotas, 900, share * first.bounds
        )
        assert torch.equal(
            first.pairs.places.token_indices, again.pairs.places.token_indices
        )
        assert torch.equal(
            first.pairs.places.feature_indices, again.pairs.places.feature_indices
        )
        assert torch.equal(first.pairs.places.values, again.pairs.places.values)


@pytest.mark.usefixtures("small_capacity")
@pytest.mark.parametrize("largest_quota", [0, 1, 6, 100])
def test_the_selection_over_groups_is_exact(
    largest_quota: int, make_encoder: MakeEncoder, monkeypatch: pytest.MonkeyPatch
):
    # 5 bits of tokens leave 5: groups of 32, 32 and 16 features
    monkeypatch.setattr(pair_keys, "GROUP_BITS", 10)
    assert len(pair_keys.feature_groups(20, 80)) == 3
    torch.manual_seed(10)
    encoder = make_encoder(*exact_tensors(20, 80))
    quotas = torch.randint(0, largest_quota + 1, (80,))
    max_pairs = int(quotas.sum()) + 3
    mixed = torch.tensor([0.0, 0.5, 1.0, 2.5, 1e6])[torch.arange(80) % 5]
    for guesses in (torch.zeros(80), mixed, torch.full((80,), 1e6)):
        selection = select_by_feature_keys(encoder, quotas, max_pairs, guesses)
        assert_is_exact(selection, encoder, quotas, max_pairs)
        # features do not compete: each group's bounds are those it has by itself
        alone = select_by_feature_keys(
            encoder.part(slice(32, 64)), quotas[32:64], max_pairs, guesses[32:64]
        )
        assert torch.equal(
            selection.bounds[32:64].nan_to_num(), alone.bounds.nan_to_num()
        )


# -- Where it is used


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_feature_choice_by_triton_is_feature_choice_by_torch(
    dtype: torch.dtype, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(9)
    x, W_enc, b_enc, scale = exact_tensors(20, 150, dtype)
    quotas, thresholds = torch.randint(0, 15, (150,)), torch.randint(0, 8, (150,)) / 2
    arguments = (x, quotas, thresholds, torch.tensor(1.5), thresholds, 1500)
    encoder = Encoder(W_enc, b_enc, scale)
    actual = encode_feature_choice(encoder, *arguments)
    monkeypatch.setenv("SAE_LENS_ALLOC_BACKEND", "torch")
    expected = encode_feature_choice(encoder, *arguments)
    assert expected.pairs.real is None
    assert len(actual.pairs.places.values) == 1500
    assert_is_selection(actual.pairs, expected.pairs)
    assert torch.equal(actual.demand, expected.demand)
    assert torch.equal(actual.above, expected.above)
    assert actual.demand.device.type == triton_device.type


@pytest.mark.usefixtures("triton_device")
def test_tensors_that_keys_cannot_hold_take_the_other_way():
    x, W_enc, b_enc, scale = exact_tensors(5, 30)
    thresholds, cut = torch.zeros(30), torch.tensor(0.0)

    def encoder(x: Tensor, W_enc: Tensor) -> FeatureKeyEncoder | None:
        return feature_key_encoder(W_enc, b_enc, scale, x, thresholds, cut)

    assert encoder(x, W_enc) is not None
    assert encoder(x.double(), W_enc.double()) is None
