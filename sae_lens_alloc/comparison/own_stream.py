"""Activations of one's own that all cells of a comparison read where they are."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from sae_lens_alloc.activations.row_order import RowOrder
from sae_lens_alloc.activations.row_source import RowSource, open_rows
from sae_lens_alloc.activations.row_store import RowStore
from sae_lens_alloc.checksums import sha256_of
from sae_lens_alloc.comparison.stream import (
    MANIFEST_FILENAME,
    SPLITS,
    StoredStream,
    Stream,
)
from sae_lens_alloc.json_files import write_json
from sae_lens_alloc.saes.saved_sae import read_json_mapping


class OwnStream(Stream):
    """
    Activations that are where their owner keeps them. Training batches come in one random order for
    all cells, and another one in each epoch.

    Args:
        folder: A folder that `describe_own_stream` wrote.

    Raises:
        ValueError: if the activations are not there any more, or have changed in number.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = read_json_mapping(folder / MANIFEST_FILENAME)
        self.d_in: int = manifest["d_in"]
        self.counts: dict[str, int] = manifest["counts"]
        self._sha256: dict[str, str] = manifest["sha256"]
        self._seed: int = manifest["seed"]
        self._buffer_rows: int = manifest["buffer_rows"]
        self._rows = {
            split: open_split(path, manifest["column"])
            for split, path in manifest["paths"].items()
        }
        for split, rows in self._rows.items():
            if rows.n_rows != manifest["n_rows"][split]:
                raise self._changed(rows.name)

    @override
    def verify(self) -> None:
        for path, checksum in self._sha256.items():
            if not Path(path).is_file() or sha256_of(Path(path)) != checksum:
                raise self._changed(repr(path))

    @override
    def training_batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        rows = self._rows["train"]
        order = RowOrder(rows.n_rows, 0, self._buffer_rows, self._seed)
        return RowStore(rows, order, batch_size)

    @override
    def split(self, name: str) -> torch.Tensor:
        return self._rows[name].spread(self.counts[name])

    def _changed(self, name: str) -> ValueError:
        return ValueError(
            f"{name} is not what it was when this comparison began: bring the activations back, or "
            "give another output."
        )


def open_split(path: str, column: str | None) -> RowSource:
    """
    The activations of a split.

    Raises:
        ValueError: as `open_rows`, or if they cannot be read at any place.
    """
    rows = open_rows(path, column)
    assert isinstance(rows, RowSource)  # a path leads to files, and they stay
    return rows


def describe_own_stream(
    folder: Path,
    rows: Mapping[str, RowSource],
    paths: Mapping[str, str],
    column: str | None,
    counts: Mapping[str, int],
    seed: int,
    buffer_rows: int,
) -> OwnStream:
    """
    Writes where activations are, their order and their checksums. They are not copied.

    Args:
        folder: Folder to write to.
        rows: The activations, by split.
        paths: Where they are, by split.
        column: Their column, if they have several.
        counts: Activations to train on, and of the other splits to measure on.
        seed: Seed of the order.
        buffer_rows: Rows that are shuffled together.
    """
    files = {file for path in paths.values() for file in files_of(Path(path))}
    folder.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = {
        "d_in": rows["train"].width,
        "counts": dict(counts),
        "n_rows": {split: rows[split].n_rows for split in SPLITS},
        "paths": {split: str(Path(paths[split]).resolve()) for split in SPLITS},
        "column": column,
        "seed": seed,
        "buffer_rows": buffer_rows,
        "sha256": {str(file.resolve()): sha256_of(file) for file in sorted(files)},
    }
    write_json(folder / MANIFEST_FILENAME, manifest)
    return OwnStream(folder)


def files_of(path: Path) -> list[Path]:
    """A file, or those of a folder."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file())


def open_stream(folder: Path) -> Stream | None:
    """
    The activations of a comparison, None if they have not been written, or described, to their end.
    """
    manifest = folder / MANIFEST_FILENAME
    if not manifest.exists():
        return None
    if "paths" in read_json_mapping(manifest):
        return OwnStream(folder)
    return StoredStream(folder)
