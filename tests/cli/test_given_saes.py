"""`report SAE` and `compare SAE1 SAE2`, on SAEs of the shipped language model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.load_model import load_model
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from tests.cli.commands import CONFIG, DEMO, contents, invoke

pytestmark = pytest.mark.usefixtures("few_calibration_tokens")

HOOK = "transformer.h.0"


@pytest.fixture(scope="module")
def given(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Ours, which has 4 features per token, a topk SAE of 5, a standard one of many."""
    folder = tmp_path_factory.mktemp("given")
    shutil.copytree(saved, folder / "ours")
    metadata = SAE.load_from_disk(saved).cfg.metadata
    torch.manual_seed(0)
    topk = TopKSAE(TopKSAEConfig(d_in=192, d_sae=32, k=5, metadata=metadata))
    standard = StandardSAE(StandardSAEConfig(d_in=192, d_sae=48, metadata=metadata))
    for name, sae in {"topk": topk, "standard": standard}.items():
        sae.save_model(folder / name)
    return [str(folder / name) for name in ("ours", "topk", "standard")]


def activations_of(contexts: torch.Tensor) -> torch.Tensor:
    """Activations of all tokens but BOS, by hand."""
    model: Any = load_model(
        "AutoModelForCausalLM", str(DEMO / "model"), device="cpu", hook_names=[HOOK]
    )
    _, cache = model.run_with_cache(contexts, names_filter=[HOOK])
    return cache[HOOK][contexts != model.tokenizer.bos_token_id]


def first_contexts(n: int) -> torch.Tensor:
    """The first contexts of the demo's corpus, cut by hand."""
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO / "model")
    ids: list[int] = []
    for text in pq.read_table(DEMO / "corpus" / "train.parquet")["text"].to_pylist():
        ids += [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
        if len(ids) > 300 * n:
            break
    contexts: list[list[int]] = []
    while len(contexts) < n:
        own = (
            ids if ids[0] == tokenizer.bos_token_id else [tokenizer.bos_token_id, *ids]
        )
        contexts.append(own[:256])
        ids = own[256:]
    return torch.tensor(contexts)


def figures(page: Path) -> dict[str, Any]:
    return json.loads(page.read_text())


@torch.no_grad()
def test_saes_are_compared_as_saved_and_at_equal_l0(given: list[str], tmp_path: Path):
    before = {name: contents(Path(name)) for name in given}
    output = tmp_path / "out"
    result = invoke("compare", *given, "--output", str(output), "--tokens", "1024")
    assert result.exit_code == 0, result.stderr
    assert {name: contents(Path(name)) for name in given} == before
    assert {path.name for path in output.iterdir()} == {"figures.json", "report.html"}
    found = figures(output / "figures.json")
    as_saved, equal = found["as_saved"], found["at_equal_l0"]
    # the even ones of 8 contexts measure, by hand
    x = activations_of(first_contexts(8)[::2])
    for name in given:
        sae = SAE.load_from_disk(name)
        acts = sae.encode(x)
        own = as_saved[Path(name).name]
        assert own["n_tokens"] == len(x)
        assert own["l0"] == pytest.approx((acts > 0).sum(1).double().mean().item())
        assert own["dead_features"] == int((acts > 0).sum(0).eq(0).sum())
        error = (sae.decode(acts) - x).double().square().sum()
        variance = (x - x.mean(0)).double().square().sum()
        ev = 1 - (error / variance).item()
        assert own["explained_variance"] == pytest.approx(ev, rel=1e-4)
    # the topk SAE keeps its rule, so its L0 is that of all
    assert equal["target_l0"] == as_saved["topk"]["l0"] == 5
    assert equal["saes"]["topk"] == as_saved["topk"]
    assert equal["saes"]["standard"]["l0"] == pytest.approx(5, rel=0.2)
    assert as_saved["standard"]["l0"] > 15
    page = (output / "report.html").read_text()
    assert "At the same number of features per token" in page
    for line in ("As saved, on ", "At L0 5, on ", "ours", "topk", "standard"):
        assert line in result.stdout
    # what is there stays
    result = invoke("compare", *given, "--output", str(output))
    assert result.exit_code == 1
    assert "is not empty: give --overwrite" in result.stderr


def test_a_wanted_l0_and_what_cannot_have_it(given: list[str], tmp_path: Path):
    options = ("--output", str(tmp_path / "out"), "--tokens", "512", "--l0", "3")
    result = invoke("compare", *given, *options)
    assert result.exit_code == 0, result.stderr
    equal = figures(tmp_path / "out" / "figures.json")["at_equal_l0"]
    assert equal["target_l0"] == 3
    assert set(equal["saes"]) == {"ours", "standard"}
    assert equal["left_out"]["topk"].startswith(
        "its rule gives every token 5.00 features; `sae-lens-alloc calibrate`"
    )
    assert "topk is left out at equal L0: its rule gives" in result.stdout


def test_report_of_an_sae_with_and_without_a_training(given: list[str], tmp_path: Path):
    output = tmp_path / "new" / "report.html"
    options = ("--output", str(output), "--tokens", "600")
    result = invoke("report", given[0], *options)
    assert result.exit_code == 0, result.stderr
    assert f"saved in {output}; open it in a browser" in result.stdout
    page = output.read_text()
    assert "<h2>Training</h2>" in page and "seconds of training" not in page
    assert "demo/model at transformer.h.0" in page and str(DEMO) not in page
    result = invoke("report", given[2], *options)
    assert result.exit_code == 1
    assert f"--output '{output}' exists: give --overwrite" in result.stderr
    result = invoke("report", given[2], *options, "--overwrite", "--config", CONFIG,
                    "--model", str(DEMO / "model"), "--dataset", str(DEMO / "corpus"))  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "<h2>Training</h2>" not in output.read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("/no/such",), "'/no/such' is neither a folder nor RELEASE:ID"),
        (("no-such.yaml",), "there is no file 'no-such.yaml'."),
        (
            (CONFIG, "--l0", "3"),
            "--l0 is for SAEs that you have, and not for a grid: put its settings into the file.",
        ),
        (
            ("GIVEN", "--jobs", "2"),
            "--jobs is for a grid, whose CONFIG.yaml comes first: leave it out.",
        ),
        (("GIVEN", "--l0", "0"), "no thresholds give an L0 of 0"),
        (("GIVEN", "--device", "gpu"), "--device must be a torch device"),
        (("GIVEN", "GIVEN"), "the same SAE is given twice: give each once."),
        (
            ("GIVEN", "--dataset", "/no/such"),
            "dataset_path is '/no/such', but there is no such folder.",
        ),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(
    given: list[str], tmp_path: Path, arguments: tuple[str, ...], sentence: str
):
    words = [given[1] if word == "GIVEN" else word for word in arguments]
    result = invoke("compare", *words, "--output", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and sentence in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
