"""The held-out text of a comparison on a language model."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sae_lens_alloc
from sae_lens_alloc.comparison.config import load_comparison
from sae_lens_alloc.comparison.language_model import (
    LanguageModelSubject,
    held_out_texts,
)

CONFIG = Path(__file__).parents[2] / "configs" / "compare_demo.yaml"
DEMO = Path(sae_lens_alloc.__file__).parent / "demo"


def write(path: Path, **columns: list[Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_missing_and_empty_texts_are_left_out(tmp_path: Path):
    path = write(tmp_path / "a.parquet", text=["one", None, "", "two"])
    assert held_out_texts(path) == ["one", "two"]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"words": ["one"]}, "is no parquet file with a column text"),
        ({"text": [1, 2]}, "has a column text of int64, not of strings."),
        ({"text": ["", ""]}, "holds no text."),
        ({"text": pa.array([], pa.string())}, "holds no text."),
    ],
)
def test_a_file_without_text_is_named(
    columns: dict[str, Any], said: str, tmp_path: Path
):
    path = write(tmp_path / "a.parquet", **columns)
    with pytest.raises(ValueError) as error:
        held_out_texts(path)
    assert f"compare.heldout_path {str(path)!r} {said}" in str(error.value)


@pytest.mark.parametrize("harm", ["cut", "no parquet", "missing"])
def test_a_damaged_file_is_named_before_the_model_is_loaded(harm: str, tmp_path: Path):
    path = write(tmp_path / "a.parquet", text=["one"])
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:50] if harm == "cut" else b"text")
    config, _ = load_comparison(
        CONFIG, [f"compare.heldout_path={path}", "model_name=no/such/model"]
    )
    with pytest.raises(
        ValueError, match=r"is no parquet file with a column text: .*\.$"
    ):
        LanguageModelSubject(config).write(tmp_path / "stream")


def test_a_text_too_short_for_both_splits_says_how_short(tmp_path: Path):
    path = write(tmp_path / "a.parquet", text=["a few words " * 20])
    config, _ = load_comparison(
        CONFIG,
        [f"compare.heldout_path={path}", f"model_name={DEMO / 'model'}"],
    )
    with pytest.raises(ValueError, match="has text for . contexts of 256 tokens"):
        LanguageModelSubject(config).write(tmp_path / "stream")
