"""The activations that all cells of a comparison share, on disk."""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

MANIFEST_FILENAME = "stream.json"
SPLITS = ("train", "validation", "test")


class StoredStream:
    """
    Activations in files of rows, one file a split, read in the order they were written. Read
    without mapping them into memory, so that a process's memory stays its own.
    """

    def __init__(self, folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST_FILENAME).read_text())
        self.folder = folder
        self.d_in: int = manifest["d_in"]
        self.dtype = np.dtype(manifest["dtype"])
        self.counts: dict[str, int] = manifest["counts"]

    def training_batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """Batches of shape (batch_size, d_in) in the order on disk, over and over."""
        while True:
            with (self.folder / "train.bin").open("rb") as file:
                while len(batch := self._read(file, batch_size)) == batch_size:
                    yield batch

    def split(self, name: str) -> torch.Tensor:
        """All activations of a split, float32 of shape (T, d_in)."""
        with (self.folder / f"{name}.bin").open("rb") as file:
            return self._read(file, self.counts[name])

    def _read(self, file: object, count: int) -> torch.Tensor:
        values = np.fromfile(file, self.dtype, count * self.d_in)  # type: ignore[arg-type]
        return torch.from_numpy(values.astype(np.float32)).view(-1, self.d_in)


def stored_stream(folder: Path) -> StoredStream | None:
    """The stream in a folder, None where it has not been written to its end."""
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
        folder: Where to; what an interrupted writing left there is replaced.
        splits: Batches of shape (n, d_in), by split.
        counts: How many activations of each split to keep.
        d_in: Their dimension.
        dtype: "float16" or "float32".

    Raises:
        ValueError: if the disk has too little room, an activation is of another dimension or
            too large for float16, or there are too few.
    """
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(counts.values()) * d_in * np.dtype(dtype).itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"the activations take {needed / 1e9:.1f} GB in {str(folder)!r}, where "
            f"{free / 1e9:.1f} GB are free: lower training_tokens, or give another output."
        )
    for name, batches in splits.items():
        with (folder / f"{name}.bin").open("wb") as file:
            missing = counts[name]
            for batch in batches:
                if batch.shape[1:] != (d_in,):
                    raise ValueError(
                        f"the activations are of shape {tuple(batch.shape[1:])}, but "
                        f"sae.d_in is {d_in}."
                    )
                kept = batch[:missing].to("cpu", getattr(torch, dtype)).numpy()
                if not np.isfinite(kept).all():
                    raise ValueError(
                        f"an activation of the {name} split is not finite in {dtype}: "
                        "compare.stored_dtype: float32 holds larger ones."
                    )
                kept.tofile(file)
                missing -= len(kept)
                if not missing:
                    break
            else:
                raise ValueError(
                    f"{missing} activations of the {name} split are missing of the "
                    f"{counts[name]} asked for."
                )
    manifest = {"d_in": d_in, "dtype": dtype, "counts": counts}
    partial = folder / f"{MANIFEST_FILENAME}.partial"
    partial.write_text(json.dumps(manifest))
    partial.rename(folder / MANIFEST_FILENAME)
    return StoredStream(folder)
