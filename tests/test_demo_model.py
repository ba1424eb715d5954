"""What builds the demo's language model, on a few files and with a tiny recipe."""

import json
import sysconfig
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from scripts.demo_model import build
from scripts.demo_model.corpus import Row, chunks, is_held_out
from scripts.demo_model.recipe import Recipe

TINY = Recipe(
    vocab_size=300,
    context=32,
    width=16,
    layers=2,
    heads=1,
    hook_block=1,
    tokens=10 * 8 * 32,
    warm_up_steps=2,
)
STDLIB = Path(sysconfig.get_path("stdlib"))


def few_rows(_stdlib: Path) -> tuple[list[Row], list[Row]]:
    """Six training files and one that is held out, of a few kilobytes each."""
    names = sorted(path.name for path in STDLIB.glob("*.py"))
    small = [name for name in names if 2_000 < (STDLIB / name).stat().st_size < 8_000]
    rows = [(name, (STDLIB / name).read_text(encoding="utf-8")) for name in small]
    held_out = [row for row in rows if is_held_out(row[0])][:1]
    return [row for row in rows if not is_held_out(row[0])][:6], held_out


def test_corpus_model_and_card_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(build, "read_rows", few_rows)
    metrics = build.build(tmp_path, TINY)

    assert {path.name for path in tmp_path.iterdir()} == {"corpus", "model"}
    train, held_out = (
        pd.read_parquet(tmp_path / "corpus" / f"{split}.parquet")
        for split in ("train", "heldout")
    )
    assert (len(train), len(held_out)) == (6, 1)
    assert not set(train["path"]) & set(held_out["path"])

    folder = tmp_path / "model"
    model = GPT2LMHeadModel.from_pretrained(folder)
    assert (model.dtype, model.config.n_embd) == (torch.float32, 16)
    assert len(AutoTokenizer.from_pretrained(folder)) == 300
    assert metrics["trained_tokens"] == 10 * 8 * 32
    # ten steps learn that bytes are not equally likely
    assert metrics["held_out_loss"] < torch.tensor(300.0).log()
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    # so small a model cannot pass, and is said not to
    assert not all(gate["passed"] for gate in metrics["gates"])


def test_the_card_names_a_command_that_is_there():
    module = build.MODULE.replace(".", "/") + ".py"
    assert (Path(__file__).parents[1] / module).exists()
    card = Path(__file__).parents[1] / "sae_lens_alloc" / "demo" / "model" / "README.md"
    assert f"python -m {build.MODULE} --out" in card.read_text()


def test_a_text_is_cut_at_line_ends():
    assert chunks("ab\ncd\nef", limit=6) == ["ab\ncd\n", "ef"]
    assert chunks("abcdefgh\nij\n", limit=4) == ["abcdefgh\n", "ij\n"]
    assert chunks("") == []
