"""The metrics of a run that was interrupted."""

import json
from pathlib import Path

from sae_lens_alloc.training.metrics_file import append_row, drop_rows_from


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
