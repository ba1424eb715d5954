import pytest

from sae_lens_alloc.allocation.schedule import aux_loss_fade, budget_per_token


def test_budget_per_token_falls_linearly_and_stays():
    # from 64 to 32 over 8 steps: 4 a step
    budgets = [budget_per_token(step, 32, 64, 8) for step in range(11)]
    assert budgets == [64, 60, 56, 52, 48, 44, 40, 36, 32, 32, 32]


def test_budget_per_token_may_be_fractional():
    assert budget_per_token(1, 0.5, 1.5, 4) == pytest.approx(1.25)


@pytest.mark.parametrize("step", [0, 1, 1000])
def test_budget_per_token_without_a_start_is_k(step: int):
    assert budget_per_token(step, 16.5, None, 0) == 16.5
    assert budget_per_token(step, 16.5, None, 100) == 16.5


def test_aux_loss_fade_is_gone_a_tenth_later():
    # 30 steps in full, then gone within 3: 2/3, 1/3, 0
    fades = [aux_loss_fade(step, 30) for step in (0, 29, 30, 31, 32, 33, 500)]
    assert fades == pytest.approx([1, 1, 2 / 3, 1 / 3, 0, 0, 0])
    assert aux_loss_fade(32, 30) == 0


@pytest.mark.parametrize("decay_start", [0, 1, 9, 19])
def test_aux_loss_fade_of_few_steps_is_off_at_once(decay_start: int):
    if decay_start > 0:
        assert aux_loss_fade(decay_start - 1, decay_start) == 1
    assert aux_loss_fade(decay_start, decay_start) == 0


def test_aux_loss_fade_without_a_start_never_fades():
    assert aux_loss_fade(0, None) == aux_loss_fade(10**9, None) == 1
