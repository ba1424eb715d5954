"""What a CUDA graph is on a GPU, on a CPU: operations recorded, and run again on the same tensors."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction
from typing_extensions import override


def tensors_in(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class OperationRecording:
    """
    Records what torch and Triton's interpreter compute. Nothing that existed before is changed
    by recording, as nothing is on a GPU. An operation that asks the device for a number, or
    whose result has another shape when it is replayed, is an error.
    """

    replays = 0  # of all recordings together

    def __init__(self) -> None:
        self._operations: list[Callable[[], None]] = []
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        launch = InterpretedFunction.run

        def recorded_launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():
                self.keep(tensors_in((args, kwargs)))
                launch(kernel, *args, **kwargs)
            self._operations.append(lambda: launch(kernel, *args, **kwargs))

        try:
            with pytest.MonkeyPatch.context() as patch, _Records(self):
                patch.setattr(InterpretedFunction, "run", recorded_launch)
                yield
        finally:
            for alive, content in self._before.values():
                alive.copy_(content)

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """Keeps what tensors hold that an operation may overwrite."""
        for tensor in tensors:
            if tensor.is_sparse or tensor.numel() == 0:
                continue
            whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self._before.setdefault(storage(tensor), (whole, whole.clone()))

    def add(
        self, func: Any, args: Any, kwargs: Any, results: list[torch.Tensor]
    ) -> None:
        given = {storage(t) for t in tensors_in((args, kwargs)) if not t.is_sparse}

        def run() -> None:
            for old, new in zip(
                results, tensors_in(func(*args, **kwargs)), strict=True
            ):
                assert old.shape == new.shape, f"{func} has another shape than recorded"
                # what shares the memory of an argument is changed with it
                if not old.is_sparse and old.numel() and storage(old) not in given:
                    old.copy_(new)

        self._operations.append(run)

    def replay(self) -> None:
        OperationRecording.replays += 1
        with torch.no_grad():
            for operation in self._operations:
                operation()


class _Records(TorchDispatchMode):
    def __init__(self, recording: OperationRecording) -> None:
        super().__init__()
        self._recording = recording

    @override
    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.data_dependent_output in func.tags:
            raise AssertionError(f"{func} asks the device")
        if func._schema.is_mutable:
            self._recording.keep(tensors_in((args, kwargs)))
        found = func(*args, **kwargs)
        self._recording.add(func, args, kwargs, tensors_in(found))
        return found
