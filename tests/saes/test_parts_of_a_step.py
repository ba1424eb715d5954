"""Several forward passes in one training step: statistics follow the step, not the call."""

import copy
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainingSAE

from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from tests.saes.conftest import (
    ARCHITECTURES,
    changed,
    make_sae,
    state_of,
    tokens,
    training_step,
)

B, D_IN = 32, 8


def batch(step: int) -> torch.Tensor:
    return tokens(B, D_IN, seed=step)


def trained(architecture: str, n_steps: int, **settings: Any) -> Any:
    sae = make_sae(architecture, **settings)
    for step in range(n_steps):
        training_step(sae, batch(step), step)
    return sae


def statistics(sae: TrainingSAE[Any]) -> dict[str, torch.Tensor]:
    assert isinstance(sae, AllocationTrainingSAE)
    return {name: value.clone() for name, value in sae.allocation.named_buffers()}


def in_parts(sae: Any, x: torch.Tensor, step: int, n_parts: int = 2) -> None:
    for part in x.chunk(n_parts):
        training_step(sae, part, step)


FEATURE = ("feature_choice", {})
MUTUAL = ("mutual_choice", {"selection_margin": 1.0, "feature_choice_steps": 0})
RULES = pytest.mark.parametrize(("architecture", "settings"), [FEATURE, MUTUAL])


def test_feature_choice_of_two_parts_is_counted_as_that_of_the_whole_batch():
    """
    Quotas add up and each part is counted above the thresholds of the step's beginning. Who
    is active differs: a feature takes its best tokens of each part.
    """
    whole, parts = (trained("feature_choice", 5) for _ in range(2))
    training_step(whole, batch(5), 5)
    in_parts(parts, batch(5), 5)
    expected, found = statistics(whole), statistics(parts)
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_mutual_choice_of_two_parts_by_hand():
    sae = trained("mutual_choice", 5, feature_choice_steps=0)
    start, x = statistics(sae), batch(5)
    cuts, counts = [], []
    for part in x.chunk(2):
        output = training_step(copy.deepcopy(sae), part, 5)
        acts = output.feature_acts.to_dense()
        cuts.append(acts[acts > 0].min())
        counts.append((acts > 0).sum(0))
    in_parts(sae, x, 5)
    found = statistics(sae)
    # once a step: 5% of the way from where the step began, or all of it beyond 10%
    difference = (sum(cuts) / 2 / start["cut"]).log()
    rate = 1.0 if difference.abs() > 0.1 else 0.05
    torch.testing.assert_close(found["cut"], start["cut"] * (rate * difference).exp())
    # an exact mean: the window is far from full
    torch.testing.assert_close(
        found["density"], (start["density"] * 5 * B + sum(counts)) / (6 * B)
    )
    assert found["density_tokens"] == 6 * B
    assert found["n_steps"] == 6


@RULES
def test_a_second_look_at_the_same_step_moves_nothing_twice(
    architecture: str, settings: dict[str, Any]
):
    """A probe in training mode with the batch of the step: twice the same tokens."""
    once, twice = (trained(architecture, 5, **settings) for _ in range(2))
    training_step(once, batch(5), 5)
    for _ in range(2):
        training_step(twice, batch(5), 5)
    # what is sought twice in twice the tokens is found at the same place
    torch.testing.assert_close(statistics(twice)["cut"], statistics(once)["cut"])


def test_the_law_is_fitted_once_at_the_change_of_rule():
    sae = trained("feature_choice", 40, mutual_choice_steps=40, d_sae=64)
    first, *others = batch(40).chunk(4)
    training_step(sae, first, 40)
    law = sae.allocation.quota_law.clone()
    assert law.tolist() != [1, 16]
    for part in others:
        training_step(sae, part, 40)
    assert torch.equal(sae.allocation.quota_law, law)


def test_thresholds_restart_once_at_the_change_of_rule():
    sae = trained("feature_choice", 20, mutual_choice_steps=20)
    cut = sae.allocation.cut.clone()
    in_parts(sae, batch(20), 20, n_parts=4)
    # a restart at each part would leave all within one move of the running cut
    moved = (sae.allocation.threshold / cut).log().abs()
    whole = trained("feature_choice", 20, mutual_choice_steps=20)
    training_step(whole, batch(20), 20)
    expected = (whole.allocation.threshold / cut).log().abs()
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)


def test_flags_of_the_auxiliary_loss_are_renewed_once_a_step():
    sae = trained("mutual_choice", 10, aux_loss="aux_zipf", feature_choice_steps=0)
    training_step(sae, batch(10), 10)
    flags = sae.allocation.underused.clone()
    dead = torch.ones(32, dtype=torch.bool)
    training_step(sae, batch(10), 10, dead=dead)
    assert torch.equal(sae.allocation.underused, flags)
    training_step(sae, batch(20), 20, dead=dead)
    assert sae.allocation.underused.all()


def test_gradients_of_two_parts_add_up():
    """The memory of the last step's gradients is handed out once."""
    parts, apart = (trained("mutual_choice", 3, feature_choice_steps=0) for _ in "12")
    halves = batch(3).chunk(2)
    for half in halves:
        training_step(parts, half, 3).loss.backward()
    total = [torch.zeros_like(p) for p in apart.parameters()]
    for half in halves:
        apart.zero_grad()
        training_step(apart, half, 3).loss.backward()
        for sum_, p in zip(total, apart.parameters(), strict=True):
            sum_ += 0 if p.grad is None else p.grad
    for sum_, p in zip(total, parts.parameters(), strict=True):
        torch.testing.assert_close(p.grad, sum_)


@RULES
def test_a_step_that_was_saved_and_loaded_begins_anew(
    architecture: str, settings: dict[str, Any]
):
    """Between two steps nothing but the buffers counts."""
    sae = trained(architecture, 6, **settings)
    resumed = make_sae(architecture, **settings)
    resumed.load_state_dict(sae.state_dict())
    for one in (sae, resumed):
        in_parts(one, batch(6), 6)
    for name, value in statistics(sae).items():
        assert torch.equal(statistics(resumed)[name], value), name


# -- What else a step may be given


@pytest.mark.parametrize("architecture", ["mutual_choice", "feature_choice"])
@pytest.mark.parametrize("shape", [(0, 8), (0, 4, 8), (4, 0, 8)])
def test_a_batch_of_no_tokens_is_refused_and_changes_nothing(
    architecture: str, shape: tuple[int, ...]
):
    sae = trained(architecture, 2)
    before = statistics(sae)
    with pytest.raises(ValueError, match="step 2 holds no tokens"):
        training_step(sae, torch.zeros(shape), 2)
    for name, value in statistics(sae).items():
        assert torch.equal(before[name], value)
    sae.eval()
    assert sae(torch.zeros(shape)).shape == shape
    sae.train()
    assert sae.encode(torch.zeros(shape)).shape == (*shape[:-1], 32)


def test_float16_weights_whose_sum_overflows_have_not_diverged():
    sae = make_sae(dtype="float16", d_in=64, d_sae=64)
    with torch.no_grad():
        sae.W_enc.fill_(20.0)  # the sum is 81,920, and the largest float16 65,504
    x = tokens(16, 64).half() / 64
    output = training_step(sae, x)
    assert torch.isfinite(output.loss)
    with torch.no_grad():
        sae.W_enc[3, 5] = float("nan")
    with pytest.raises(ValueError, match="The weights contain NaN or Inf"):
        training_step(sae, x, 1)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("weight", ["W_enc", "b_enc", "W_dec"])
def test_one_weight_out_of_range_is_noticed(weight: str, bad: float):
    sae = make_sae()
    with torch.no_grad():
        getattr(sae, weight).flatten()[7] = bad
    with pytest.raises(ValueError, match="The weights contain NaN or Inf"):
        training_step(sae, tokens(16, 8))


def test_a_copy_does_not_carry_the_gradient_memory():
    sae = make_sae()
    training_step(sae, tokens(16, 8)).loss.backward()
    sae.gradient_memory.keep(sae.W_enc, sae.W_dec)
    assert sae.gradient_memory.W_enc is not None
    copied = copy.deepcopy(sae)
    assert copied.gradient_memory.W_enc is None
    assert copied.gradient_memory.W_dec is None
    assert sae.gradient_memory.W_enc is not None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_copy_of_an_sae_has_statistics_of_its_own(architecture: str):
    """What allocates, counts and times goes by the copy's statistics, not by the original's."""
    sae = trained(architecture, 4, aux_loss="aux_zipf", selection_margin=1.0)
    expected = trained(architecture, 6, aux_loss="aux_zipf", selection_margin=1.0)
    before, copied = state_of(sae), copy.deepcopy(sae)
    for step in (4, 5):
        training_step(copied, batch(step), step)
    assert changed(before, sae) == set()
    assert changed(state_of(expected), copied) == set()
