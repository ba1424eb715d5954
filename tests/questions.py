"""Dispatch modes that notice where the host would wait for a GPU, on a CPU as well."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

# What reads a tensor without an operation that a dispatch mode sees, on a CPU at least.
READERS = ("tolist", "numpy", "cpu", "__array__", "__bool__", "__index__")


class CountsQuestions(TorchDispatchMode):
    """Counts the operations for which the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    @override
    def __enter__(self) -> "CountsQuestions":
        self._readers = pytest.MonkeyPatch()
        to_list = torch.Tensor.tolist

        def counted(tensor: torch.Tensor) -> Any:
            self.asked.append("tolist")
            return to_list(tensor)

        self._readers.setattr(torch.Tensor, "tolist", counted)
        return super().__enter__()

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
            self.asked.append(str(func))
        return func(*args, **(kwargs or {}))


class RefusesQuestions(TorchDispatchMode):
    """Raises where an operation's result, or its shape, depends on values on the device."""

    @override
    def __enter__(self) -> "RefusesQuestions":
        self._readers = pytest.MonkeyPatch()
        for name in READERS:
            self._readers.setattr(torch.Tensor, name, _refuse(name))
        return super().__enter__()

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
        if func is torch.ops.aten.lift_fresh.default:
            raise AssertionError(
                "a number is copied to the device, which is waited for"
            )
        if is_question(func, args):
            raise AssertionError(f"{func} asks the device")
        return func(*args, **(kwargs or {}))


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


def _refuse(name: str) -> Callable[..., Any]:
    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise AssertionError(f"Tensor.{name} asks the device")

    return refuse
