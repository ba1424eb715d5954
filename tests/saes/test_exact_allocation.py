"""Running statistics may cost time. They never change who is active."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae_lens_alloc.allocation.feature_choice import select_feature_choice
from sae_lens_alloc.allocation.mutual_choice import select_mutual_choice
from sae_lens_alloc.allocation.quotas import take_whole_quotas
from sae_lens_alloc.allocation.sparse_activations import Pairs
from sae_lens_alloc.ops.backend import BACKEND_VARIABLE
from sae_lens_alloc.ops.block_encoder import Encoder
from sae_lens_alloc.saes.allocation_statistics import AllocationStatistics
from sae_lens_alloc.saes.allocator import Allocator
from tests.helpers import affinities_of, exact_tensors, stored_pairs
from tests.saes.conftest import active_mask, make_sae, training_step

B, F = 24, 40

# of thresholds, cuts and what else a state may have come to, ordinary and not
SCALES = st.sampled_from([0.0, 1e-30, 1e-3, 0.5, 1.0, 3.0, 100.0, 1e30, float("inf")])
CUTS = st.one_of(SCALES, st.sampled_from([float("nan"), -1.0]))


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton":
        request.getfixturevalue("triton_device")
    monkeypatch.setenv(BACKEND_VARIABLE, request.param)
    return request.param


def any_state(data: st.DataObject) -> Allocator:
    """An allocator in a state that some training may have left, or that nothing sane has."""
    state = AllocationStatistics(F, 1000, torch.device("cpu"))
    allocator = Allocator(state, 0.6, 0.0)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    random = torch.rand(4, F, generator=generator)
    state.threshold.copy_(random[0] * data.draw(SCALES))
    state.threshold[random[3] < data.draw(st.sampled_from([0.0, 0.3]))] = data.draw(
        st.sampled_from([0.0, float("inf")])
    )
    state.cut.fill_(data.draw(CUTS))
    state.density.copy_(random[1] ** data.draw(st.sampled_from([1, 8])))
    state.density_tokens.fill_(data.draw(st.sampled_from([0.0, 1e6])))
    state.quota_carry.copy_(random[2])
    if data.draw(st.booleans()):
        allocator.guesses.margin_cut = torch.tensor(data.draw(CUTS))
        allocator.guesses.bounds = random[3] * data.draw(SCALES)
    return allocator


def any_encoder(data: st.DataObject) -> tuple[Encoder, torch.Tensor, torch.Tensor]:
    """Encoder, inputs and their affinities, which are exact in every dtype, with many ties."""
    torch.manual_seed(data.draw(st.integers(0, 999)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    x, W_enc, b_enc, scale = exact_tensors(B, F, dtype)
    x = x * data.draw(st.sampled_from([1, -1, 0]))
    b_enc = b_enc - data.draw(st.sampled_from([0, 2, 16]))
    return Encoder(W_enc, b_enc, scale), x, affinities_of(x, W_enc, b_enc, scale)


def dense(pairs: Pairs | None) -> torch.Tensor:
    return torch.zeros(B, F) if pairs is None else pairs.to_dense()


@pytest.mark.slow
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    data=st.data(),
    budget=st.integers(0, 200),
    n_margin=st.integers(0, 200),
    previous=st.sampled_from(["mutual", "feature", None]),
)
def test_the_largest_are_active_and_the_next_are_the_margin_in_any_state(
    backend: str, data: st.DataObject, budget: int, n_margin: int, previous: Any
):
    allocator = any_state(data)
    encoder, x, affinities = any_encoder(data)
    for step in range(2):
        pairs, margin = allocator.allocate(
            encoder, x, budget, "mutual", previous if step == 0 else "mutual", n_margin
        )
        expected = select_mutual_choice(affinities, budget)
        assert stored_pairs(pairs) == stored_pairs(expected)
        both = select_mutual_choice(affinities, budget + n_margin).to_dense()
        found = None if margin is None else margin.pairs
        assert torch.equal(dense(found), both - expected.to_dense())


@pytest.mark.slow
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    data=st.data(),
    budget=st.integers(1, 200),
    previous=st.sampled_from(["mutual", "feature", None]),
)
def test_every_feature_gets_its_best_tokens_in_any_state(
    backend: str, data: st.DataObject, budget: int, previous: Any
):
    allocator = any_state(data)
    state = allocator.statistics
    encoder, x, affinities = any_encoder(data)
    for step in range(2):
        if step == 0 and previous == "mutual":
            allocator.quotas.anchor_law(1 / (100 * B))
        quotas, at_most = allocator.quotas.of(state.density, B, budget)
        owed = take_whole_quotas(quotas, state.quota_carry.clone(), at_most)
        pairs, _ = allocator.allocate(
            encoder, x, budget, "feature", previous if step == 0 else "feature"
        )
        expected = select_feature_choice(affinities, owed)
        assert stored_pairs(pairs) == stored_pairs(expected)
    # a factor would never leave them
    assert not (state.threshold.isinf() & state.cut.isfinite()).any()


@pytest.mark.parametrize("margin", [0.05, 0.25, 1.0])
@pytest.mark.parametrize("change", ["negated", "shuffled", "shifted", "as before"])
def test_a_batch_of_another_kind_uses_up_its_budget(change: str, margin: float):
    """
    After training with lowered thresholds, whose pairs once were chosen by affinity over
    threshold: a batch of negated activations then activated 2,645 of 32,768.
    """
    sae = make_sae(
        d_in=16, d_sae=256, k=4, selection_margin=margin, feature_choice_steps=0
    )
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.1, 2, 16)
    mean = torch.linspace(-1, 3, 16)

    def batch() -> torch.Tensor:
        return mean + spread * torch.randn(64, 16, generator=generator)

    for step in range(300):
        training_step(sae, batch(), step)
    assert (sae.allocation.threshold < 0.7 * sae.allocation.cut).any()
    x = batch()
    x = {
        "negated": -x,
        "shuffled": x[:, torch.randperm(16, generator=generator)],
        "shifted": x + 2,
        "as before": x,
    }[change]
    with torch.no_grad():
        affinities = sae.encoder().affinities(sae.process_sae_in(x))
    output = training_step(sae, x, 300)
    expected = select_mutual_choice(affinities, 4 * 64)
    assert len(expected.values) == 256
    assert torch.equal(active_mask(output), expected.to_dense() != 0)
