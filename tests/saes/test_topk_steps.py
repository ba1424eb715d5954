"""The way from TopK, with k features for each token, to Mutual Choice."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_alloc import MutualChoiceTrainingSAEConfig
from sae_lens_alloc.allocation.token_share import share_at, token_factors
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from tests.saes.conftest import (
    active_mask,
    assert_grads_equal,
    gradients,
    make_sae,
    mutual_mask,
    selection_gradient,
    tokens,
    top_k_mask,
    training_step,
)

B, K, F = 16, 3, 32


def affinities_of(sae: AllocationTrainingSAE[Any], x: torch.Tensor) -> torch.Tensor:
    affinities = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    return (affinities * sae.W_dec.norm(dim=1)).detach()


def relative(affinities: torch.Tensor, share: float) -> torch.Tensor:
    """The affinities relative to the K-th largest of their token, by hand."""
    kth = affinities.sort(dim=1, descending=True).values[:, K - 1 : K]
    assert (kth > 0).all()
    return affinities * (kth.mean() / kth) ** share


def test_share_falls_from_1_to_0():
    assert [share_at(step, 4) for step in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]
    assert share_at(0, 0) == 0  # no way at all: Mutual Choice from the start


def test_factors_by_hand():
    kth = torch.tensor([2.0, 4.0, 6.0], dtype=torch.float64)
    expected = torch.tensor([2.0, 1.0, 2 / 3], dtype=torch.float64)
    torch.testing.assert_close(token_factors(kth, 1.0), expected)
    torch.testing.assert_close(token_factors(kth, 0.5), expected.sqrt())
    assert token_factors(torch.tensor([-1.0, 2.0]), 1.0).isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_first_step_activates_the_pairs_of_topk(
    backend: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SAE_LENS_ALLOC_BACKEND", backend)
    sae = make_sae(k=K, topk_steps=10)
    for seed in range(5):
        x = 3 * tokens(B, 8, seed=seed)
        expected = top_k_mask(affinities_of(sae, x), list(range(F)), K)
        output = training_step(sae, x, 0)
        assert torch.equal(active_mask(output), expected)
        acts = (affinities_of(sae, x) * expected).float()
        torch.testing.assert_close(output.feature_acts.to_dense(), acts)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), step=st.integers(0, 12), margin=st.booleans())
def test_step_equals_the_dense_formulas(seed: int, step: int, margin: bool):
    sae = make_sae(
        seed=seed % 7,
        k=K,
        topk_steps=10,
        dtype="float64",
        selection_margin=float(margin),
    )
    x = 3 * tokens(B, 8, seed=seed, dtype=torch.float64)
    weights = {
        name: value.detach().clone().requires_grad_()
        for name, value in sae.named_parameters()
    }
    inputs = x - weights["b_dec"]
    pre_acts = inputs @ weights["W_enc"] + weights["b_enc"]
    norms = weights["W_dec"].norm(dim=1).detach()
    scaled = relative((pre_acts * norms).detach(), max(0.0, 1 - step / 10))
    factors = (scaled / (pre_acts * norms).detach())[:, :1]

    def error(mask: torch.Tensor) -> torch.Tensor:
        out = (pre_acts * mask) @ weights["W_dec"] + weights["b_dec"]
        return (out - x).pow(2).sum() / B

    mask = mutual_mask(scaled, K * B)
    loss = error(mask)
    if margin:
        gradient = selection_gradient(scaled, K * B, K * B, lambda m: error(m).item())
        loss = loss + (gradient * factors * norms * pre_acts).sum()
    expected = torch.autograd.grad(loss, list(weights.values()))

    output = training_step(sae, x, step)
    assert torch.equal(active_mask(output), mask)
    found = gradients(sae, output.loss)
    assert_grads_equal(found, dict(zip(weights, expected, strict=True)), rtol=1e-7)


def test_preview_is_the_step_to_come_and_hooks_see_it():
    sae = make_sae(k=K, topk_steps=10)
    x = 3 * tokens(B, 8)
    expected = top_k_mask(affinities_of(sae, x), list(range(F)), K)
    pairs, _ = sae.autoencode_pairs(x, by_threshold=False)
    assert torch.equal(pairs.to_dense() != 0, expected)
    assert torch.equal(sae.encode(x) != 0, expected)
    sae.hook_sae_acts_post.add_hook(lambda tensor, *, hook: tensor)  # noqa: ARG005
    assert torch.equal(active_mask(training_step(sae, x, 0)), expected)


def test_after_the_way_it_is_mutual_choice():
    sae, plain = make_sae(k=K, topk_steps=4), make_sae(k=K)
    for step in range(8):
        x = 3 * tokens(B, 8, seed=step)
        found, expected = training_step(sae, x, step), training_step(plain, x, step)
        same = torch.equal(active_mask(found), active_mask(expected))
        assert same == (step >= 4)


@pytest.mark.parametrize(
    "overrides", [{"feature_choice_steps": 5}, {"k_start": 6.0, "k_decay_steps": 5}]
)
def test_what_does_not_start_from_topk_is_refused(overrides: dict[str, Any]):
    with pytest.raises(ValueError, match="topk_steps .*k features for each token"):
        MutualChoiceTrainingSAEConfig(d_in=8, d_sae=F, k=K, topk_steps=5, **overrides)
    cfg = MutualChoiceTrainingSAEConfig(d_in=8, d_sae=F, k=K, topk_steps=5)
    assert cfg.feature_choice_steps == 0
    with pytest.raises(ValueError, match="topk_steps"):
        MutualChoiceTrainingSAEConfig(d_in=8, d_sae=F, k=K, topk_steps=-1)
