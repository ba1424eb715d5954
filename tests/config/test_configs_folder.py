"""The ready configurations are read and checked, without a network or a model."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.loading_from_pretrained import get_official_model_name

from sae_lens_alloc import load_runner_config
from sae_lens_alloc.activations.hook_names import hook_names_of
from sae_lens_alloc.activations.language_model import check_language_model
from sae_lens_alloc.comparison.config import load_comparison

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs"
DEMO_CONFIG = FOLDER / "demo_mutual_choice.yaml"
COMPARISONS = sorted(FOLDER.glob("compare_*.yaml"))
# the others are tested where the commands that read them are
CONFIGS = sorted(path for path in FOLDER.glob("*_choice.yaml") if path != DEMO_CONFIG)
TRANSCODERS = sorted(FOLDER.glob("*_transcoder.yaml"))
# d_in and number of blocks of the models
MODELS = {
    "gpt2": (768, 12),
    "pythia-160m-deduped": (768, 12),
    "gemma-2-2b": (2304, 26),
    "meta-llama/Llama-3.2-1B": (2048, 16),
}


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def cfg(request: pytest.FixtureRequest) -> Any:
    return load_runner_config(request.param)


def test_there_is_one_for_each_model():
    assert {load_runner_config(path).model_name for path in CONFIGS} == set(MODELS)


def test_model_and_hook_exist_and_have_the_width(cfg: Any):
    get_official_model_name(cfg.model_name)  # raises for a name TransformerLens lacks
    d_in, n_blocks = MODELS[cfg.model_name]
    assert cfg.sae.d_in == d_in
    pattern = {
        "HookedTransformer": r"blocks\.(\d+)\.hook_resid_(?:pre|post)",
        "AutoModelForCausalLM": r"model\.layers\.(\d+)",
    }[cfg.model_class_name]
    match = re.fullmatch(pattern, cfg.hook_name)
    assert match is not None
    assert int(match[1]) < n_blocks


@pytest.mark.parametrize("path", TRANSCODERS, ids=lambda path: path.stem)
def test_hooks_of_transcoders_exist_and_have_the_width(path: Path):
    cfg = load_runner_config(path)
    d_model, n_blocks = MODELS[cfg.model_name]
    assert cfg.sae.d_in == cfg.sae.d_out == d_model
    blocks = [
        re.fullmatch(r"blocks\.(\d+)\.(?:ln2\.hook_normalized|hook_mlp_out)", hook)
        for hook in hook_names_of(cfg)
    ]
    assert blocks[0] is not None and blocks[1] is not None
    assert blocks[0][1] == blocks[1][1] and int(blocks[0][1]) < n_blocks
    # a model with fewer and smaller parts has them, too
    is_gemma = cfg.model_name.startswith("gemma")
    with torch.device("meta"):
        model = HookedTransformer(
            HookedTransformerConfig(
                n_layers=n_blocks,
                d_model=d_model,
                n_ctx=1024,
                d_head=8,
                n_heads=1,
                d_mlp=4,
                act_fn="gelu",
                d_vocab=8,
                normalization_type="RMS" if is_gemma else "LN",
                use_normalization_before_and_after=is_gemma,
            ),
            move_to_device=False,
        )
    check_language_model(model, cfg)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda p: p.stem)
def test_files_of_this_repository_are_where_a_config_says(path: Path):
    named = re.findall(r"\b(?:sae_lens_alloc|scripts)/[\w./]+", path.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_schedule_is_the_recipe(cfg: Any):
    steps = 500_000_000 // 4096
    assert cfg.total_training_steps == steps == 122_070
    if cfg.sae.architecture() == "mutual_choice":
        assert cfg.sae.feature_choice_steps == cfg.sae.k_decay_steps == 30_517
        assert cfg.sae.k_start == 2 * cfg.sae.k
        assert cfg.sae.aux_loss_decay_start is None
    assert cfg.lr_decay_steps == 24_414
    assert cfg.lr == 3e-4


def test_outputs_do_not_collide():
    paths = [*CONFIGS, *TRANSCODERS, FOLDER / "transcoder_demo.yaml"]
    configs = [load_runner_config(path) for path in paths]
    assert [cfg.output_path for cfg in configs] == [f"output/{p.stem}" for p in paths]


def test_sink_tokens_take_no_share_of_the_budget(cfg: Any):
    assert cfg.exclude_special_tokens is True


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
    assert {row["architecture"] for row in rows} == {
        *("standard", "gated", "topk", "batchtopk", "jumprelu", "matryoshka_batchtopk"),
        *("mutual_choice", "matryoshka_mutual_choice", "feature_choice"),
    }
