"""Data files that are damaged or empty are said in one sentence, with the file and the reason."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset
from transformer_lens.HookedTransformer import HookedRootModule

from sae_lens_alloc import AllocSAETrainingRunner, MutualChoiceTrainingSAEConfig
from sae_lens_alloc.activations.local_dataset import check_local_dataset
from tests.activations.test_activations_store import contexts, made, store
from tests.training.conftest import D_MODEL, lm_config

SAE = MutualChoiceTrainingSAEConfig(d_in=D_MODEL, d_sae=64, k=4)
NULL = None


def write(folder: Path, texts: list[Any], name: str = "train.parquet") -> Path:
    folder.mkdir(exist_ok=True)
    table = pa.table({"text": pa.array(texts, pa.string())})
    pq.write_table(table, folder / name, row_group_size=4)
    return folder / name


def check(folder: Path, streaming: bool) -> None:
    check_local_dataset(lm_config(SAE, dataset_path=str(folder), streaming=streaming))


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Parquet file size is 0 bytes"),
        (b"no parquet", "Parquet magic bytes not found"),
    ],
)
def test_a_damaged_parquet_is_named_with_the_reason(
    tmp_path: Path, content: bytes, reason: str, streaming: bool
):
    folder = tmp_path / "data"
    write(folder, ["a text"] * 8, "b.parquet")
    damaged = write(folder, [], "a.parquet")
    damaged.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        check(folder, streaming)
    message = str(raised.value)
    assert message.startswith(f"dataset_path '{folder}' cannot be read: '{damaged}': ")
    assert reason in message
    assert "An error occurred" not in message


@pytest.mark.parametrize("streaming", [True, False])
def test_a_parquet_without_rows_is_named(tmp_path: Path, streaming: bool):
    file = write(tmp_path / "data", [])
    with pytest.raises(ValueError, match=f"'{file}': it holds no rows"):
        check(tmp_path / "data", streaming)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_json_line_that_is_cut_off_is_named(tmp_path: Path, streaming: bool):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(ValueError, match="train.jsonl': JSON parse error"):
        check(tmp_path, streaming)


def test_texts_may_be_null_but_not_all_of_them(tmp_path: Path):
    write(tmp_path / "some", [NULL, NULL, "a text"])
    check(tmp_path / "some", True)
    write(tmp_path / "all", [NULL] * 5)
    with pytest.raises(ValueError, match="must hold text, but every row holds null"):
        check(tmp_path / "all", True)


def test_rows_of_null_and_empty_ones_are_passed_over(
    demo_model: HookedRootModule,
    demo_text: Dataset,
    caplog: pytest.LogCaptureFixture,
):
    texts = list(demo_text["text"][:6])
    odd = Dataset.from_dict({"text": [NULL, *texts[:3], "", NULL, *texts[3:]]})
    plain = store(demo_model, Dataset.from_dict({"text": texts}))
    expected = [row.tolist() for row in plain.iterable_sequences]
    ours = made(demo_model, odd, dataset_path="odd")
    assert contexts(ours, len(expected)) == expected
    assert caplog.text.count("dataset_path 'odd' holds null") == 1
    assert "row 1 of" in caplog.text


@pytest.mark.parametrize("where", [0.02, 0.5])
def test_damage_on_the_way_is_one_sentence(
    demo_model: HookedRootModule, demo_text: Dataset, tmp_path: Path, where: float
):
    file = write(tmp_path / "data", list(demo_text["text"][:20]))
    content = bytearray(file.read_bytes())
    begin = int(where * len(content))
    content[begin : begin + 200] = bytes(200)
    file.write_bytes(content)
    text: Any = load_dataset(str(tmp_path / "data"), split="train", streaming=True)
    # by how far the file is read ahead, SAELens meets the damage at the first row, or we later
    with pytest.raises(
        ValueError, match=r"^dataset_path 'data' cannot be read after row \d+: Corrupt"
    ):
        contexts(made(demo_model, text, dataset_path="data"), 10_000)


def test_a_tokenized_row_that_is_too_short_is_named(demo_model: HookedRootModule):
    rows = [list(range(64)), list(range(64)), list(range(63))]
    ours = made(demo_model, Dataset.from_dict({"tokens": rows}), dataset_path="ids")
    with pytest.raises(
        ValueError, match="row 3 of dataset_path 'ids' has 63 tokens, fewer"
    ):
        contexts(ours, 3)


def test_a_given_dataset_without_rows_is_refused(demo_model: HookedRootModule):
    with pytest.raises(ValueError, match="override_dataset holds no rows"):
        AllocSAETrainingRunner(
            lm_config(SAE), Dataset.from_dict({"text": []}), demo_model
        )
