import math

import pytest
import torch

from sae_lens_alloc.allocation.thresholds import follow_cut, track_threshold


def test_track_threshold_by_hand():
    thresholds = torch.tensor([2.0, 2.0, 2.0, 2.0, 2.0, 0.5])
    counts = torch.tensor([12, 8, 10, 100, 0, 0])
    # (count - target) / target: 0.2, -0.2, 0, 9 (clipped to 3), -1, and for a target of 0.25
    # (count - target) / 1 = -0.25
    targets = torch.tensor([10.0, 10.0, 10.0, 10.0, 10.0, 0.25])
    expected = [
        2 * math.exp(0.05 * 0.2),
        2 * math.exp(-0.05 * 0.2),
        2.0,
        2 * math.exp(0.05 * 3),
        2 * math.exp(-0.05),
        0.5 * math.exp(-0.05 * 0.25),
    ]
    tracked = track_threshold(thresholds, counts, targets)
    assert tracked.tolist() == pytest.approx(expected)
    # the thresholds themselves stay
    assert thresholds[0] == 2.0


def test_track_threshold_of_one_threshold_and_a_number():
    # (40 - 32) / 32 = 0.25
    tracked = track_threshold(torch.tensor(3.0), torch.tensor(40), 32)
    assert tracked.shape == ()
    assert tracked.dtype == torch.float32
    assert tracked.item() == pytest.approx(3 * math.exp(0.05 * 0.25))


def test_track_threshold_stays_positive():
    tracked = torch.tensor([1e-3])
    for _ in range(200):
        tracked = track_threshold(tracked, torch.tensor([0]), torch.tensor([5.0]))
    # 200 steps of exp(-0.05)
    assert tracked.item() == pytest.approx(1e-3 * math.exp(-10), rel=1e-3)


@pytest.mark.parametrize("start", [0.3, 1.0, 3.0])
def test_track_threshold_converges_to_the_quantile(start: float):
    torch.manual_seed(0)
    n_tokens = 2048
    # P(affinity > t) = exp(-t), so that `target` of n exceed t = log(n / target)
    targets = torch.tensor([16.0, 64.0, 512.0])
    quantiles = (n_tokens / targets).log()
    thresholds = start * quantiles
    late: list[torch.Tensor] = []
    for step in range(700):
        affinities = torch.empty(n_tokens, 1).exponential_()
        thresholds = track_threshold(
            thresholds, (affinities > thresholds).sum(0), targets
        )
        if step >= 200:
            late.append(thresholds)
    assert torch.stack(late).mean(0).tolist() == pytest.approx(
        quantiles.tolist(), rel=0.02
    )


def test_follow_cut_averages_geometrically():
    # log(1.05) = 0.049 is within 0.1: 5% of the way
    followed = follow_cut(torch.tensor(2.0), torch.tensor(2.1))
    assert followed.item() == pytest.approx(2 * 1.05**0.05)
    followed = follow_cut(torch.tensor(2.0), torch.tensor(1.9))
    assert followed.item() == pytest.approx(2 * 0.95**0.05)
    assert follow_cut(torch.tensor(2.0), torch.tensor(2.0)).item() == 2.0


@pytest.mark.parametrize("batch_cut", [2.25, 1.75, 200.0, 1e-6])
def test_follow_cut_jumps_to_a_cut_far_away(batch_cut: float):
    # log(2.25 / 2) = 0.118, log(1.75 / 2) = -0.134
    followed = follow_cut(torch.tensor(2.0), torch.tensor(batch_cut))
    assert followed.item() == pytest.approx(batch_cut, rel=1e-5)


def test_follow_cut_jumps_from_a_log_ratio_of_a_tenth_on():
    near, far = 2 * math.exp(0.0999), 2 * math.exp(0.1001)
    followed = follow_cut(torch.tensor(2.0), torch.tensor(near))
    assert followed.item() == pytest.approx(2 * math.exp(0.05 * 0.0999))
    followed = follow_cut(torch.tensor(2.0), torch.tensor(far))
    assert followed.item() == pytest.approx(far)
