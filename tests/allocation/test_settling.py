"""When Feature Choice ends by itself, told from losses alone."""

import pytest

from sae_lens_alloc.allocation.settling import has_settled, window_start


def test_windows_follow_each_other_and_double_every_third():
    starts = [window_start(i) for i in range(10)]
    assert starts == [16, 20, 25, 32, 40, 51, 64, 81, 102, 128]


@pytest.mark.parametrize(
    ("losses", "settled"),
    [
        # exponents over a doubling: log2(8/4) = 1, log2(8/6) = 0.415
        ([8, 8, 8, 4, 6], True),
        # log2(8/5.66) = 0.5: not less than half
        ([8, 8, 8, 4, 5.65], False),
        # log2(6/4) = 0.585, then 0.434, which is 74% of it, and 0.450, which is 77%
        ([6, 6, 6, 4, 4.44], True),
        ([6, 6, 6, 4, 4.39], False),
        # nothing to compare with
        ([8, 8, 8, 7.9], False),
        ([8, 8], False),
        ([], False),
        # no loss at all, and one that grows
        ([0, 0, 0, 0, 0, 0], False),
        ([4, 4, 4, 5, 5, 5], False),
        # log2(8/7.5) = 0.09: noise of a loss that has not begun to fall; log2(8/7.4) = 0.11
        ([8, 8, 8, 7.5, 8, 8], False),
        ([8, 8, 8, 7.4, 8, 8], True),
    ],
)
def test_by_hand(losses: list[float], settled: bool):
    assert has_settled(losses) is settled


def first_settled(loss_at: list[float]) -> int | None:
    """The step at which a training with these losses would switch."""
    means: list[float] = []
    window = 0
    while (end := window_start(window + 1)) <= len(loss_at):
        start = window_start(window)
        means.append(sum(loss_at[start:end]) / (end - start))
        window += 1
        if has_settled(means):
            return end
    return None


def test_a_long_warm_up_in_which_the_loss_falls_ever_faster_is_no_end():
    """The learning rate grows for 1000 steps; then the loss falls, and levels off."""
    losses = [1 - 0.5 * min(step / 1000, 1) ** 2 for step in range(1000)]
    losses += [0.5 * (step / 1000) ** -0.9 + 0.05 for step in range(1000, 20000)]
    step = first_settled(losses)
    assert step is not None and 1600 < step < 20000


def test_a_loss_that_goes_on_falling_as_fast_does_not_settle():
    assert first_settled([100 / (step + 1) for step in range(5000)]) is None


def test_a_loss_that_hardly_falls_settles_once_it_falls_less_than_before():
    """Whatever its size: else a hard subject would keep Feature Choice for ever."""
    losses = [0.5 + 0.5 / (1 + step / 50) for step in range(2000)]
    step = first_settled(losses)
    assert step is not None and step < 500
    assert first_settled([1e-9 * loss for loss in losses]) == step
