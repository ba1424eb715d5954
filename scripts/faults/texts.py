"""Datasets that are damaged, empty, or odd."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from scripts.faults.forks import Action, Case, Check
from scripts.faults.older_run import DEMO, train

BOS = 0  # of the shipped tokenizer
FILE = "data/train.parquet"
# 16 steps of 256 tokens, which reads all of the 20 texts
ALL = "training_tokens=40960"


@cache
def short_texts(n: int) -> tuple[str, ...]:
    found: list[str] = pq.read_table(DEMO / "corpus" / "train.parquet")[
        "text"
    ].to_pylist()
    return tuple([text for text in found if 500 < len(text) < 3000][:n])


def write(rows: Sequence[object], column: str = "text", file: str = FILE) -> None:
    os.makedirs("data", exist_ok=True)
    pq.write_table(pa.table({column: list(rows)}), file, row_group_size=4)


def texts() -> Iterator[Case]:
    good = list(short_texts(20))
    contents: dict[str, Sequence[object]] = {
        "good texts": good,
        "null first": [None, *good],
        "null later": [*good[:10], None, *good[10:]],
        "empty texts in between": ["", *good[:10], "", "", *good[10:]],
        "nothing but null": [None] * 20,
        "nothing but empty texts": [""] * 20,
        "nothing but spaces": [" " * 2000] * 20,
        "texts of one letter": ["a"] * 20,
        "numbers": list(range(20)),
        "one short text": ["a few words"],
        "odd characters": ["\x00\ud7ff\U0010ffff" * 300] * 20,
    }
    # whatever has tokens is text
    usable = (
        "good",
        "null first",
        "null later",
        "empty texts in",
        "nothing but s",
        "odd",
    )
    for name, rows in contents.items():
        for streaming in ("true", "false"):
            yield case(
                f"{name}, streaming {streaming}",
                partial(write, rows),
                f"streaming={streaming}",
                ALL,
                check=trained if name.startswith(usable) else one_sentence,
            )
    for name, change in damages().items():
        for streaming in ("true", "false"):

            def damaged(change: Callable[[bytes], bytes] = change) -> None:
                write(short_texts(20))
                path = Path(FILE)
                path.write_bytes(change(path.read_bytes()))

            yield case(
                f"parquet {name}, streaming {streaming}",
                damaged,
                f"streaming={streaming}",
                ALL,
                check=named("cannot be read"),
            )
    yield from tokenized()

    def json_lines() -> None:
        os.makedirs("data")
        line = '{"text": "' + "some words " * 200 + '"}\n'
        Path("data/train.jsonl").write_text(9 * line + '{"text": ')

    for streaming in ("true", "false"):
        yield case(
            f"a line cut off, streaming {streaming}",
            json_lines,
            f"streaming={streaming}",
            ALL,
            check=named("train.jsonl"),
        )
    for size in (1, 2, 3):
        for bos in ("true", "false"):
            yield case(
                f"context_size {size}, prepend_bos {bos}",
                partial(write, good[:3]),
                f"context_size={size}",
                f"prepend_bos={bos}",
                "n_batches_in_buffer=256",
                check=named("no room") if (size, bos) == (1, "true") else trained,
            )
        yield Case(
            f"calibrate with context_size {size}",
            [
                *("calibrate", "out", "--output", "new", "--tokens", "64"),
                *("--config", "run.yaml"),
            ],
            partial(write_config, size),
        )
    yield case(
        "only the BOS of each context",
        partial(write, good),
        "seqpos_slice=[1]",
        "n_batches_in_buffer=256",
        check=one_sentence,
    )


def damages() -> dict[str, Callable[[bytes], bytes]]:
    def zeros(content: bytes) -> bytes:
        middle = len(content) // 2
        return content[:middle] + bytes(200) + content[middle + 200 :]

    return {
        "cut in half": lambda content: content[: len(content) // 2],
        "with zeros inside": zeros,
        "of no bytes": lambda _: b"",
        "that is text": lambda _: b"hello",
    }


def tokenized() -> Iterator[Case]:
    special = [[BOS] * 256] * 40
    ordinary = [list(range(2, 258))] * 40
    rows: dict[str, tuple[list[object], Check]] = {
        "special tokens only": ([*special], one_sentence),
        "special tokens first": ([*special, *ordinary], trained),
        "a short row later": ([*ordinary, [2, 3, 4]], one_sentence),
        "a null row later": ([*ordinary, None], trained),
        "no tokens": ([[]] * 40, one_sentence),
    }
    for name, (content, check) in rows.items():
        yield case(
            f"tokenized: {name}",
            partial(write, content, "tokens"),
            "context_size=256",
            "streaming=false",
            ALL,
            check=check,
        )


def write_config(context_size: int) -> None:
    write(short_texts(5))
    lines = [
        "model_class_name: AutoModelForCausalLM",
        f"model_name: {DEMO / 'model'}",
        "hook_name: transformer.h.0",
        "dataset_path: data",
        "is_dataset_tokenized: false",
        "exclude_special_tokens: true",
        f"context_size: {context_size}",
        "train_batch_size_tokens: 16",
        "training_tokens: 256",
        "checkpoint_path: null",
        "sae: {architecture: mutual_choice, d_in: 192, d_sae: 64, k: 4}",
    ]
    Path("run.yaml").write_text("\n".join(lines) + "\n")


def case(name: str, prepare: Action, *settings: str, check: Check) -> Case:
    args = train("dataset_path=data", "output_path=new", *settings)
    return Case(name, args, prepare, check)


def trained(code: int, said: str) -> str | None:
    return None if code == 0 else f"traceback: {said[-500:]}"


def one_sentence(code: int, said: str) -> str | None:
    # on the line of a progress bar, perhaps
    n_errors = len(re.findall(r"(?:^|\])error: ", said, re.MULTILINE))
    if code == 1 and n_errors == 1 and "SAE_LENS_ALLOC_TRACEBACK" not in said:
        return None
    return f"ignored: exit code {code}" if code == 0 else f"traceback: {said[-500:]}"


def named(words: str) -> Check:
    """One sentence, with these words."""

    def check(code: int, said: str) -> str | None:
        if (wrong := one_sentence(code, said)) is not None:
            return wrong
        return None if words in said else f"traceback: not said: {words}"

    return check
