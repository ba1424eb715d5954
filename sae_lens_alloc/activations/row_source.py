"""One's own activations: in memory, in files or in a dataset, as rows; or from a generator."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from sae_lens_alloc.activations.local_dataset import open_dataset
from sae_lens_alloc.activations.row_parts import (
    Part,
    array_part,
    check_rows,
    column_of,
    dataset_part,
    npy_part,
    safetensors_part,
    tensor_part,
    vectors_in,
)
from sae_lens_alloc.progress import shown

ROWS_AT_ONCE = 4096
# Of a large source, so many numbers are looked at before a training. The others are when read.
CHECKED_NUMBERS = 2**28
DATA_FILES = ("*.parquet", "*.arrow", "*.jsonl", "*.json")


class RowSource:
    """
    Activations that can be read at any place, one row a token.

    Args:
        parts: Where they are, in their order.
        name: What messages call them.

    Attributes:
        n_rows: Number of rows.
        width: Numbers in a row: d_in, or d_in + d_out for a transcoder.

    Raises:
        ValueError: if the parts have rows of different widths.
    """

    def __init__(self, parts: Sequence[Part], name: str) -> None:
        self.parts = list(parts)
        self.name = name
        self.width = self.parts[0].width
        for part in self.parts:
            if part.width != self.width:
                raise ValueError(
                    f"{part.name} has rows of {part.width} numbers, but "
                    f"{self.parts[0].name} of {self.width}."
                )
        self._ends = list(accumulate(part.n_rows for part in self.parts))
        self.n_rows = self._ends[-1]

    def read(self, start: int, stop: int) -> torch.Tensor:
        """
        Rows from `start` up to `stop`, which is left out, float32 of shape (stop - start, width).

        Raises:
            ValueError: if a number is not finite.
        """
        found: list[torch.Tensor] = []
        for part, end in zip(self.parts, self._ends, strict=True):
            begin = end - part.n_rows
            low, high = max(start, begin) - begin, min(stop, end) - begin
            if low < high:
                rows = part.read(low, high).to("cpu", torch.float32)
                _require_finite(rows, part.name, low)
                found.append(rows)
        return torch.cat(found)

    def spread(self, n_rows: int) -> torch.Tensor:
        """`n_rows` rows, or all there are, spread evenly, of shape (n, width)."""
        if n_rows >= self.n_rows:
            return self.read(0, self.n_rows)
        # blocks, since single rows are slow to read
        size = min(128, max(1, n_rows // 64))
        n_blocks = -(-n_rows // size)
        starts = [
            i * (self.n_rows - size) // max(1, n_blocks - 1) for i in range(n_blocks)
        ]
        return torch.cat([self.read(s, s + size) for s in starts])[:n_rows]

    def require_finite(self) -> None:
        """
        Looks at all rows of a small source, and at some, spread evenly, of a large one.

        Raises:
            ValueError: if a number is not finite.
        """
        n_blocks = -(-self.n_rows // ROWS_AT_ONCE)
        checked = max(1, CHECKED_NUMBERS // (ROWS_AT_ONCE * self.width))
        for block in shown(
            range(0, n_blocks, -(-n_blocks // checked)), "checking activations"
        ):
            start = block * ROWS_AT_ONCE
            self.read(start, min(start + ROWS_AT_ONCE, self.n_rows))


class BatchSource:
    """
    Activations that come one batch after the other.

    Args:
        batches: An iterator, which is read once, or what gives one for each epoch: a callable, or
            an iterable such as a list or a DataLoader. Batches have the shape (n, width).
        name: What messages call them.

    Attributes:
        is_read_once: Whether there is no second epoch.
    """

    def __init__(self, batches: Callable[..., Any] | Iterable[Any], name: str) -> None:
        self.name = name
        self.is_read_once = isinstance(batches, Iterator)
        self._batches = batches

    def epoch(self) -> Iterator[torch.Tensor]:
        """
        The batches of an epoch, float32 of shape (n, width).

        Raises:
            ValueError: if one has another form, or a number is not finite.
        """
        batches = self._batches
        given = batches if isinstance(batches, Iterable) else batches()
        if not isinstance(given, Iterable):
            raise ValueError(
                f"{self.name} returned {type(given).__name__}, but must return an iterable of "
                "batches of shape (n, d_in)."
            )
        width: int | None = None
        for i, batch in enumerate(given):
            name = f"batch {i} of {self.name}"
            rows = _tensor_of(name, batch)
            check_rows(name, rows.shape, rows.is_floating_point(), rows.dtype)
            rows = rows.to("cpu", torch.float32)
            if width is not None and rows.shape[1] != width:
                raise ValueError(
                    f"{name} has rows of {rows.shape[1]} numbers, but the first one of {width}."
                )
            width = rows.shape[1]
            _require_finite(rows, name, 0)
            yield rows


def _tensor_of(name: str, batch: Any) -> torch.Tensor:
    """A batch, which a DataLoader of a TensorDataset puts into a list."""
    if isinstance(batch, list | tuple) and len(batch) == 1:
        batch = batch[0]
    try:
        return torch.as_tensor(batch).detach()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{name} must be a tensor of shape (n, d_in), got {type(batch).__name__}."
        ) from None


def open_rows(source: Any, column: str | None = None) -> RowSource | BatchSource:
    """
    Activations of one's own. Nothing is read but where and how large they are.

    Args:
        source: A tensor or array of shape (n, d_in); the path of a `.npy` or safetensors file, of a
            folder of such files, which are read in the order of their names, or of a dataset in a
            folder or a parquet file; a dataset; an iterable of batches of shape (n, d_in), or a
            callable that returns one.
        column: Column of a dataset, or tensor of a safetensors file. None if there is one only.

    Raises:
        ValueError: if it cannot be read or is nothing of the kind, in one sentence.
    """
    if isinstance(source, RowSource | BatchSource):
        return source
    if isinstance(source, str | Path):
        return _open_path(Path(source).expanduser(), column)
    if isinstance(
        source, Dataset | DatasetDict | IterableDataset | IterableDatasetDict
    ):
        return _open_dataset(source, column, "the dataset")
    if column is not None:
        raise ValueError(
            f"activations_column is {column!r}, but {type(source).__name__} has no columns: "
            "leave it out."
        )
    if isinstance(source, torch.Tensor | np.ndarray):
        is_tensor = isinstance(source, torch.Tensor)
        part = tensor_part(source) if is_tensor else array_part(source)
        return RowSource([part], part.name)
    if isinstance(source, Iterator):
        return BatchSource(source, "the generator")
    if isinstance(source, Iterable) or callable(source):
        return BatchSource(source, f"the {type(source).__name__}")
    raise ValueError(
        f"activations must be a tensor, a path, a dataset, an iterable of batches or a callable "
        f"that returns one, got {type(source).__name__}."
    )


def _open_path(path: Path, column: str | None) -> RowSource | BatchSource:
    name = repr(str(path))
    if not path.exists():
        raise ValueError(f"activations is {name}, but there is no such file or folder.")
    if path.is_file():
        if path.suffix in (".npy", ".safetensors"):
            return RowSource([_file_part(path, column)], name)
        if not any(path.match(pattern) for pattern in DATA_FILES):
            raise ValueError(
                f"activations is {name}, but a file must be .npy, .safetensors or .parquet."
            )
        return _open_dataset(open_dataset(path, key="activations"), column, name)
    shards = sorted(p for p in path.iterdir() if p.suffix in (".npy", ".safetensors"))
    if len({p.suffix for p in shards}) > 1:
        raise ValueError(
            f"activations is {name}, which holds .npy and .safetensors files: give a folder "
            "with files of one kind."
        )
    if shards:
        return RowSource([_file_part(p, column) for p in shards], name)
    if (path / "state.json").exists() or any(
        next(path.glob(pattern), None) for pattern in ("dataset_dict.json", *DATA_FILES)
    ):
        return _open_dataset(open_dataset(path, key="activations"), column, name)
    raise ValueError(
        f"activations is {name}, which holds neither .npy or .safetensors files nor a dataset."
    )


def _file_part(path: Path, column: str | None) -> Part:
    if path.suffix == ".safetensors":
        return safetensors_part(path, column)
    if column is not None:
        raise ValueError(
            f"activations_column is {column!r}, but {str(path)!r} has no columns: leave it out."
        )
    return npy_part(path)


def _open_dataset(
    dataset: Any, column: str | None, name: str
) -> RowSource | BatchSource:
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        if "train" not in dataset:
            raise ValueError(
                f"{name} has the splits {', '.join(map(repr, dataset))}: give one of them."
            )
        dataset = dataset["train"]
    if isinstance(dataset, Dataset):
        return RowSource([dataset_part(dataset, column, name)], name)
    streamed = dataset.with_format("numpy")

    def batches() -> Iterator[np.ndarray]:
        key = column
        for rows in streamed.iter(batch_size=16):
            key = key or column_of(name, {k: v[0] for k, v in rows.items()}, column)
            if key not in rows:
                column_of(name, rows, key)  # raises
            yield np.concatenate([vectors_in(name, value) for value in rows[key]])

    return BatchSource(batches, name)


def _require_finite(rows: torch.Tensor, name: str, first: int) -> None:
    finite = rows.isfinite().all(dim=1)
    if not finite.all():
        row = first + int((~finite).nonzero()[0])
        raise ValueError(
            f"row {row} of {name} holds a number that is not finite in float32 (NaN or "
            "infinite): leave such rows out."
        )
