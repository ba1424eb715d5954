"""
The configs of public models, against the tables of TransformerLens and SAELens, without a network
and without weights.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.loading_from_pretrained import (
    get_official_model_name,
    get_pretrained_model_config,
)
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from benchmarks.gpu.short import pipeline_lead
from docs.models import memory_of, models_table, ready_configs
from sae_lens_alloc import load_runner_config
from sae_lens_alloc.activations.hook_names import hook_names_of
from sae_lens_alloc.activations.language_model import (
    HookedProxyLM,
    check_language_model,
)
from sae_lens_alloc.training.summary import describe_run
from tests.test_docs import ROOT

# Width and number of blocks of the models, as their configs on the Hugging Face hub say.
MODELS = {
    "gpt2": (768, 12),
    "pythia-160m-deduped": (768, 12),
    "pythia-410m-deduped": (1024, 24),
    "gemma-2-2b": (2304, 26),
    "google/gemma-3-270m": (640, 18),
    "google/gemma-3-1b-pt": (1152, 26),
    "google/gemma-3-4b-pt": (2560, 34),
    "meta-llama/Llama-3.1-8B": (4096, 32),
    "meta-llama/Llama-3.2-1B": (2048, 16),
    "Qwen/Qwen3-0.6B": (1024, 28),
    "Qwen/Qwen3-1.7B": (2048, 28),
    "Qwen/Qwen3-8B": (4096, 36),
}
# TransformerLens has these in its code; it takes the others' from the hub.
IN_TRANSFORMER_LENS = [name for name in MODELS if re.search("gemma|Llama", name)]
# A release of SAELens' directory with an SAE or a transcoder of the same layer.
IN_SAE_LENS = {
    "gpt2": ("gpt2-small-res-jb", "blocks.8.hook_resid_pre"),
    "gemma-2-2b": ("gemma-2-2b-res-matryoshka-dc", "blocks.12.hook_resid_post"),
    "google/gemma-3-270m": ("gemma-scope-2-270m-pt-res", "layer_9_width_16k_l0_medium"),
    "google/gemma-3-1b-pt": ("gemma-3-1b-res-matryoshka-dc", "blocks.13.hook_resid_post"),
    "google/gemma-3-4b-pt": ("gemma-scope-2-4b-pt-res", "layer_17_width_65k_l0_medium"),
    "meta-llama/Llama-3.1-8B": ("llama_scope_lxr_8x", "l16r_8x"),
    "Qwen/Qwen3-0.6B": ("mwhanna-qwen3-0.6b-transcoders-lowl0", "layer_14"),
    "Qwen/Qwen3-1.7B": ("mwhanna-qwen3-1.7b-transcoders-lowl0", "layer_14"),
    "Qwen/Qwen3-8B": ("mwhanna-qwen3-8b-transcoders", "layer_18"),
}  # fmt: skip
CONFIGS = dict(ready_configs())
DATASETS = {
    # that SAELens' loaders name for SAEs of these models
    "monology/pile-uncopyrighted",
    # tokenised for the model
    "apollo-research/Skylion007-openwebtext-tokenizer-gpt2",
    "apollo-research/monology-pile-uncopyrighted-tokenizer-EleutherAI-gpt-neox-20b",
    "chanind/pile-uncopyrighted-gemma-1024-abbrv-1B",
    "chanind/pile-uncopyrighted-llama-3_2-1024-abbrv-1B",
}


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def cfg(path: Path) -> Any:
    return CONFIGS[path]


def small_model_of(cfg: Any) -> Any:
    """A model of the same width and depth, with smaller parts, on torch's meta device."""
    d_model, n_blocks = MODELS[cfg.model_name]
    is_gemma = "gemma" in cfg.model_name
    with torch.device("meta"):
        if cfg.model_class_name == "HookedTransformer":
            return HookedTransformer(
                HookedTransformerConfig(
                    n_layers=n_blocks,
                    d_model=d_model,
                    n_ctx=2048,
                    d_head=8,
                    n_heads=1,
                    d_mlp=4,
                    act_fn="gelu",
                    d_vocab=8,
                    normalization_type="RMS" if is_gemma else "LN",
                    use_normalization_before_and_after=is_gemma,
                    device="meta",
                ),
                move_to_device=False,
            )
        assert "Llama" in cfg.model_name
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(
                hidden_size=d_model,
                num_hidden_layers=n_blocks,
                num_attention_heads=8,
                intermediate_size=4,
                vocab_size=8,
            )
        )
        tokenizer: Any = None
        return HookedProxyLM(model, tokenizer, hook_names=hook_names_of(cfg))


def test_there_is_one_for_each_model():
    sae_models = [
        cfg.model_name
        for path, cfg in CONFIGS.items()
        if path.stem.endswith("mutual_choice")
    ]
    assert sorted(sae_models) == sorted(MODELS)


def test_transformer_lens_knows_the_model(cfg: Any):
    get_official_model_name(cfg.model_name)  # raises for a name it lacks


@pytest.mark.parametrize("name", IN_TRANSFORMER_LENS)
def test_widths_are_those_of_transformer_lens(name: str):
    model = get_pretrained_model_config(name)
    assert (model.d_model, model.n_layers) == MODELS[name]


def test_widths_of_gpt2_are_the_defaults_of_transformers():
    assert (GPT2Config().n_embd, GPT2Config().n_layer) == MODELS["gpt2"]


def test_hooks_exist_and_have_the_width(cfg: Any):
    check_language_model(small_model_of(cfg), cfg)  # raises
    assert cfg.sae.d_in == MODELS[cfg.model_name][0]


def test_a_wrong_width_or_hook_would_be_found(cfg: Any):
    model, d_in, hook = small_model_of(cfg), cfg.sae.d_in, cfg.hook_name
    try:
        cfg.sae.d_in += 1
        with pytest.raises(ValueError, match=f"d_in={d_in}"):
            check_language_model(model, cfg)
        cfg.sae.d_in, cfg.hook_name = d_in, hook.replace(".", ".9", 1)
        with pytest.raises(ValueError, match="hook_name"):
            check_language_model(model, cfg)
    finally:
        cfg.sae.d_in, cfg.hook_name = d_in, hook


@pytest.mark.parametrize("name", IN_SAE_LENS)
def test_sae_lens_has_pretrained_saes_of_model_and_layer(name: str):
    release, sae_id = IN_SAE_LENS[name]
    listed = get_pretrained_saes_directory()[release]
    assert get_official_model_name(listed.model) == get_official_model_name(name)
    assert sae_id in listed.saes_map
    layer = re.findall(r"(?:blocks\.|layer_|l)(\d+)", sae_id)[0]
    (hook,) = {
        cfg.hook_name
        for path, cfg in CONFIGS.items()
        if cfg.model_name == name and path.stem.endswith("mutual_choice")
    }
    assert hook.startswith(f"blocks.{layer}.hook_resid_")


def test_dataset_is_known(cfg: Any):
    assert cfg.dataset_path in DATASETS
    assert cfg.is_dataset_tokenized == (
        cfg.dataset_path != "monology/pile-uncopyrighted"
    )
    assert cfg.streaming


def test_stated_memory_is_what_the_code_computes(path: Path, cfg: Any):
    (stated,) = re.findall(r"^# Memory: (.*) beside the language model", path.read_text(), re.M)  # fmt: skip
    assert stated == memory_of(cfg)
    # the line of `--dry-run`
    assert f"memory      {stated} (" in describe_run(cfg)


def test_no_time_is_stated_that_was_not_measured(path: Path):
    """A campaign on a GPU trains on a random language model, and on none of these."""
    comment = " ".join(re.findall(r"^# (.*)", path.read_text(), re.M))
    assert "Time: see docs/models.md." in comment
    assert not re.search(r"\d\s*(h|hours?|min|minutes?|tokens/s)\b", comment)
    page = (ROOT / "docs" / "models.md").read_text()
    assert "**None of these trainings has been run on a GPU**" in page
    report = json.loads(
        (ROOT / "docs" / "results" / "performance_gpu.json").read_text()
    )
    assert pipeline_lead(report) in page


def test_the_command_of_the_file_names_the_file(path: Path):
    assert f"# sae-lens-alloc train configs/{path.name}\n" in path.read_text()


def test_the_page_lists_all():
    page = (ROOT / "docs" / "models.md").read_text()
    assert models_table() in page
    assert len(re.findall(r"^\| \[`", page, re.M)) == len(CONFIGS)


def test_commands_of_the_page_are_accepted():
    page = (ROOT / "docs" / "models.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"sae-lens-alloc train (configs/\S+)([^#\n]*)", page)
    assert len(commands) == 4
    for file, rest in commands:
        overrides = [word for word in rest.split() if "=" in word]
        load_runner_config(ROOT / file, overrides)


def test_schedule_is_the_recipe(cfg: Any):
    steps = 500_000_000 // 4096
    assert cfg.total_training_steps == steps == 122_070
    if cfg.sae.architecture() == "mutual_choice":
        assert cfg.sae.feature_choice_steps == cfg.sae.k_decay_steps == 30_517
        assert cfg.sae.k_start == 2 * cfg.sae.k
        assert cfg.sae.aux_loss_decay_start is None
    assert cfg.lr_decay_steps == 24_414
    assert cfg.lr == 3e-4


def test_outputs_do_not_collide(path: Path, cfg: Any):
    assert cfg.output_path == f"output/{path.stem}"
    # SAELens adds a folder for each run
    assert Path(cfg.checkpoint_path).parent == Path(f"checkpoints/{path.stem}")


def test_sink_tokens_take_no_share_of_the_budget(cfg: Any):
    assert cfg.exclude_special_tokens is True
    has_bos = re.search("gemma|Llama", cfg.model_name) is not None
    assert (cfg.seqpos_slice[0] == 1) == (not has_bos)


def test_nothing_is_logged_elsewhere_unless_asked(cfg: Any):
    assert cfg.logger.log_to_wandb is False
