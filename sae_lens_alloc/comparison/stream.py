"""The activations that all cells of a comparison share, on disk."""

import hashlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from typing_extensions import override

from sae_lens_alloc.checksums import sha256_of
from sae_lens_alloc.json_files import write_json
from sae_lens_alloc.progress import announced, token_bar
from sae_lens_alloc.saes.saved_sae import read_json_mapping

MANIFEST_FILENAME = "stream.json"
SPLITS = ("train", "validation", "test")


class Stream(ABC):
    """
    The activations of a comparison.

    Attributes:
        folder: Where they are, or are described.
        d_in: Numbers in a row.
        counts: Number of activations, by split.
    """

    folder: Path
    d_in: int
    counts: dict[str, int]

    @abstractmethod
    def verify(self) -> None:
        """
        Compares all files with their checksums, which takes a while.

        Raises:
            ValueError: if a file has changed since the comparison began.
        """

    @abstractmethod
    def training_batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """Endless batches of shape (batch_size, d_in), in the same order for all cells."""

    @abstractmethod
    def split(self, name: str) -> torch.Tensor:
        """All activations of a split, float32 of shape (T, d_in)."""


class StoredStream(Stream):
    """
    Activations on disk, one file for each split, read in the order in which they were written.
    The files are not mapped into memory, so the measured memory of a process is its own.

    Args:
        folder: A folder that `write_stream` wrote.

    Raises:
        ValueError: if a file is missing or has the wrong size.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = read_json_mapping(folder / MANIFEST_FILENAME)
        try:
            self.d_in = int(manifest["d_in"])
            self.dtype = np.dtype(manifest["dtype"])
            self.counts = {split: int(manifest["counts"][split]) for split in SPLITS}
            self.checksums: dict[str, str] = dict(manifest.get("sha256", {}))
        except (KeyError, TypeError, ValueError) as error:
            raise self._damage(MANIFEST_FILENAME, "does not describe them") from error
        for split, count in self.counts.items():
            path = self._path(split)
            size = path.stat().st_size if path.is_file() else 0
            if size != self._size(count):
                raise self._damage(
                    path.name, f"has {size:,} bytes instead of {self._size(count):,}"
                )

    @override
    def verify(self) -> None:
        """As `Stream.verify`. Streams of earlier versions have no checksums, and pass."""
        with announced("checking the stored activations"):
            for split, checksum in self.checksums.items():
                if sha256_of(self._path(split)) != checksum:
                    raise self._damage(f"{split}.bin", "is not what was written")

    @override
    def training_batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """
        Endless batches of shape (batch_size, d_in), in the order on disk, again and again.

        Raises:
            ValueError: if there are too few activations for one batch, or the file ends early.
        """
        n_batches = self.counts["train"] // batch_size
        if n_batches == 0:
            raise ValueError(
                f"{str(self.folder)!r} holds {self.counts['train']:,} training activations, "
                f"fewer than one batch of {batch_size:,}: raise training_tokens, or lower "
                "train_batch_size_tokens."
            )
        while True:
            with self._path("train").open("rb") as file:
                for _ in range(n_batches):
                    yield self._read(file, batch_size)

    @override
    def split(self, name: str) -> torch.Tensor:
        with self._path(name).open("rb") as file:
            return self._read(file, self.counts[name])

    def _path(self, split: str) -> Path:
        return self.folder / f"{split}.bin"

    def _size(self, count: int) -> int:
        return count * self.d_in * self.dtype.itemsize

    def _read(self, file: BinaryIO, count: int) -> torch.Tensor:
        content = file.read(self._size(count))
        if len(content) != self._size(count):
            raise self._damage(Path(file.name).name, "ends early")
        values = np.frombuffer(content, self.dtype).astype(np.float32)
        return torch.from_numpy(values).view(-1, self.d_in)

    def _damage(self, filename: str, what: str) -> ValueError:
        return ValueError(
            f"the stored activations are damaged, since {str(self.folder / filename)!r} {what}: "
            f"remove the folder {str(self.folder)!r}, and the same command stores them again."
        )


def stored_stream(folder: Path) -> StoredStream | None:
    """The stream in a folder, None if it has not been written to its end."""
    return StoredStream(folder) if (folder / MANIFEST_FILENAME).exists() else None


def write_stream(
    folder: Path,
    splits: dict[str, Iterable[torch.Tensor]],
    counts: dict[str, int],
    d_in: int,
    dtype: str,
) -> StoredStream:
    """
    Writes activations to disk, once for all cells.

    Args:
        folder: Folder to write to. What an interrupted run left there is replaced.
        splits: Batches of shape (n, d_in), by split.
        counts: Number of activations to keep, by split.
        d_in: Dimension of the activations.
        dtype: "float16" or "float32".

    Raises:
        ValueError: if the disk has too little room, an activation has another dimension or is
            too large for the dtype, or there are too few activations.
    """
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(counts.values()) * d_in * np.dtype(dtype).itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"the activations take {needed / 1e9:.1f} GB in {str(folder)!r}, where "
            f"{free / 1e9:.1f} GB are free: lower training_tokens, or give another output."
        )
    checksums = {
        name: _write_split(folder / f"{name}.bin", batches, counts[name], d_in, dtype)
        for name, batches in splits.items()
    }
    manifest: dict[str, Any] = {"d_in": d_in, "dtype": dtype, "counts": counts}
    write_json(folder / MANIFEST_FILENAME, {**manifest, "sha256": checksums})
    return StoredStream(folder)


def _write_split(
    path: Path, batches: Iterable[torch.Tensor], count: int, d_in: int, dtype: str
) -> str:
    """Writes the first `count` activations of a split, and returns their checksum."""
    digest = hashlib.sha256()
    missing = count
    what = f"storing the {path.stem} split"
    with path.open("wb") as file, token_bar(count, what) as bar:
        for batch in batches:
            if batch.shape[1:] != (d_in,):
                raise ValueError(
                    f"the activations are of shape {tuple(batch.shape[1:])}, but "
                    f"sae.d_in is {d_in}."
                )
            kept = batch[:missing].to("cpu", getattr(torch, dtype)).numpy()
            if not np.isfinite(kept).all():
                raise ValueError(
                    f"an activation of the {path.stem} split is not finite in {dtype}: "
                    "compare.stored_dtype: float32 holds larger ones."
                )
            kept.tofile(file)
            digest.update(kept.tobytes())
            missing -= len(kept)
            bar.update(len(kept))
            if not missing:
                return digest.hexdigest()
    raise ValueError(
        f"{missing} activations of the {path.stem} split are missing of the {count} asked for: "
        "give more text, or lower training_tokens."
    )
