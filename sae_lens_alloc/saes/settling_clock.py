"""When Feature Choice has settled, where nobody tells how long a training is."""

import math
from dataclasses import dataclass

import torch
from sae_lens import logger

from sae_lens_alloc.allocation.settling import MAX_WINDOWS, has_settled, window_start
from sae_lens_alloc.saes.allocation_statistics import UNKNOWN, AllocationStatistics
from sae_lens_alloc.saes.running_statistics import Derived


@dataclass
class _Known:
    """What the host knows of the buffers; None where it has not asked."""

    settled_step: float | None = None
    n_windows: int | None = None


class SettlingClock:
    """
    Times the switch from Feature Choice to Mutual Choice by the losses of the training (see
    allocation/settling.py).

    Args:
        statistics: The statistics, which keep the losses and the decision.
    """

    def __init__(self, statistics: AllocationStatistics) -> None:
        self._statistics = statistics
        self._known = Derived(statistics, _Known)

    @property
    def settled_step(self) -> float:
        """The first step of Mutual Choice, infinite if that is not known yet."""
        known = self._known.get()
        if known.settled_step is None:
            settled = float(self._statistics.settled)
            known.settled_step = math.inf if settled == UNKNOWN else settled
        return known.settled_step

    @torch.no_grad()
    def begin_step(self, step: int) -> None:
        """
        Decides at the beginning of a step whether Feature Choice has settled. It asks the
        device only where a window ends, three times in a doubling of the steps.

        Args:
            step: The step that is about to run. 0 starts anew.
        """
        known, statistics = self._known.get(), self._statistics
        if step == 0:
            statistics.window_losses.fill_(UNKNOWN)
            statistics.settled.fill_(UNKNOWN)
            known.settled_step, known.n_windows = math.inf, 0
        if self.settled_step <= step:
            return
        if known.n_windows is None:
            known.n_windows = int((statistics.window_losses != UNKNOWN).sum())
        if step <= window_start(0):
            statistics.open_window.zero_()
        elif step >= window_start(known.n_windows + 1) and (
            known.n_windows < MAX_WINDOWS
        ):
            self._close_window(step, known.n_windows)

    @torch.no_grad()
    def note_loss(self, loss: torch.Tensor) -> None:
        """Takes note of the loss of a call, a scalar tensor."""
        self._statistics.open_window += torch.stack([loss, torch.ones_like(loss)])

    def _close_window(self, step: int, n_windows: int) -> None:
        known, statistics = self._known.get(), self._statistics
        total, count = statistics.open_window.tolist()
        statistics.open_window.zero_()
        statistics.window_losses[n_windows] = total / max(count, 1.0)
        known.n_windows = n_windows + 1
        if has_settled(statistics.window_losses[: known.n_windows].tolist()):
            statistics.settled.fill_(step)
            known.settled_step = step
            logger.info(
                "Feature Choice has brought most of what it brings: Mutual Choice allocates "
                f"from training step {step} on."
            )
