"""Datasets on this machine, in a folder or a file. SAELens cannot open some of them by their path."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from sae_lens.config import HfDataset, LanguageModelSAERunnerConfig
from transformers import AutoTokenizer

from sae_lens_alloc.errors import in_one_sentence

TOKEN_COLUMNS = ("tokens", "input_ids")
TEXT_COLUMNS = ("text", "problem")
CHAT_COLUMNS = ("conversation", "conversations", "messages", "text")
# `save_to_disk` writes one of these into its folder.
SAVED_DATASET_FILENAMES = ("state.json", "dataset_dict.json")
DATA_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".txt")
# SAELens' pretokenize runner writes there which tokenizer it used.
TOKENIZATION_FILENAME = "sae_lens.json"


def override_for_local_dataset(
    cfg: LanguageModelSAERunnerConfig[Any],
) -> HfDataset | None:
    """
    The dataset of `cfg.dataset_path`, to be passed as `override_dataset`, if it is on this
    machine and SAELens cannot open it by its path. None otherwise.

    SAELens asks the hub for the tokenizer of a tokenized dataset. It reads neither what
    `save_to_disk` wrote nor a single file. It takes a folder named "parquet" for a file format.

    Raises:
        ValueError: if the dataset cannot be read.
    """
    path = Path(cfg.dataset_path)
    if not cfg.dataset_path or not path.exists():
        return None
    dataset = open_local_dataset(cfg)
    by_path = (
        path.is_dir()
        and not _was_saved_to_disk(path)
        and (path.is_absolute() or len(path.parts) > 1)
    )
    return None if by_path and not _is_tokenized(cfg, dataset) else dataset


def open_local_dataset(cfg: LanguageModelSAERunnerConfig[Any]) -> HfDataset:
    """
    Opens a dataset on this machine: a folder that `save_to_disk` wrote, or a folder or a file
    of parquet, arrow, jsonl or another format that `datasets` reads.

    Raises:
        ValueError: if it cannot be read.
    """
    return open_dataset(Path(cfg.dataset_path), cfg.streaming)


def open_dataset(
    path: Path, streaming: bool = False, key: str = "dataset_path"
) -> HfDataset:
    """
    Opens a dataset as `open_local_dataset` does.

    Args:
        path: Its folder or file.
        streaming: Whether files are read row by row, instead of being converted first.
        key: The setting that messages name.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        if _was_saved_to_disk(path):
            dataset = load_from_disk(str(path))
            return _train_split(dataset)
        folder, files = (path, None) if path.is_dir() else (path.parent, path.name)
        return load_dataset(
            str(folder.resolve()),
            data_files=files,
            split="train",
            streaming=streaming,
        )
    except Exception as error:  # of many kinds: datasets, pyarrow, file formats
        raise ValueError(_unreadable(path, error, key)) from error


def _train_split(dataset: Dataset | DatasetDict) -> Dataset:
    if not isinstance(dataset, DatasetDict):
        return dataset
    if "train" not in dataset:
        raise ValueError(
            f"it has the splits {', '.join(map(repr, dataset))}, of which none is 'train': give "
            "the folder of one."
        )
    return dataset["train"]


def check_local_dataset(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """
    Reads the first row of a dataset on this machine, or the first one that holds text.

    Raises:
        ValueError: if it cannot be read, or SAELens could not train on it.
    """
    path = Path(cfg.dataset_path)
    rows = _rows(path, open_local_dataset(cfg))
    row = next(rows, None)
    if row is None:
        raise ValueError(f"dataset_path {str(path)!r} holds no rows.")
    column = _column(cfg, row)
    if column is None:
        wanted = (
            CHAT_COLUMNS if cfg.use_chat_formatting else TOKEN_COLUMNS + TEXT_COLUMNS
        )
        raise ValueError(
            f"dataset_path {str(path)!r} has the columns {', '.join(map(repr, row))}, and "
            f"none of {', '.join(map(repr, wanted))}."
        )
    value = row[column]
    if column in TEXT_COLUMNS and value is None:  # training skips such rows
        value = next((r[column] for r in rows if r[column] is not None), None)
    if column in TOKEN_COLUMNS and not cfg.use_chat_formatting:
        if not isinstance(value, list) or not all(isinstance(t, int) for t in value):
            raise ValueError(
                f"the column {column!r} of dataset_path {str(path)!r} must hold lists of "
                "token ids."
            )
        if len(value) < cfg.context_size:
            raise ValueError(
                f"dataset_path {str(path)!r} is tokenized in contexts of {len(value)} "
                f"tokens, fewer than context_size ({cfg.context_size})."
            )
        _check_tokenizer(cfg, path)
    elif column in TEXT_COLUMNS and not isinstance(value, str):
        raise ValueError(
            f"the column {column!r} of dataset_path {str(path)!r} must hold text, but "
            + (
                "every row holds null."
                if value is None
                else f"the first row holds {type(value).__name__}."
            )
        )


def _rows(path: Path, dataset: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """The rows of a dataset. An error while they are read becomes a ValueError in one sentence."""
    try:
        yield from dataset
    except Exception as error:
        raise ValueError(_unreadable(path, error)) from error


def _was_saved_to_disk(path: Path) -> bool:
    return any((path / name).is_file() for name in SAVED_DATASET_FILENAMES)


def _column(cfg: LanguageModelSAERunnerConfig[Any], row: dict[str, Any]) -> str | None:
    """The column that SAELens would train on, None if there is none."""
    wanted = CHAT_COLUMNS if cfg.use_chat_formatting else TOKEN_COLUMNS + TEXT_COLUMNS
    return next((name for name in wanted if name in row), None)


def _is_tokenized(cfg: LanguageModelSAERunnerConfig[Any], dataset: HfDataset) -> bool:
    if cfg.use_chat_formatting:
        return False
    row: Any = next(iter(dataset), {})
    return any(name in row for name in TOKEN_COLUMNS)


def _check_tokenizer(cfg: LanguageModelSAERunnerConfig[Any], path: Path) -> None:
    """Compares tokenizers if both are on this machine, as SAELens does with datasets of the hub."""
    try:
        recorded = json.loads((path / TOKENIZATION_FILENAME).read_text())
        names = (recorded["tokenizer_name"], cfg.model_name)
        theirs, ours = (
            AutoTokenizer.from_pretrained(name, local_files_only=True).get_vocab()
            for name in names
        )
    except (OSError, ValueError, KeyError, TypeError):
        return
    if theirs != ours:
        raise ValueError(
            f"dataset_path {str(path)!r} was tokenized with the tokenizer of {names[0]!r}, "
            f"which is not that of model_name {cfg.model_name!r}."
        )


def _unreadable(path: Path, error: Exception, key: str = "dataset_path") -> str:
    """The message of a dataset that cannot be read: the root cause, and the file of a folder."""
    while error.__cause__ is not None:
        error = cast(Exception, error.__cause__)
    reason, file = in_one_sentence(error), _damaged_file(path)
    if file is None:
        return f"{key} {str(path)!r} cannot be read: {reason}"
    # datasets fails like this on a file without rows
    if file.suffix == ".parquet" and reason.startswith("BatchSize must be greater"):
        reason = "it holds no rows"
    return f"{key} {str(path)!r} cannot be read: {str(file)!r}: {reason}"


def _damaged_file(path: Path) -> Path | None:
    """The first file of a folder that cannot be read to its end, None if there is none."""
    if not path.is_dir() or _was_saved_to_disk(path):
        return None
    for file in sorted(path.rglob("*.*")):
        if not file.is_file() or file.suffix not in DATA_SUFFIXES:
            continue
        try:
            rows = load_dataset(
                str(file.parent.resolve()),
                data_files=file.name,
                split="train",
                streaming=True,
            )
            for _ in rows.with_format("arrow"):
                pass
        except Exception:
            return file
    return None
