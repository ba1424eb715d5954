"""When Feature Choice has settled, where nobody tells how long a training is."""

import math
from typing import ClassVar

import torch
from sae_lens import logger
from typing_extensions import override

from sae_lens_alloc.allocation.settling import MAX_WINDOWS, has_settled, window_start
from sae_lens_alloc.saes.density_statistics import DensityState

# Neither a step nor a loss.
UNKNOWN = -1.0


class SettlingState(DensityState):
    """
    Densities and flags, and the losses by which the switch from Feature Choice to Mutual
    Choice times itself (see allocation/settling.py).

    Args:
        d_sae: Number of features F.
        density_window_tokens: Averaging window of the densities in tokens.
        device: Device of the buffers.
    """

    added_later: ClassVar[tuple[str, ...]] = ("window_losses", "open_window", "settled")

    window_losses: (
        torch.Tensor
    )  # (MAX_WINDOWS,) mean losses, UNKNOWN for windows to come
    open_window: torch.Tensor  # (2,) sum and number of the losses of the running window
    settled: (
        torch.Tensor
    )  # () first step of Mutual Choice, UNKNOWN before it is decided

    def __init__(
        self, d_sae: int, density_window_tokens: int, device: torch.device
    ) -> None:
        super().__init__(d_sae, density_window_tokens, device)
        for name, values in {
            "window_losses": torch.full((MAX_WINDOWS,), UNKNOWN),
            "open_window": torch.zeros(2),
            "settled": torch.full((), UNKNOWN),
        }.items():
            self.register_buffer(name, values.to(device))

    @override
    def _forget_derived(self) -> None:
        super()._forget_derived()
        self._settled_step: float | None = None
        self._n_windows: int | None = None

    @property
    def settled_step(self) -> float:
        """The first step of Mutual Choice, infinite if that is not known yet."""
        if self._settled_step is None:
            settled = float(self.settled)
            self._settled_step = math.inf if settled == UNKNOWN else settled
        return self._settled_step

    @torch.no_grad()
    def begin_timed_step(self, step: int) -> None:
        """
        Decides at the beginning of a step whether Feature Choice has settled. It asks the
        device only where a window ends, three times in a doubling of the steps.

        Args:
            step: The step that is about to run. 0 starts anew.
        """
        if step == 0:
            self.window_losses.fill_(UNKNOWN)
            self.settled.fill_(UNKNOWN)
            self._settled_step, self._n_windows = math.inf, 0
        if self.settled_step <= step:
            return
        if self._n_windows is None:
            self._n_windows = int((self.window_losses != UNKNOWN).sum())
        if step <= window_start(0):
            self.open_window.zero_()
        elif (
            step >= window_start(self._n_windows + 1) and self._n_windows < MAX_WINDOWS
        ):
            self._close_window(step)

    @torch.no_grad()
    def note_loss(self, loss: torch.Tensor) -> None:
        """Takes note of the loss of a call, a scalar tensor."""
        self.open_window += torch.stack([loss, torch.ones_like(loss)])

    def _close_window(self, step: int) -> None:
        assert self._n_windows is not None
        total, count = self.open_window.tolist()
        self.open_window.zero_()
        self.window_losses[self._n_windows] = total / max(count, 1.0)
        self._n_windows += 1
        if has_settled(self.window_losses[: self._n_windows].tolist()):
            self.settled.fill_(step)
            self._settled_step = step
            logger.info(
                "Feature Choice has brought most of what it brings: Mutual Choice allocates "
                f"from training step {step} on."
            )
