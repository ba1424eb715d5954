"""Signals that end a run after its step."""

import os
import signal

import pytest

from sae_lens_alloc.training.interruption import noting


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_one_process_at_once(number: int):
    noted: list[int] = []
    with pytest.raises(KeyboardInterrupt), noting(lambda: noted.append(1)):
        os.kill(os.getpid(), number)
        assert noted == [1]
        os.kill(os.getpid(), number)
    assert noted == [1]


def test_several_processes_may_get_a_signal_twice():
    noted: list[int] = []
    with noting(lambda: noted.append(1), only_once=True):
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
    assert noted == [1]
