"""Statistics that training keeps beside the weights, and how a checkpoint keeps them."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, TypeVar

import torch
from typing_extensions import override

from sae_lens_alloc.compat import ModuleOfKeptDtypes

T_TOTAL = TypeVar("T_TOTAL", torch.Tensor, float, int)
T_DERIVED = TypeVar("T_DERIVED")


class RunningStatistics(ModuleOfKeptDtypes):
    """
    Buffers that every training step moves in place. They stay float32 whatever the dtype of the
    SAE, and survive SAELens' loader, which casts all tensors of a file.

    Attributes:
        tracked: Names of the buffers that every call of a step moves anew from where the step
            began.
        added_later: Names of the buffers that checkpoints of earlier versions do not have.
        totals: Sums over the calls of the running step.
        times_replaced: How often the buffers were loaded or moved to another device. What is
            derived from them is out of date where this has changed; see `Derived`.
    """

    tracked: ClassVar[tuple[str, ...]] = ()
    added_later: ClassVar[tuple[str, ...]] = ()

    n_steps: torch.Tensor  # () training steps done; see step_count.py

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("n_steps", torch.zeros((), device=device))
        self.times_replaced = 0
        self.totals = StepTotals()
        self.register_load_state_dict_post_hook(_forget_derived_after_loading)

    def forget_derived(self) -> None:
        """Drops what is derived from the buffers: they were replaced."""
        self.times_replaced += 1
        self.totals = StepTotals()

    @override
    def after_moving(self) -> None:
        self.forget_derived()

    def begin_totals(self) -> None:
        """Starts the sums over the calls of a step from the statistics as they are now."""
        self.totals.begin({name: getattr(self, name) for name in self.tracked})

    def write_checkpoint(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Puts the buffers into an SAE's state dict, so that they survive SAELens' loader."""
        for name, buffer in self.named_buffers():
            if buffer.is_floating_point():
                state_dict[prefix + name] = _as_bytes(buffer)

    def read_checkpoint(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Undoes `write_checkpoint` in a state dict that was loaded."""
        for name, buffer in self.named_buffers():
            key = prefix + name
            if key not in state_dict:
                if name in self.added_later:
                    state_dict[key] = buffer
                continue
            if buffer.is_floating_point():
                state_dict[key] = _from_bytes(state_dict[key])
            state_dict[key] = state_dict[key].to(buffer.dtype)


class StepTotals:
    """
    Sums over the calls of one training step.

    Attributes:
        start: The running statistics as they were before the step, by name, kept in place.
    """

    def __init__(self) -> None:
        self.start: dict[str, torch.Tensor] = {}
        self._sums: dict[str, Any] = {}

    def begin(self, statistics: Mapping[str, torch.Tensor]) -> None:
        """Begins a step at the given running statistics."""
        self._sums.clear()
        for name, value in statistics.items():
            self.start[name] = kept_in_place(self.start.get(name), value)

    def add(self, name: str, value: T_TOTAL) -> T_TOTAL:
        """Adds what a call has found, and returns the sum over the calls so far."""
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        return self._sums[name]


class Derived(Generic[T_DERIVED]):
    """
    What is derived from statistics, or only makes a step faster. It is made anew after the
    statistics were replaced.

    Args:
        statistics: The statistics.
        make: Makes it empty.
    """

    def __init__(
        self, statistics: RunningStatistics, make: Callable[[], T_DERIVED]
    ) -> None:
        self._statistics = statistics
        self._make = make
        self._value = make()
        self._times_replaced = statistics.times_replaced

    def get(self) -> T_DERIVED:
        """What was derived so far, or a new and empty one."""
        if self._times_replaced != self._statistics.times_replaced:
            self._value = self._make()
            self._times_replaced = self._statistics.times_replaced
        return self._value


def kept_in_place(kept: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    """
    The tensor that keeps a value: the old one with the new value, or a first one. What outlives
    a step stays at its address, as a CUDA graph needs it.
    """
    return value.clone() if kept is None else kept.copy_(value)


def remove_statistics(state_dict: dict[str, Any], prefix: str) -> None:
    """Takes out of a state dict what inference has no use for."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        del state_dict[name]


def _forget_derived_after_loading(statistics: RunningStatistics, _: Any) -> None:
    statistics.forget_derived()


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """
    A float32 tensor as its four bytes, shape (4, *shape). Numbers up to 255 are exact in every
    dtype of an SAE. So it survives SAELens' loader, which casts all tensors of a file to the
    dtype of the weights.
    """
    as_bytes = tensor.flatten().view(torch.uint8).view(-1, 4)
    return as_bytes.T.contiguous().reshape(4, *tensor.shape).float()


def _from_bytes(stored: torch.Tensor) -> torch.Tensor:
    """
    What `_as_bytes` made of a tensor. Earlier versions stored three bfloat16 numbers that sum
    to it, shape (3, *shape).
    """
    if len(stored) == 3:
        return stored.float().sum(0)
    as_bytes = stored.reshape(4, -1).to(torch.uint8).T.flatten()
    return as_bytes.view(torch.float32).reshape(stored.shape[1:])
