"""Files of the folder of configurations. Those of public models: test_ready_configs.py."""

import re
from pathlib import Path

import pytest

from sae_lens_alloc import load_runner_config
from sae_lens_alloc.comparison.config import load_comparison

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs"
DEMO_CONFIG = FOLDER / "demo_mutual_choice.yaml"
COMPARISONS = sorted(FOLDER.glob("compare_*.yaml"))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda p: p.stem)
def test_files_of_this_repository_are_where_a_config_says(path: Path):
    named = re.findall(r"\b(?:sae_lens_alloc|scripts)/[\w./]+", path.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", [DEMO_CONFIG, FOLDER / "transcoder_demo.yaml"])
def test_demo_config(path: Path):
    cfg = load_runner_config(path)
    assert cfg.total_training_steps == 390
    assert cfg.sae.feature_choice_steps == cfg.sae.k_decay_steps == 97
    assert cfg.sae.k_start == 2 * cfg.sae.k


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_comparisons_give_every_row_as_many_tries(path: Path):
    config = load_comparison(path)[0]
    tries = {
        row: sum(cell.row == row and cell.seed == 0 for cell in config.cells())
        for row in config.rows
    }
    assert set(tries.values()) == {len(config.k) * len(config.lr)}


@pytest.mark.parametrize("name", ["compare_demo", "compare_synthetic_2k"])
def test_comparisons_hold_the_stock_architectures_and_ours(name: str):
    rows = load_comparison(FOLDER / f"{name}.yaml")[0].rows.values()
    refined = {"refined_mutual_choice"} if name == "compare_demo" else set()
    assert {row["architecture"] for row in rows} == refined | {
        *("standard", "gated", "topk", "batchtopk", "jumprelu", "matryoshka_batchtopk"),
        *("mutual_choice", "matryoshka_mutual_choice", "feature_choice"),
    }
