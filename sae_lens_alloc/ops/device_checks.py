"""Checks of what a device computed that never make the host wait for it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class DeviceChecks:
    """
    Requirements on tensors. Those on the CPU are checked at once. What a GPU computes is
    copied as soon as it is there, and an unmet requirement is reported by the first `report`
    after that, as a rule one training step later.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[torch.Tensor, torch.cuda.Event | None, str]] = []
        self._recorded: list[tuple[torch.Tensor, str]] | None = None

    def __reduce__(self) -> tuple[type["DeviceChecks"], tuple[()]]:
        # copies of an SAE start with nothing pending; events of a device cannot be copied
        return DeviceChecks, ()

    @contextmanager
    def recorded(self) -> Iterator[list[tuple[torch.Tensor, str]]]:
        """Within it requirements are not checked but collected, as tensors and messages."""
        self._recorded = []
        try:
            yield self._recorded
        finally:
            self._recorded = None

    def require(self, met: torch.Tensor, message: str, step: int) -> None:
        """
        Args:
            met: Boolean of shape ().
            message: What to say if it is false, with {step} for the number of the step.
            step: Number of the training step.

        Raises:
            ValueError: at once, if the tensor is on the CPU and false.
        """
        if self._recorded is not None:
            self._recorded.append((met, message))
            return
        message = message.format(step=step)
        if not _is_late(met):
            if not met:
                raise ValueError(message)
            return
        copy = torch.empty_like(met, device="cpu", pin_memory=met.is_cuda)
        copy.copy_(met, non_blocking=True)
        copied = None
        if met.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self._pending.append((copy, copied, message))

    def report(self, wait: bool = False) -> None:
        """
        Raises ValueError for the first requirement known not to be met.

        Args:
            wait: For those as well that the device has not computed yet.
        """
        while self._pending:
            met, copied, message = self._pending[0]
            if copied is not None:
                if wait:
                    copied.synchronize()
                elif not copied.query():
                    return
            self._pending.pop(0)
            if not met:
                self._pending.clear()
                raise ValueError(message)


def _is_late(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda
