"""Activations that lie somewhere as rows, one vector a token: a part each, read a few rows at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open

from sae_lens_alloc.errors import as_reason

Read = Callable[[int, int], torch.Tensor]
SAFETENSORS_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, eq=False)
class Part:
    """
    Rows of one tensor, file or dataset.

    Args:
        name: What messages call it.
        n_rows: Number of rows.
        width: Numbers in a row.
        read: Rows from a first one up to a last one, which is left out, of shape (n, width).
    """

    name: str
    n_rows: int
    width: int
    read: Read


def tensor_part(tensor: torch.Tensor) -> Part:
    """
    The rows of a tensor.

    Raises:
        ValueError: if it is not of shape (n, width) and of floating-point numbers.
    """
    name, rows = f"a tensor of shape {tuple(tensor.shape)}", tensor.detach()
    check_rows(name, rows.shape, rows.is_floating_point(), rows.dtype)
    return Part(name, *_sizes(rows.shape), lambda start, stop: rows[start:stop])


def array_part(array: np.ndarray) -> Part:
    """
    The rows of a NumPy array, which may be a mapped file.

    Raises:
        ValueError: if it is not of shape (n, width) and of floating-point numbers.
    """
    name = f"a NumPy array of shape {array.shape}"
    check_rows(name, array.shape, array.dtype.kind == "f", array.dtype)
    return Part(
        name,
        *_sizes(array.shape),
        lambda start, stop: torch.from_numpy(_in_float32(array[start:stop])),
    )


def npy_part(path: Path) -> Part:
    """
    The rows of a `.npy` file. It is read at its places and not mapped, so that what has been read
    does not stay in the memory of the process.

    Raises:
        ValueError: if it is damaged, or not of shape (n, width) and of floating-point numbers.
    """
    name = repr(str(path))
    try:
        header = np.load(path, mmap_mode="r")
        shape, dtype, offset = header.shape, header.dtype, header.offset
        by_rows = bool(header.flags.c_contiguous)
        del header
    except (OSError, ValueError, EOFError, AttributeError) as error:
        raise ValueError(f"{name} is no .npy file: {as_reason(error)}.") from error
    check_rows(name, shape, dtype.kind == "f", dtype)
    if not by_rows:
        raise ValueError(
            f"{name} is stored column after column: save it by "
            "numpy.save(path, numpy.ascontiguousarray(rows))."
        )
    width = shape[1]

    def read(start: int, stop: int) -> torch.Tensor:
        values = np.fromfile(
            path,
            dtype,
            (stop - start) * width,
            offset=offset + start * width * dtype.itemsize,
        )
        if len(values) != (stop - start) * width:
            raise ValueError(f"{name} has been cut short since it was opened.")
        return torch.from_numpy(_in_float32(values)).view(-1, width)

    return Part(name, *_sizes(shape), read)


def safetensors_part(path: Path, column: str | None) -> Part:
    """
    The rows of a tensor in a safetensors file.

    Args:
        path: The file.
        column: Name of the tensor, None if there is one only.

    Raises:
        ValueError: if it is damaged, has no such tensor, or the tensor is not of shape
            (n, width) and of floating-point numbers.
    """
    try:
        file = safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{str(path)!r} is no safetensors file: {as_reason(error)}."
        ) from error
    key = _named(str(path), "tensors", list(file.keys()), column)
    rows = file.get_slice(key)
    name = f"{key!r} of {str(path)!r}"
    shape, dtype = tuple(rows.get_shape()), rows.get_dtype()
    check_rows(name, shape, dtype in SAFETENSORS_FLOATS, dtype)
    return Part(name, *_sizes(shape), lambda start, stop: rows[start:stop])


def dataset_part(dataset: Dataset, column: str | None, name: str) -> Part:
    """
    The rows of a dataset's column: a vector in each row, or, as SAELens caches activations, the
    vectors of a context.

    Args:
        dataset: The dataset.
        column: The column, None for the only one that holds arrays of floating-point numbers.
        name: What messages call the dataset.

    Raises:
        ValueError: if it is empty, has no such column, or the column holds something else.
    """
    if len(dataset) == 0:
        raise ValueError(f"{name} holds no rows.")
    first: dict[str, Any] = dataset.with_format("numpy")[0]
    key = column_of(name, first, column)
    where = f"the column {key!r} of {name}"
    per_row, width = vectors_in(where, first[key]).shape
    only = dataset.select_columns([key]).with_format("numpy")

    def read(start: int, stop: int) -> torch.Tensor:
        first_row, last_row = start // per_row, -(-stop // per_row)
        values: Any = only[first_row:last_row][key]
        found = [vectors_in(where, value) for value in values]
        for i, rows in enumerate(found, first_row):
            if rows.shape != (per_row, width):
                raise ValueError(
                    f"row {i} of {where} has the shape {np.shape(values[i - first_row])}, but "
                    f"row 0 {first[key].shape}: all must have the same."
                )
        flat = torch.from_numpy(np.stack(list(map(_in_float32, found)))).view(-1, width)
        return flat[start - first_row * per_row : stop - first_row * per_row]

    return Part(where, len(dataset) * per_row, width, read)


def column_of(name: str, row: dict[str, Any], column: str | None) -> str:
    """
    The column of a dataset that holds the activations.

    Args:
        name: What messages call the dataset.
        row: A row of it, in NumPy's arrays.
        column: The column, if it is known.
    """
    arrays = [key for key, v in row.items() if _is_array(v) and v.dtype.kind == "f"]
    if column is None and len(arrays) == 0:
        raise ValueError(
            f"{name} has the columns {_listed(row)}, none of which holds arrays of "
            "floating-point numbers."
        )
    return _named(name, "columns", arrays if column is None else list(row), column)


def vectors_in(where: str, value: Any) -> np.ndarray:
    """What a dataset holds in a row, as an array of shape (n, width)."""
    if not _is_array(value):
        raise ValueError(f"{where} must hold arrays, got {type(value).__name__}.")
    if value.ndim not in (1, 2):
        raise ValueError(
            f"{where} must hold vectors, or matrices of one vector a token, got an array of "
            f"shape {value.shape}."
        )
    rows = value[None] if value.ndim == 1 else value
    check_rows(where, rows.shape, rows.dtype.kind == "f", rows.dtype)
    return rows


def check_rows(
    name: str, shape: Sequence[int], is_floating: bool, dtype: object
) -> None:
    """Raises ValueError if rows are not of shape (n, width), are none, or are no floats."""
    if len(shape) != 2:
        raise ValueError(
            f"{name} must have two dimensions, (n, d_in), one row a token, got the shape "
            f"{tuple(shape)}."
        )
    if min(shape) == 0:
        raise ValueError(f"{name} is empty: it has the shape {tuple(shape)}.")
    if not is_floating:
        raise ValueError(
            f"{name} must hold floating-point numbers, got {dtype}: give float32 or float16."
        )


def _in_float32(values: np.ndarray) -> np.ndarray:
    """A copy. What is too large for float32 becomes infinite, and is refused where it is read."""
    with np.errstate(over="ignore"):
        return np.array(values, np.float32)


def _sizes(shape: Sequence[int]) -> tuple[int, int]:
    n_rows, width = shape
    return n_rows, width


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim > 0


def _named(where: str, what: str, names: Sequence[str], wanted: str | None) -> str:
    """The wanted name of some, or the only one."""
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted in names:
        return wanted  # type: ignore[return-value]
    found = f"{where} has the {what} {_listed(names)}"
    if wanted is None:
        raise ValueError(f"{found}: say which of them in activations_column.")
    raise ValueError(f"{found}, but activations_column is {wanted!r}.")


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names)) or "(none)"
