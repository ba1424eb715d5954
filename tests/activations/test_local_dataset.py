"""Datasets on this machine, tokenized ones above all, by absolute and relative paths."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from sae_lens import SAE

from sae_lens_alloc import MutualChoiceTrainingSAEConfig
from sae_lens_alloc.activations.local_dataset import (
    check_local_dataset,
    override_for_local_dataset,
)
from sae_lens_alloc.activations.on_text import gather_activations
from sae_lens_alloc.comparison.config import ComparisonConfig
from sae_lens_alloc.comparison.language_model import LanguageModelSubject
from tests.cli.commands import CONFIG, TINY, invoke
from tests.training.conftest import CORPUS, D_MODEL, HOOK, MODEL, lm_config

CONTEXT = 32
TOKENS = torch.randint(
    1, 1536, (400, CONTEXT), generator=torch.Generator().manual_seed(0)
).tolist()


def config(path: Path | str, **overrides: Any) -> Any:
    sae = MutualChoiceTrainingSAEConfig(d_in=D_MODEL, d_sae=64, k=4)
    settings = {"context_size": CONTEXT, "dataset_path": str(path), **overrides}
    return lm_config(sae, **settings)


def as_saved(dataset: Dataset, folder: Path) -> Path:
    dataset.save_to_disk(folder)
    return folder


def as_saved_splits(dataset: Dataset, folder: Path) -> Path:
    splits: Any = {"test": dataset.select([0]), "train": dataset}
    DatasetDict(splits).save_to_disk(folder)
    return folder


def as_parquet(dataset: Dataset, folder: Path) -> Path:
    dataset.to_parquet(folder / "part.parquet")
    return folder


def as_jsonl(dataset: Dataset, folder: Path) -> Path:
    dataset.to_json(folder / "part.jsonl")
    return folder


def as_arrow(dataset: Dataset, folder: Path) -> Path:
    dataset.save_to_disk(folder / "saved")
    (folder / "arrow").mkdir()
    (arrow,) = (folder / "saved").glob("*.arrow")
    shutil.copy(arrow, folder / "arrow")
    return folder / "arrow"


def as_file(dataset: Dataset, folder: Path) -> Path:
    return as_parquet(dataset, folder) / "part.parquet"


FORMS = [as_saved, as_saved_splits, as_parquet, as_jsonl, as_arrow, as_file]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("column", ["tokens", "input_ids"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_rows(
    form: Callable[[Dataset, Path], Path], column: str, streaming: bool, tmp_path: Path
):
    path = form(Dataset.from_dict({column: TOKENS}), tmp_path)
    cfg = config(path, streaming=streaming)
    check_local_dataset(cfg)
    dataset: Any = override_for_local_dataset(cfg)
    assert [row[column] for row in dataset] == TOKENS


def test_text_is_left_to_saelens_where_it_can_read_it(tmp_path: Path):
    assert override_for_local_dataset(config(CORPUS)) is None
    assert override_for_local_dataset(config("a/name-on-the-hub")) is None
    saved = as_saved(Dataset.from_dict({"text": ["a text"]}), tmp_path)
    dataset: Any = override_for_local_dataset(config(saved))
    assert dataset[0] == {"text": "a text"}


@pytest.mark.slow
@pytest.mark.usefixtures("few_calibration_tokens", "restore_signals")
def test_training_on_local_tokens_by_any_path_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    dataset = Dataset.from_dict({"tokens": TOKENS})
    for name in ("saved", "parquet"):
        (tmp_path / name).mkdir()
    as_saved(dataset, tmp_path / "saved")
    as_parquet(dataset, tmp_path / "parquet")
    weights: list[torch.Tensor] = []
    for path in (
        tmp_path / "saved",
        "saved",
        "./saved",
        tmp_path / "parquet",
        "parquet",
    ):
        output = tmp_path / f"output{len(weights)}"
        result = invoke(
            *("train", CONFIG, *TINY, f"context_size={CONTEXT}"),
            *(f"dataset_path={path}", f"output_path={output}"),
            *("n_batches_in_buffer=16", "is_dataset_tokenized=true"),
        )
        assert result.exit_code == 0, result.stderr
        assert "override" not in result.stderr
        weights.append(SAE.load_from_disk(output).W_dec)
    assert all(torch.equal(other, weights[0]) for other in weights)

    # and its thresholds are set on the same text
    result = invoke(
        *("calibrate", str(tmp_path / "output0"), "--output", str(tmp_path / "new")),
        *("--l0", "3", "--tokens", "1024"),
    )
    assert result.exit_code == 0, result.stderr


@pytest.mark.slow
def test_activations_of_local_tokens_are_gathered_and_compared_on(tmp_path: Path):
    as_saved(Dataset.from_dict({"tokens": TOKENS}), tmp_path / "saved")
    cfg = config(tmp_path / "saved")
    assert gather_activations(cfg, 100).shape == (100, D_MODEL)
    comparison = ComparisonConfig(
        k=(2.0,),
        lr=(1e-3,),
        seeds=(0,),
        rows={"ours": {"architecture": "mutual_choice"}},
        heldout_path=str(Path(CORPUS) / "heldout.parquet"),
        shared={
            "model_name": MODEL,
            "model_class_name": "AutoModelForCausalLM",
            "hook_name": HOOK,
            "dataset_path": str(tmp_path / "saved"),
            "context_size": CONTEXT,
            "training_tokens": 256,
            "train_batch_size_tokens": 64,
            "store_batch_size_prompts": 2,
            "sae": {"d_in": D_MODEL, "d_sae": 16},
        },
    )
    LanguageModelSubject(comparison).write(tmp_path / "stream")
    assert any((tmp_path / "stream").iterdir())


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"title": ["a"]}, "has the columns 'title', and none of 'tokens'"),
        (
            {"tokens": [[1] * 31]},
            "in contexts of 31 tokens, fewer than context_size (32)",
        ),
        ({"tokens": ["a text"]}, "must hold lists of token ids"),
        ({"text": [None, None]}, "must hold text, but every row holds null"),
        ({"text": [3]}, "must hold text, but the first row holds int"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_one_sentence(
    columns: dict[str, Any], sentence: str, tmp_path: Path
):
    path = as_parquet(Dataset.from_dict(columns), tmp_path)
    with pytest.raises(ValueError) as error:
        check_local_dataset(config(path))
    assert str(error.value).startswith(("dataset_path", "the column"))
    assert str(path) in str(error.value)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("streaming", "sentence"),
    [(True, "holds no rows"), (False, "corresponds to no data")],
)
def test_no_rows_are_one_sentence(tmp_path: Path, streaming: bool, sentence: str):
    path = as_parquet(Dataset.from_dict({"tokens": []}), tmp_path)
    with pytest.raises(ValueError, match=sentence):
        check_local_dataset(config(path, streaming=streaming))


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("kept", [0, 3, 100, 0.5, 0.99])
def test_a_damaged_parquet_file_is_one_sentence_with_the_reason(
    kept: float, streaming: bool, tmp_path: Path
):
    whole = (Path(CORPUS) / "train.parquet").read_bytes()
    kept = int(kept if kept > 1 else kept * len(whole))
    (tmp_path / "train.parquet").write_bytes(whole[:kept])
    with pytest.raises(ValueError) as error:
        check_local_dataset(config(tmp_path, streaming=streaming))
    assert str(error.value).startswith(
        f"dataset_path {str(tmp_path)!r} cannot be read: "
    )
    assert "\n" not in str(error.value)
    assert "arquet" in str(error.value)


def test_a_saved_dataset_without_a_train_split_is_one_sentence(tmp_path: Path):
    DatasetDict({"test": Dataset.from_dict({"tokens": TOKENS})}).save_to_disk(tmp_path)
    with pytest.raises(
        ValueError, match="has the splits 'test', of which none is 'train'"
    ):
        check_local_dataset(config(tmp_path))


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path):
    """As SAELens does with those of the hub, by what its pretokenize runner records."""
    path = as_saved(Dataset.from_dict({"tokens": TOKENS}), tmp_path / "saved")
    assert len(load_from_disk(str(path))) == len(TOKENS)
    record = path / "sae_lens.json"
    record.write_text(json.dumps({"tokenizer_name": MODEL}))
    check_local_dataset(config(path))

    other = shutil.copytree(MODEL, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second, *_ = [token for token in vocabulary if len(token) == 1]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    record.write_text(json.dumps({"tokenizer_name": str(other)}))
    with pytest.raises(ValueError, match="was tokenized with the tokenizer of"):
        check_local_dataset(config(path))
