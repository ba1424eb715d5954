"""One's own activations are what they are, wherever they lie; what cannot be is one sentence."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, DatasetDict, Features
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

from sae_lens_alloc.activations.row_source import BatchSource, RowSource, open_rows

N, WIDTH, CONTEXT = 60, 5, 4


def rows() -> torch.Tensor:
    """Multiples of 1/4, exact in float16."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-40, 40, (N, WIDTH), generator=generator) / 4


def write_npy(folder: Path) -> Path:
    np.save(folder / "x.npy", rows().numpy())
    return folder / "x.npy"


def write_half_precision(folder: Path) -> str:
    np.save(folder / "x.npy", rows().numpy().astype(np.float16))
    return str(folder / "x.npy")


def write_big_endian(folder: Path) -> Path:
    np.save(folder / "x.npy", rows().numpy().astype(">f4"))
    return folder / "x.npy"


def write_shards(folder: Path) -> Path:
    for name, part in zip(
        "cab", (rows()[45:], rows()[:40], rows()[40:45]), strict=True
    ):
        np.save(folder / f"{name}.npy", part.numpy())
    (folder / "manifest.json").write_text("{}")
    return folder


def write_safetensors(folder: Path) -> Path:
    save_file({"x": rows().to(torch.bfloat16)}, folder / "x.safetensors")
    return folder / "x.safetensors"


def write_safetensors_shards(folder: Path) -> Path:
    save_file({"x": rows()[:7], "y": rows()[:7]}, folder / "0.safetensors")
    save_file({"x": rows()[7:]}, folder / "1.safetensors")
    return folder


def vectors() -> Dataset:
    return Dataset.from_dict(
        {"x": rows().tolist(), "n": list(range(N)), "text": ["a"] * N}
    )


def contexts() -> Dataset:
    """As SAELens' CacheActivationsRunner writes them."""
    shape = (CONTEXT, WIDTH)
    return Dataset.from_dict(
        {
            "blocks.0.hook": rows().view(-1, *shape).numpy(),
            "token_ids": torch.zeros(N // CONTEXT, CONTEXT, dtype=torch.int32).numpy(),
        },
        features=Features(
            {
                "blocks.0.hook": Array2D(shape, "float32"),
                "token_ids": datasets.Sequence(datasets.Value("int32"), CONTEXT),
            }
        ),
    )


def save_dataset(dataset: Dataset | DatasetDict, folder: Path) -> Path:
    dataset.save_to_disk(folder / "saved")
    return folder / "saved"


def write_parquet(folder: Path) -> Path:
    vectors().to_parquet(folder / "x.parquet")
    return folder


SOURCES: dict[str, Callable[[Path], Any]] = {
    "tensor": lambda _: rows(),
    "parameter": lambda _: torch.nn.Parameter(rows()),
    "float64": lambda _: rows().double(),
    "array": lambda _: rows().numpy(),
    "mapped array": lambda folder: np.load(write_npy(folder), mmap_mode="r"),
    "npy": write_npy,
    "npy in half precision": write_half_precision,
    "big endian": write_big_endian,
    "shards": write_shards,
    "safetensors": write_safetensors,
    "dataset": lambda _: vectors(),
    "dataset of contexts": lambda _: contexts(),
    "dataset of nested lists": lambda _: Dataset.from_dict(
        {"x": rows().view(-1, CONTEXT, WIDTH).tolist()}
    ),
    "dataset with splits": lambda _: DatasetDict({"train": vectors()}),
    "saved dataset": lambda folder: save_dataset(vectors(), folder),
    "cached activations": lambda folder: save_dataset(contexts(), folder),
    "saved splits": lambda f: save_dataset(DatasetDict({"train": vectors()}), f),
    "folder of parquet files": write_parquet,
    "parquet file": lambda folder: write_parquet(folder) / "x.parquet",
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_rows_are_read_at_any_place(make: Callable[[Path], Any], tmp_path: Path):
    source = open_rows(make(tmp_path))
    assert isinstance(source, RowSource)
    assert (source.n_rows, source.width) == (N, WIDTH)
    for start, stop in ((0, N), (0, 1), (3, 11), (38, 47), (N - 1, N)):
        found = source.read(start, stop)
        assert found.dtype == torch.float32
        assert torch.equal(found, rows()[start:stop])


def test_a_named_tensor_and_a_named_column_are_read(tmp_path: Path):
    source = open_rows(write_safetensors_shards(tmp_path), "x")
    assert isinstance(source, RowSource)
    assert torch.equal(source.read(0, N), rows())
    two = vectors().add_column("y", (-rows()).tolist())  # type: ignore[call-arg]
    other = open_rows(two, "y")
    assert isinstance(other, RowSource)
    assert torch.equal(other.read(5, 9), -rows()[5:9])


def test_a_file_is_not_read_whole(tmp_path: Path):
    # larger than the memory of the machine, if it were not a hole
    shape = (2**40 // 64, 16)
    with (tmp_path / "x.npy").open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 2**40)
    source = open_rows(tmp_path / "x.npy")
    assert isinstance(source, RowSource)
    assert source.n_rows == shape[0]
    assert source.read(shape[0] - 2, shape[0]).tolist() == [[0.0] * 16] * 2


def test_a_file_that_is_cut_short_is_one_sentence(tmp_path: Path):
    path = write_npy(tmp_path)
    source = open_rows(path)
    assert isinstance(source, RowSource)
    os.truncate(path, path.stat().st_size - 4)
    assert torch.equal(source.read(0, N - 1), rows()[: N - 1])
    with pytest.raises(ValueError, match="x.npy' has been cut short"):
        source.read(0, N)
    with pytest.raises(ValueError, match="x.npy' is no .npy file"):
        open_rows(path)


@pytest.mark.parametrize("n", [1, 10, 59, 60, 1000])
def test_spread_rows_are_as_many_as_wanted_from_the_first_to_the_last(n: int):
    source = open_rows(torch.arange(1000.0)[:, None])
    assert isinstance(source, RowSource)
    found = source.spread(n)[:, 0].tolist()
    assert len(set(found)) == len(found) == n and found == sorted(found)
    assert found[0] == 0 and (n == 1 or found[-1] == 999)


def iterated() -> Any:
    return [rows()[:20], rows()[20:].numpy()]


BATCHES: dict[str, Callable[[], Any]] = {
    "list": iterated,
    "callable": lambda: iterated,
    "generator": lambda: iter(iterated()),
    "data loader": lambda: DataLoader(TensorDataset(rows()), batch_size=7),
    "streamed dataset": lambda: vectors().to_iterable_dataset(),
    "streamed contexts": lambda: contexts().to_iterable_dataset(),
}


@pytest.mark.parametrize("make", BATCHES.values(), ids=BATCHES)
def test_batches_come_in_their_order(make: Callable[[], Any]):
    source = open_rows(make())
    assert isinstance(source, BatchSource)
    assert torch.equal(torch.cat(list(source.epoch())), rows())
    assert source.is_read_once == (make is BATCHES["generator"])
    again = list(source.epoch())
    assert again == [] if source.is_read_once else torch.equal(torch.cat(again), rows())


def with_nan() -> torch.Tensor:
    found = rows()
    found[17, 2] = float("nan")
    return found


def npy_of(array: np.ndarray) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.save(folder / "x.npy", array)
        return folder / "x.npy"

    return write


def damaged(folder: Path) -> Path:
    (folder / "x.npy").write_bytes(b"no array")
    return folder / "x.npy"


def of_two_widths(folder: Path) -> Path:
    np.save(folder / "0.npy", rows().numpy())
    np.save(folder / "1.npy", rows()[:, 1:].numpy())
    return folder


def of_two_kinds(folder: Path) -> Path:
    write_npy(folder)
    write_safetensors(folder)
    return folder


def written_text(folder: Path) -> Path:
    (folder / "x.txt").write_text("1 2 3")
    return folder / "x.txt"


REFUSED: dict[str, tuple[Callable[[Path], Any], str | None, str]] = {
    "missing": (lambda f: f / "no.npy", None, "there is no such file or folder"),
    "empty folder": (lambda f: f, None, "neither .npy or .safetensors"),
    "other file": (written_text, None, "must be .npy, .safetensors or .parquet"),
    "damaged": (damaged, None, "is no .npy file"),
    "1-D": (lambda _: rows()[0], None, "must have two dimensions"),
    "1-D file": (npy_of(np.ones(3)), None, r"two dimensions.*got the shape \(3,\)"),
    "3-D": (lambda _: rows()[None], None, "must have two dimensions"),
    "no rows": (lambda _: rows()[:0], None, "is empty"),
    "no rows in a dataset": (lambda _: vectors().select([]), None, "holds no rows"),
    "integers": (
        lambda _: rows().int(),
        None,
        "floating-point numbers, got torch.int32",
    ),
    "file of integers": (npy_of(np.ones((2, 2), int)), None, "got int64: give float32"),
    "complex": (npy_of(np.ones((2, 2), complex)), None, "got complex128"),
    "by columns": (npy_of(np.ones((3, 2)).T), None, "column after column"),
    "two widths": (of_two_widths, None, "rows of 4 numbers.*of 5"),
    "two kinds": (of_two_kinds, None, "files of one kind"),
    "no column": (
        lambda _: vectors(),
        "y",
        "'x', 'n', 'text'.*activations_column is 'y'",
    ),
    "integer column": (lambda _: vectors(), "n", "must hold arrays, got int64"),
    "no array": (
        lambda _: vectors().select_columns(["n"]),
        None,
        "none of which holds arrays",
    ),
    "two arrays": (
        lambda _: vectors().add_column("y", rows().tolist()),  # type: ignore[call-arg]
        None,
        "say which of them in activations_column",
    ),
    "no such split": (lambda _: DatasetDict({"a": vectors()}), None, "the splits 'a'"),
    "no such saved split": (
        lambda f: save_dataset(DatasetDict({"a": vectors()}), f),
        None,
        "cannot be read: it has the splits 'a', of which none is 'train'",
    ),
    "two tensors": (
        lambda f: write_safetensors_shards(f) / "0.safetensors",
        None,
        "say which of them",
    ),
    "no such tensor": (write_safetensors, "z", "tensors 'x', but activations_column"),
    "a column of a tensor": (lambda _: rows(), "x", "has no columns"),
    "a column of a file": (write_npy, "x", "has no columns"),
    "a number": (lambda _: 3, None, "must be a tensor, a path, a dataset.*got int"),
}


@pytest.mark.parametrize(("make", "column", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_trained_on_is_one_sentence(
    make: Callable[[Path], Any], column: str | None, message: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=message) as error:
        open_rows(make(tmp_path), column)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_a_number_that_is_not_finite_is_named(tmp_path: Path):
    np.save(tmp_path / "0.npy", rows().numpy())
    np.save(tmp_path / "1.npy", with_nan().numpy())
    source = open_rows(tmp_path)
    assert isinstance(source, RowSource)
    with pytest.raises(ValueError, match=r"row 17 of '.*1\.npy'.*not finite"):
        source.require_finite()
    source.read(N, N + 17)
    with pytest.raises(ValueError, match="row 17"):
        source.read(N + 10, N + 20)
    too_large = np.full((2, 2), 1e300)
    for source in (open_rows(too_large), open_rows(torch.from_numpy(too_large))):
        with pytest.raises(ValueError, match="row 0 .*not finite in float32"):
            source.read(0, 2)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "ragged",
    [
        [[1.0, 2.0], [3.0, 4.0], [5.0]],
        [[[1.0, 2.0]], [[3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]],
    ],
)
def test_a_row_of_another_shape_is_named(ragged: list[Any]):
    source = open_rows(Dataset.from_dict({"x": ragged}))
    assert isinstance(source, RowSource)
    with pytest.raises(ValueError, match="row 2 of the column 'x'.* row 0 .*the same"):
        source.require_finite()


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (with_nan(), "row 17 of batch 1 of the list"),
        (
            rows()[:, 1:],
            "batch 1 of the list has rows of 4 numbers, but the first one of 5",
        ),
        (rows()[0], "batch 1 of the list must have two dimensions"),
        (rows().int(), "batch 1 of the list must hold floating-point"),
        ({"x": rows()}, r"batch 1 of the list must be a tensor of shape .*got dict"),
    ],
)
def test_a_batch_that_cannot_be_trained_on_is_named(second: Any, message: str):
    source = open_rows([rows(), second])
    assert isinstance(source, BatchSource)
    with pytest.raises(ValueError, match=message):
        list(source.epoch())


def test_a_callable_must_return_batches():
    source = open_rows(lambda: 3)
    assert isinstance(source, BatchSource)
    with pytest.raises(
        ValueError, match="the function returned int, but must return an"
    ):
        next(source.epoch())
