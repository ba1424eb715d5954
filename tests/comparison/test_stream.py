import json
from pathlib import Path

import pytest
import torch

from sae_lens_alloc.comparison.stream import stored_stream, write_stream

ROWS = torch.arange(36.0).view(12, 3) / 8  # exact in float16
COUNTS = {"train": 10, "validation": 2, "test": 1}


def write(folder: Path, rows: torch.Tensor = ROWS, dtype: str = "float16") -> None:
    batches = list(rows.split(5))
    write_stream(folder, dict.fromkeys(COUNTS, batches), COUNTS, 3, dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_read_is_what_was_written(tmp_path: Path, dtype: str):
    write(tmp_path, dtype=dtype)
    stream = stored_stream(tmp_path)
    assert stream is not None
    for split, count in COUNTS.items():
        assert torch.equal(stream.split(split), ROWS[:count])


def test_batches_come_in_order_and_again_from_the_start(tmp_path: Path):
    """10 rows in batches of 4: the last 2 fill none."""
    write(tmp_path)
    stream = stored_stream(tmp_path)
    assert stream is not None
    batches = stream.training_batches(4)
    for start in (0, 4, 0, 4):
        assert torch.equal(next(batches), ROWS[start : start + 4])


def test_an_interrupted_writing_is_no_stream(tmp_path: Path):
    with pytest.raises(
        ValueError, match="7 activations of the train split are missing"
    ):
        write(tmp_path, ROWS[:3])
    assert (tmp_path / "train.bin").exists()
    assert stored_stream(tmp_path) is None
    write(tmp_path)
    assert stored_stream(tmp_path) is not None


def test_activations_beyond_float16_are_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="compare.stored_dtype: float32 holds larger"):
        write(tmp_path, ROWS * 1e5)
    write(tmp_path, ROWS * 1e5, "float32")


def test_too_full_a_disk_is_found_before_writing(tmp_path: Path):
    with pytest.raises(ValueError, match="GB are free: lower training_tokens"):
        write_stream(tmp_path, {}, {"train": 10**15}, 3, "float16")


def test_a_batch_larger_than_the_file_is_refused(tmp_path: Path):
    write(tmp_path)
    stream = stored_stream(tmp_path)
    assert stream is not None
    with pytest.raises(ValueError, match="holds 10 training .* one batch of 11"):
        next(stream.training_batches(11))


def test_a_file_that_is_cut_while_it_is_read_is_refused(tmp_path: Path):
    write(tmp_path)
    stream = stored_stream(tmp_path)
    assert stream is not None
    batches = stream.training_batches(4)
    next(batches)
    (tmp_path / "train.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="train.bin' ends early"):
        [next(batches) for _ in range(3)]


def test_what_has_changed_is_found(tmp_path: Path):
    write(tmp_path)
    stream = stored_stream(tmp_path)
    assert stream is not None
    stream.verify()
    path = tmp_path / "test.bin"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(ValueError, match="test.bin' is not what was written"):
        stream.verify()
    # earlier versions wrote no checksums: their sizes alone can be checked
    manifest = json.loads((tmp_path / "stream.json").read_text())
    del manifest["sha256"]
    (tmp_path / "stream.json").write_text(json.dumps(manifest))
    old = stored_stream(tmp_path)
    assert old is not None
    old.verify()
    path.write_bytes(path.read_bytes()[1:])
    with pytest.raises(ValueError, match="test.bin' has 5 bytes instead of 6"):
        stored_stream(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"d_in": 3, "dtype": "x"}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str):
    write(tmp_path)
    (tmp_path / "stream.json").write_text(text)
    with pytest.raises(ValueError, match="stream.json"):
        stored_stream(tmp_path)
