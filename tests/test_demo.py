"""The demo, run for real in its quick form, and what it leaves behind."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from plotly.offline import get_plotlyjs
from sae_lens import SAE
from safetensors.torch import load_file

from sae_lens_alloc.demo.methods import CORPUS, demo_configs
from sae_lens_alloc.demo.run import run_demo
from tests.features.reading import data_of

pytestmark = pytest.mark.slow

NAMES = ("mutual_choice", "batchtopk")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("demo") / "output"
    run_demo(output, quick=True, overwrite=False)
    return output


@pytest.fixture(scope="module")
def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())


def test_the_results_are_sane(results: dict[str, Any]):
    assert results["quick"] is True
    assert list(results["runs"]) == list(NAMES)
    for run in results["runs"].values():
        assert run["explained_variance"] > 0.5
        assert 0.5 < run["ce_recovered_mean"] <= 1
        assert 0.5 < run["ce_recovered_zero"] <= 1
        assert run["ce_loss"] < run["ce_loss_with_sae"] < run["ce_loss_mean_ablated"]
        assert run["n_features"] == 3072
        assert 0 <= run["dead_features"] <= run["rare_features"] <= run["n_features"]
        assert sum(run["l0_histogram"]) == run["n_tokens"] > 10_000
        assert run["seconds"] > 0
        assert run["zipf"]["alpha"] > 0


def test_both_are_compared_at_equal_sparsity(results: dict[str, Any]):
    for run in results["runs"].values():
        assert run["l0"] == pytest.approx(16, rel=0.1)  # L0 differs by document


@pytest.mark.parametrize("name", NAMES)
def test_the_saes_are_stock_jumprelu(output: Path, results: dict[str, Any], name: str):
    sae = SAE.load_from_disk(output / name)
    assert sae.cfg.architecture() == "jumprelu"
    assert sae.cfg.metadata.hook_name == "transformer.h.2"
    x = torch.randn(5, sae.cfg.d_in)
    assert sae(x).shape == x.shape
    densities = load_file(output / name / "densities.safetensors")["densities"]
    assert densities.sum().item() == pytest.approx(results["runs"][name]["l0"])


def test_the_report_stands_alone(output: Path):
    page = (output / "report.html").read_text(encoding="utf-8")
    own = page.replace(get_plotlyjs(), "")
    assert len(own) < 2_000_000
    loaded: list[str] = []

    class Sources(HTMLParser):
        def handle_starttag(
            self, tag: str, attrs: list[tuple[str, str | None]]
        ) -> None:
            for name, value in attrs:
                if name == "src" or (name == "href" and tag == "link"):
                    loaded.append(value or "")

    Sources().feed(own)
    assert loaded == []
    assert "http://" not in own and "https://" not in own
    for name in NAMES:
        assert name in own
    assert "Feature Choice → Mutual Choice" in own or "\\u2192 Mutual Choice" in own


def test_the_report_leads_to_the_features(output: Path, results: dict[str, Any]):
    assert '<a href="features.html">' in (output / "report.html").read_text("utf-8")
    page = output / "features.html"
    assert page.stat().st_size < 15_000_000
    data = data_of(page)
    assert data["title"] == "mutual_choice"
    assert len(data["features"]) == 3072
    # on the text of the report, where it is not shortened
    used = sum(data["firings"]) / data["n_tokens"]
    assert used == pytest.approx(results["runs"]["mutual_choice"]["l0"], rel=0.15)


def test_training_is_on_record(output: Path):
    for name in NAMES:
        lines = (output / name / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) > 5
        assert rows[-1]["metrics/explained_variance"] > 0.5
        # without BOS, so that a last batch may be a little short
        assert rows[-1]["details/n_training_samples"] <= 120_000


def test_results_are_not_overwritten_unasked(output: Path):
    before = (output / "results.json").read_text()
    with pytest.raises(FileExistsError, match="is not empty: give --overwrite"):
        run_demo(output, quick=True, overwrite=False)
    assert (output / "results.json").read_text() == before


def test_both_methods_learn_alike(tmp_path: Path):
    """Same data, batches, schedule and sparsity; only the SAE differs."""
    ours, theirs = (cfg.to_dict() for cfg in demo_configs(tmp_path).values())
    for cfg in (ours, theirs):
        del cfg["output_path"], cfg["logger"]["run_name"]
    sae, their_sae = ours.pop("sae"), theirs.pop("sae")
    assert ours == theirs
    for name in ("d_in", "d_sae", "k", "normalize_activations", "decoder_init_norm"):
        assert sae[name] == their_sae[name]


def test_held_out_text_is_not_trained_on(tmp_path: Path):
    """SAELens takes the train split of the folder, which datasets picks by file name."""
    from datasets import load_dataset

    cfg = demo_configs(tmp_path)["mutual_choice"]
    dataset = load_dataset(
        cfg.dataset_path, split="train", cache_dir=str(tmp_path / "cache")
    )
    trained_on = set(dataset["text"])  # type: ignore[index]
    for name, expected in (("train", True), ("heldout", False)):
        texts = pq.read_table(CORPUS / f"{name}.parquet")["text"].to_pylist()
        assert len(texts) > 10
        assert trained_on.issuperset(texts) is expected
        assert expected or trained_on.isdisjoint(texts)
