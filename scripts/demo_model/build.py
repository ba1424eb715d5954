"""Build the demo's corpus and language model: `python -m scripts.demo_model.build --out DIR`."""

import argparse
import dataclasses
import json
import logging
import platform
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from scripts.demo_model.card import render
from scripts.demo_model.corpus import Row, read_rows, write_licence, write_rows
from scripts.demo_model.gates import check
from scripts.demo_model.measure import measure
from scripts.demo_model.recipe import Recipe
from scripts.demo_model.stream import tokenize
from scripts.demo_model.tokenizer import BOS, train_tokenizer
from scripts.demo_model.train import build_model, train

MODULE = "scripts.demo_model.build"


def text_bytes(rows: list[Row]) -> int:
    """Size of the rows' text in UTF-8."""
    return sum(len(text.encode()) for _, text in rows)


def folder_bytes(folder: Path) -> int:
    """Size of the files directly in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def write_corpus(
    train: list[Row], held_out: list[Row], stdlib: Path, folder: Path
) -> None:
    """Write both splits and the licence."""
    folder.mkdir()
    write_rows(train, folder / "train.parquet")
    write_rows(held_out, folder / "heldout.parquet")
    write_licence(stdlib, folder / "LICENSE")


def write_model(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> GPT2LMHeadModel:
    """Write a model folder with float16 weights and return the model as it loads from there."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = folder / "config.json"
    # Loaded as float16, as the weights are stored, it would run ten times slower on a CPU.
    settings = json.loads(config.read_text()) | {"dtype": "float32"}
    config.write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)
    loaded = GPT2LMHeadModel.from_pretrained(folder)
    if loaded.dtype != torch.float32:
        raise RuntimeError(f"The model loads as {loaded.dtype}, not as float32.")
    return loaded.eval()


def write_report(metrics: dict[str, Any], folder: Path, corpus: Path) -> dict[str, Any]:
    """Check the gates and write `metrics.json` and the card; returns the complete figures."""
    sizes = {"model_bytes": folder_bytes(folder), "corpus_bytes": folder_bytes(corpus)}
    metrics = metrics | sizes
    metrics["gates"] = check(metrics)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    (folder / "README.md").write_text(render(metrics))
    return metrics


def replace_folder(new: Path, place: Path, attic: Path) -> None:
    """Put a finished folder in place of an older one by renaming."""
    if place.exists():
        place.rename(attic / f"old-{place.name}")
    new.rename(place)


@dataclasses.dataclass(frozen=True)
class Data:
    """The corpus as rows and as token streams."""

    stdlib: Path
    train: list[Row]
    held_out: list[Row]
    tokenizer: PreTrainedTokenizerFast
    bos: int
    train_stream: torch.Tensor
    held_out_stream: torch.Tensor

    def facts(self) -> dict[str, int]:
        """Sizes of the two splits."""
        return {
            "train_files": len({path for path, _ in self.train}),
            "train_bytes": text_bytes(self.train),
            "train_tokens": int(self.train_stream.ne(self.bos).sum()),
            "held_out_files": len({path for path, _ in self.held_out}),
            "held_out_bytes": text_bytes(self.held_out),
        }


def prepare(recipe: Recipe) -> Data:
    """Read the corpus, train the tokenizer on its training files and tokenize it."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    train_rows, held_out_rows = read_rows(stdlib)
    train_texts = [text for _, text in train_rows]
    tokenizer = train_tokenizer(train_texts, recipe.vocab_size, recipe.context)
    bos = tokenizer.get_vocab()[BOS]
    return Data(
        stdlib=stdlib,
        train=train_rows,
        held_out=held_out_rows,
        tokenizer=tokenizer,
        bos=bos,
        train_stream=tokenize(train_texts, tokenizer, bos),
        held_out_stream=tokenize([text for _, text in held_out_rows], tokenizer, bos),
    )


def describe(
    model: GPT2LMHeadModel, data: Data, recipe: Recipe, minutes: float
) -> dict[str, Any]:
    """The model's measured figures and how it came about."""
    trained_tokens = recipe.steps * recipe.batch * recipe.context
    corpus = data.facts()
    return {
        **measure(
            model,
            data.train_stream,
            data.held_out_stream,
            corpus["held_out_bytes"],
            recipe,
            data.bos,
        ),
        "parameters": model.num_parameters(),
        "trained_tokens": trained_tokens,
        "epochs": trained_tokens / len(data.train_stream),
        "minutes": minutes,
        "threads": torch.get_num_threads(),
        "recipe": dataclasses.asdict(recipe),
        "corpus": corpus,
        "command": f"python -m {MODULE} --out DIR --tokens {recipe.tokens}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def publish(
    model: GPT2LMHeadModel, data: Data, recipe: Recipe, minutes: float, out: Path
) -> dict[str, Any]:
    """Measure and write everything below `out`; returns the model's figures."""
    out.mkdir(parents=True, exist_ok=True)
    attic = Path(tempfile.mkdtemp(prefix=".build-", dir=out))
    try:
        write_corpus(data.train, data.held_out, data.stdlib, attic / "corpus")
        loaded = write_model(model, data.tokenizer, attic / "model")
        facts = describe(loaded, data, recipe, minutes)
        metrics = write_report(facts, attic / "model", attic / "corpus")
        for name in ("corpus", "model"):
            replace_folder(attic / name, out / name, attic)
    finally:
        shutil.rmtree(attic)
    return metrics


def build(out: Path, recipe: Recipe) -> dict[str, Any]:
    """Build corpus and model below `out`; returns the model's figures."""
    data = prepare(recipe)
    model = build_model(recipe, data.bos)
    minutes = train(model, data.train_stream, recipe, data.bos)
    return publish(model, data, recipe, minutes, out)


def main() -> int:
    """Command line; exits with 1 if a gate fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for corpus/ and model/"
    )
    parser.add_argument(
        "--tokens", type=int, default=Recipe.tokens, help="training tokens"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    metrics = build(args.out, Recipe(tokens=args.tokens))
    failed = [row for row in metrics["gates"] if not row["passed"]]
    for row in failed:
        print(
            f"{row['gate']}: {row['value']:.6g} is not {row['limit']}.", file=sys.stderr
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
