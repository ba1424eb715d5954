"""Dispatch modes that notice where the host would wait for a GPU, on a CPU as well."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import Self, override

# What reads a tensor without an operation that a dispatch mode sees, on a CPU at least.
READERS = ("tolist", "numpy", "cpu", "__array__", "__bool__", "__index__")


class NoticesQuestions(TorchDispatchMode):
    """Calls `notice` for what the host would wait for a GPU for, before it is done."""

    readers: ClassVar[tuple[str, ...]] = READERS

    def notice(self, asked: str) -> None:
        """
        Args:
            asked: The operation, or the method of a tensor.
        """
        raise NotImplementedError

    @override
    def __enter__(self) -> Self:
        self._readers = pytest.MonkeyPatch()
        for name in self.readers:
            self._readers.setattr(torch.Tensor, name, self._noticing(name))
        return super().__enter__()

    def _noticing(self, name: str) -> Callable[..., Any]:
        read = getattr(torch.Tensor, name)

        def noticed(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.notice(f"Tensor.{name}")
            return read(tensor, *args, **kwargs)

        return noticed

    @override
    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._readers.undo()

    @override
    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if is_question(func, args):
            self.notice(str(func))
        return func(*args, **(kwargs or {}))


class CountsQuestions(NoticesQuestions):
    """Counts the operations for which the host would wait for a GPU."""

    # the other methods are seen as the operations that they call
    readers: ClassVar[tuple[str, ...]] = ("tolist",)

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    @override
    def notice(self, asked: str) -> None:
        self.asked.append(asked)


class RefusesQuestions(NoticesQuestions):
    """Raises where an operation's result, or its shape, depends on values on the device."""

    @override
    def notice(self, asked: str) -> None:
        raise AssertionError(f"{asked} asks the device")

    @override
    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten.lift_fresh.default:
            raise AssertionError(
                "a number is copied to the device, which is waited for"
            )
        return super().__torch_dispatch__(func, types, args, kwargs)


# With an index the shape is fixed, unless it is a mask, of which the places are looked up.
INDEXED = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


def is_question(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a GPU has to be waited for before an operation returns."""
    if func.overloadpacket in INDEXED:
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
        # one value is filled in without a look at the places
        return bool(masks) and (len(args) < 3 or args[2].numel() > 1)
    return bool(
        {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        & set(func.tags)
    )
