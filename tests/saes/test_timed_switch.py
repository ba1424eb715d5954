"""Without steps, Feature Choice ends by itself: in SAELens' own trainer, and when resumed."""

import copy
from typing import Any

import pytest
import torch

from sae_lens_alloc.allocation.settling import has_settled, window_start
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from tests.saes.conftest import make_sae, tokens, training_step

N_STEPS = 220


def timed(**settings: Any) -> AllocationTrainingSAE[Any]:
    return make_sae(
        settings.pop("architecture", "mutual_choice"),
        d_in=16,
        feature_choice_steps=None,
        **settings,
    )


def train(
    sae: AllocationTrainingSAE[Any], steps: range, n_parts: int = 1
) -> list[tuple[str, float]]:
    """Rules and losses of some steps of a training that learns fast and then levels off."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-2)
    basis = tokens(24, 16, seed=99)
    found: list[tuple[str, float]] = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        active = torch.rand(64, 24, generator=generator) < 0.1
        x = (active * torch.rand(64, 24, generator=generator)) @ basis
        optimizer.zero_grad()
        losses: list[float] = []
        for part in x.chunk(n_parts):
            output = training_step(sae, part, step)
            output.loss.backward()
            losses.append(output.losses["mse_loss"].item())
        found.append((sae.rule_at(step), sum(losses) / n_parts))
        optimizer.step()
    return found


def switch_of(found: list[tuple[str, float]]) -> int:
    """The first step of Mutual Choice, after which there is no way back."""
    rules = [rule for rule, _ in found]
    step = rules.index("mutual")
    assert rules == ["feature"] * step + ["mutual"] * (len(rules) - step)
    return step


@pytest.mark.parametrize("n_parts", [1, 2])
def test_the_switch_is_where_the_losses_say(n_parts: int):
    sae = timed()
    found = train(sae, range(N_STEPS), n_parts)
    losses = [loss for _, loss in found]
    means: list[float] = []
    expected = None
    for window in range(30):
        start, end = window_start(window), window_start(window + 1)
        means.append(sum(losses[start:end]) / (end - start))
        if has_settled(means):
            expected = end
            break
    assert expected is not None and 16 < expected < N_STEPS
    assert switch_of(found) == expected
    assert sae.allocation.settled == expected


@pytest.mark.parametrize("at", [50, 64, 65, 200])
def test_a_resumed_training_switches_at_the_same_step(at: int):
    sae = timed()
    expected = switch_of(train(sae, range(N_STEPS)))
    first = timed()
    train(first, range(at))
    resumed = timed()
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    for one in (first, resumed):
        assert one.settling.settled_step == (
            expected if at > expected else float("inf")
        )
    rules = [rule for rule, _ in train(resumed, range(at, N_STEPS))]
    again = [rule for rule, _ in train(first, range(at, N_STEPS))]
    assert rules == again


def test_a_training_that_starts_at_0_starts_the_switch_anew():
    sae = timed()
    switch_of(train(sae, range(N_STEPS)))
    training_step(sae, tokens(8, 16), 0)
    assert sae.rule_at(0) == "feature"
    assert sae.settling.settled_step == float("inf")


def test_steps_that_are_given_hold():
    sae = make_sae(feature_choice_steps=7, d_in=16)
    assert switch_of(train(sae, range(40))) == 7
    assert sae.settling.settled_step == float("inf")


def test_a_look_at_the_sae_decides_nothing():
    sae = timed()
    train(sae, range(60))
    before = copy.deepcopy(sae.state_dict())
    sae.train()
    sae.encode(tokens(8, 16))
    sae.autoencode_pairs(tokens(8, 16), by_threshold=False)
    for name, value in sae.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_checkpoint_from_before_the_switch_timed_itself_can_be_loaded():
    sae = make_sae(feature_choice_steps=7, d_in=16)
    train(sae, range(10))
    state = sae.state_dict()
    sae.process_state_dict_for_saving(state)
    for name in ("window_losses", "open_window", "settled"):
        del state[f"allocation.{name}"]
    resumed = make_sae(feature_choice_steps=7, d_in=16)
    resumed.process_state_dict_for_loading(state)
    resumed.load_state_dict(state)
    assert resumed.rule_at(6) == "feature" and resumed.rule_at(7) == "mutual"
