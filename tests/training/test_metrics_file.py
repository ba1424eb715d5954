"""The metrics of a run that was interrupted."""

import json
from pathlib import Path

import pytest

from sae_lens_alloc.training.metrics_file import append_row, drop_rows_from
from tests.training.test_output_folder import file_size_limit


def test_rows_from_a_step_on_and_an_incomplete_one_are_dropped(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    for step in range(5):
        append_row(path, {"step": step, "loss": float("nan") if step else 0.5})
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    drop_rows_from(path, 3)
    append_row(path, {"step": 3})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0, "loss": 0.5},
        {"step": 1, "loss": None},
        {"step": 2, "loss": None},
        {"step": 3},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_there_may_be_no_file_yet(tmp_path: Path):
    drop_rows_from(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b"null", b"{}", b'{"step": "1"}', b"\xff\x00", b""]
)
def test_a_file_with_a_line_that_is_no_row_is_refused_and_kept(
    line: bytes, tmp_path: Path
):
    path = tmp_path / "metrics.jsonl"
    content = b'{"step": 0}\n' + line + b'\n{"step": 1}\n'
    path.write_bytes(content)
    with pytest.raises(ValueError, match="^line 2 of .*metrics.jsonl' is no row of me"):
        drop_rows_from(path, 1)
    assert path.read_bytes() == content


def test_a_row_that_does_not_fit_leaves_the_file_as_it_was(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    append_row(path, {"step": 0})
    before = path.read_bytes()
    with file_size_limit(len(before) + 5), pytest.raises(OSError, match="too large"):
        append_row(path, {"step": 1})
    assert path.read_bytes() == before
