"""The number of a training step, by hand."""

import torch

from sae_lens_alloc.saes.running_statistics import RunningStatistics
from sae_lens_alloc.saes.step_count import StepCount


def new_count() -> tuple[RunningStatistics, StepCount]:
    statistics = RunningStatistics(torch.device("cpu"))
    return statistics, StepCount(statistics)


def test_steps_count_from_0_and_the_last_is_known():
    statistics, count = new_count()
    assert (count.running, count.last) == (None, 0)
    assert [count.begin(n) for n in range(3)] == [0, 1, 2]
    assert (count.running, count.last) == (2, 2)
    assert statistics.n_steps == 3


def test_calls_with_the_same_number_are_parts_of_one_step():
    statistics, count = new_count()
    found = [(count.begin(n), count.continues) for n in (0, 0, 0, 1, 1, 2)]
    assert found == [
        (0, False),
        (0, True),
        (0, True),
        (1, False),
        (1, True),
        (2, False),
    ]
    assert statistics.n_steps == 3


def test_a_resumed_trainer_that_counts_one_behind_is_put_right_from_then_on():
    statistics, count = new_count()
    for n in range(13):
        count.begin(n)
    resumed, again = new_count()
    resumed.load_state_dict(statistics.state_dict())
    assert (again.running, again.last) == (None, 12)
    # SAELens saved before it counted step 12, and its trainer goes on with 12 once more
    assert [again.begin(n) for n in (12, 13, 14)] == [13, 14, 15]
    assert resumed.n_steps == 16


def test_a_resumed_trainer_that_counts_right_is_left_alone():
    statistics, count = new_count()
    for n in range(13):
        count.begin(n)
    resumed, again = new_count()
    resumed.load_state_dict(statistics.state_dict())
    assert [again.begin(n) for n in (13, 14)] == [13, 14]


def test_a_trainer_that_starts_at_0_starts_anew():
    statistics, count = new_count()
    for n in range(13):
        count.begin(n)
    resumed, again = new_count()
    resumed.load_state_dict(statistics.state_dict())
    assert [again.begin(n) for n in (0, 1)] == [0, 1]
    assert again.last == 1
