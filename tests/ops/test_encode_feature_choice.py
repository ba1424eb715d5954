"""Blocked Feature Choice against Feature Choice of the dense affinities."""

import pytest
import torch

from sae_lens_alloc.allocation.feature_choice import select_feature_choice
from sae_lens_alloc.allocation.sparse_activations import Pairs, SparseActivations
from sae_lens_alloc.ops import block_encoder
from sae_lens_alloc.ops.block_encoder import Encoder, KnownAffinities
from sae_lens_alloc.ops.encode_select import (
    FeatureChoiceSelection,
    encode_feature_choice,
)

N_FEATURES = 150
FAR_TOO_HIGH = torch.full((N_FEATURES,), 1e6)
NO_BOUNDS = torch.zeros(N_FEATURES)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 features: two whole ones and one of 22."""
    monkeypatch.setitem(block_encoder._BLOCK_ELEMENTS, "cpu", 1)


def exact_encoder(dtype: torch.dtype = torch.float32) -> Encoder:
    """Small multiples of 1/2: affinities are exact in every dtype, with many ties."""
    return Encoder(
        (torch.randint(-2, 3, (4, N_FEATURES)) / 2).to(dtype),
        (torch.randint(-2, 3, (N_FEATURES,)) / 2).to(dtype),
        2.0 ** torch.randint(-1, 2, (N_FEATURES,)),
    )


def exact_inputs(n_tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randint(-3, 4, (n_tokens, 4)).to(dtype)


def dense_affinities(encoder: Encoder, x: torch.Tensor) -> torch.Tensor:
    """Affinities of the dense formula in float64."""
    affinities = x.double() @ encoder.W_enc.double() + encoder.b_enc.double()
    return affinities if encoder.scale is None else affinities * encoder.scale.double()


def assert_same_pairs(found: Pairs, expected: SparseActivations):
    actual = found.without_padding()
    assert actual.shape == expected.shape
    assert actual.token_indices.tolist() == expected.token_indices.tolist()
    assert actual.feature_indices.tolist() == expected.feature_indices.tolist()
    assert actual.values.tolist() == pytest.approx(expected.values.tolist(), rel=1e-5)


def assert_is_exact(
    selection: FeatureChoiceSelection,
    affinities: torch.Tensor,
    quotas: torch.Tensor,
    thresholds: torch.Tensor,
    cut: torch.Tensor,
):
    """Pairs, demand and counts above the thresholds are those of the dense affinities."""
    assert_same_pairs(selection.pairs, select_feature_choice(affinities, quotas))
    positive = affinities.clamp(min=0)
    assert selection.demand.tolist() == (positive > cut).sum(0).tolist()
    assert selection.above.tolist() == (positive > thresholds).sum(0).tolist()
    assert selection.bounds.shape == thresholds.shape
    assert (selection.bounds >= 0).all()


def bounds_of_kind(kind: str, affinities: torch.Tensor) -> torch.Tensor:
    if kind == "none":
        return NO_BOUNDS
    if kind == "far_too_high":
        return FAR_TOO_HIGH
    if kind == "mixed":
        # 0, within the affinities or far too high
        return torch.tensor([0.0, 0.5, 1.0, 2.5, 1e6])[
            torch.randint(0, 5, (N_FEATURES,))
        ]
    # the affinity of a random token, which many others equal
    token = torch.randint(0, len(affinities), (N_FEATURES,))
    chosen = affinities.gather(0, token[None])[0].clamp(min=0)
    return chosen.float()


@pytest.mark.parametrize("bounds_kind", ["none", "far_too_high", "mixed", "affinity"])
@pytest.mark.parametrize("cut", [0.0, 0.5, 2.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encode_feature_choice_selects_the_same_for_any_bounds_and_cut(
    dtype: torch.dtype, cut: float, bounds_kind: str
):
    torch.manual_seed(0)
    encoder, x = exact_encoder(dtype), exact_inputs(20, dtype)
    affinities = dense_affinities(encoder, x)
    quotas = torch.randint(0, 15, (N_FEATURES,))
    bounds = bounds_of_kind(bounds_kind, affinities)
    before = bounds.clone()
    selection = encode_feature_choice(
        encoder, x, quotas, FAR_TOO_HIGH, torch.tensor(cut), bounds, int(quotas.sum())
    )
    # no affinity reaches the thresholds, so that `above` is 0
    assert_is_exact(selection, affinities, quotas, FAR_TOO_HIGH, torch.tensor(cut))
    assert torch.equal(bounds, before)


@pytest.mark.parametrize("largest_quota", [1, 3, 30])
def test_encode_feature_choice_counts_what_is_above_the_thresholds(largest_quota: int):
    torch.manual_seed(1)
    encoder, x = exact_encoder(), exact_inputs(20)
    affinities = dense_affinities(encoder, x)
    quotas = torch.randint(0, largest_quota + 1, (N_FEATURES,))
    # many affinities equal a threshold or the cut, and are not above it
    thresholds, cut = torch.randint(0, 8, (N_FEATURES,)) / 2, torch.tensor(1.5)
    assert ((affinities == thresholds) & (affinities > 0)).sum() > 100
    assert (affinities == cut).sum() > 100
    bounds = thresholds * torch.rand(N_FEATURES)
    selection = encode_feature_choice(
        encoder, x, quotas, thresholds, cut, bounds, int(quotas.sum())
    )
    assert_is_exact(selection, affinities, quotas, thresholds, cut)


# `above` stops at the candidates. Bounds are not part of a checkpoint, so thresholds
# depend on whether a run was interrupted (see tests/saes/test_allocator.py).
@pytest.mark.parametrize("bounds_kind", ["far_too_high", "mixed", "affinity"])
def test_counts_above_the_thresholds_do_not_depend_on_the_bounds(bounds_kind: str):
    torch.manual_seed(2)
    encoder, x = exact_encoder(), exact_inputs(20)
    affinities = dense_affinities(encoder, x)
    quotas = torch.randint(0, 4, (N_FEATURES,))
    thresholds, cut = torch.full((N_FEATURES,), 0.25), torch.tensor(2.0)
    bounds = bounds_of_kind(bounds_kind, affinities)
    selection = encode_feature_choice(
        encoder, x, quotas, thresholds, cut, bounds, int(quotas.sum())
    )
    assert_is_exact(selection, affinities, quotas, thresholds, cut)


def test_encode_feature_choice_over_successive_batches():
    torch.manual_seed(3)
    encoder = exact_encoder()
    bounds, cut = NO_BOUNDS, torch.tensor(1.0)
    used_bounds = 0
    for step in range(15):
        # batches of other sizes and scales, some of zeros alone
        x = exact_inputs(int(torch.randint(1, 30, ()))) * [1, 1, 3, 0, 1][step % 5]
        affinities = dense_affinities(encoder, x)
        quotas = torch.randint(0, 6, (N_FEATURES,))
        thresholds = torch.maximum(bounds, cut) + torch.randint(0, 4, (N_FEATURES,)) / 2
        selection = encode_feature_choice(
            encoder, x, quotas, thresholds, cut, bounds, int(quotas.sum())
        )
        assert_is_exact(selection, affinities, quotas, thresholds, cut)
        bounds = selection.bounds
        used_bounds += int((bounds > 0).sum())
    # the bounds were in use
    assert used_bounds > 15 * N_FEATURES / 2


def test_bounds_settle_where_about_twice_the_quota_passes():
    torch.manual_seed(4)
    encoder = Encoder(torch.randn(8, N_FEATURES), torch.zeros(N_FEATURES), None)
    quotas = torch.randint(0, 20, (N_FEATURES,))
    bounds, cut = NO_BOUNDS, torch.tensor(1e6)
    passing: list[torch.Tensor] = []
    for step in range(24):
        x = torch.randn(256, 8)
        if step >= 16:
            passing.append((encoder.affinities(x) > bounds).sum(0))
        selection = encode_feature_choice(
            encoder, x, quotas, FAR_TOO_HIGH, cut, bounds, int(quotas.sum())
        )
        bounds = selection.bounds
    mean = torch.stack(passing).float().mean(0)
    # 2 n + 4 candidates, give or take the batches and the 10% that a bound may fall
    assert ((mean > quotas) & (mean < 3 * quotas + 20)).all()
    assert mean.mean() == pytest.approx((2 * quotas + 4).float().mean(), rel=0.25)


def test_encode_feature_choice_of_real_numbers_over_successive_batches():
    torch.manual_seed(5)
    encoder = Encoder(
        torch.randn(8, N_FEATURES),
        torch.randn(N_FEATURES),
        torch.rand(N_FEATURES) + 0.5,
    )
    bounds, cut = NO_BOUNDS, torch.tensor(4.0)
    for _ in range(6):
        x = torch.randn(64, 8)
        affinities = dense_affinities(encoder, x)
        quotas = torch.randint(0, 6, (N_FEATURES,))
        selection = encode_feature_choice(
            encoder, x, quotas, FAR_TOO_HIGH, cut, bounds, int(quotas.sum())
        )
        assert_is_exact(selection, affinities, quotas, FAR_TOO_HIGH, cut)
        bounds = selection.bounds


@pytest.mark.parametrize("bounds_kind", ["none", "far_too_high", "mixed"])
def test_encode_feature_choice_of_known_affinities(bounds_kind: str):
    torch.manual_seed(6)
    encoder, x = exact_encoder(), exact_inputs(20)
    affinities = dense_affinities(encoder, x)
    quotas = torch.randint(0, 15, (N_FEATURES,))
    thresholds, cut = torch.randint(0, 8, (N_FEATURES,)) / 2, torch.tensor(1.5)
    selection = encode_feature_choice(
        KnownAffinities(affinities.float()),
        x,
        quotas,
        thresholds,
        cut,
        bounds_of_kind(bounds_kind, affinities),
        int(quotas.sum()),
    )
    assert_is_exact(selection, affinities, quotas, thresholds, cut)


def test_encode_feature_choice_without_quotas_still_measures_demand():
    torch.manual_seed(7)
    encoder, x = exact_encoder(), exact_inputs(20)
    quotas = torch.zeros(N_FEATURES, dtype=torch.int64)
    thresholds, cut = FAR_TOO_HIGH, torch.tensor(1.0)
    selection = encode_feature_choice(
        encoder, x, quotas, thresholds, cut, FAR_TOO_HIGH, 0
    )
    assert len(selection.pairs.places.values) == 0
    assert selection.demand.sum() > 100
    affinities = dense_affinities(encoder, x)
    assert_is_exact(selection, affinities, quotas, thresholds, cut)


# as in encode_mutual_choice, what passes the slack below a bound counts towards the quota.
def test_encode_feature_choice_is_exact_where_the_quota_ends_within_the_slack():
    # In float32 both 2^20 + 0.95 and 2^20 + 1.05 are 2^20 + 1: a tie, which token 0 wins.
    # Bounds a few units above it lie between the two products, less the slack.
    encoder = Encoder(
        torch.ones(1, N_FEATURES), torch.full((N_FEATURES,), 2.0**20), None
    )
    x = torch.tensor([[0.95], [1.05]])
    assert encoder.affinities(x).unique().tolist() == [2.0**20 + 1]
    quotas = torch.ones(N_FEATURES, dtype=torch.int64)
    for eighths in range(40):
        selection = encode_feature_choice(
            encoder,
            x,
            quotas,
            torch.full((N_FEATURES,), 1e9),
            torch.tensor(1e9),
            torch.full((N_FEATURES,), 2.0**20 + eighths / 8),
            N_FEATURES,
        )
        assert selection.pairs.places.token_indices.tolist() == [0] * N_FEATURES
