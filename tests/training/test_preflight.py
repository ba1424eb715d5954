"""What is found on this machine and in files before the model's weights are loaded."""

import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import wandb
from datasets import Dataset, load_dataset_builder
from sae_lens import logger
from transformer_lens import HookedTransformer, HookedTransformerConfig

from sae_lens_alloc import AllocSAETrainingRunner, MutualChoiceTrainingSAEConfig
from sae_lens_alloc.activations.language_model import (
    check_language_model,
    find_language_model,
)
from sae_lens_alloc.training.preflight import (
    check_memory,
    check_training,
    require_decompressor,
)
from sae_lens_alloc.training.summary import estimate_memory
from tests.cli.commands import CONFIG, TINY, invoke
from tests.training.conftest import D_MODEL, MODEL, lm_config


def config(d_in: int = D_MODEL, **overrides: Any) -> Any:
    return lm_config(
        MutualChoiceTrainingSAEConfig(d_in=d_in, d_sae=64, k=4), **overrides
    )


# the hook

# 192 dimensions, 4 times as many in an MLP, 1536 token ids
WIDTHS = {
    "transformer.h.2": 192,
    "transformer.h.1.attn": 192,
    "transformer.h.1.attn.c_attn": 3 * 192,
    "transformer.h.3.mlp.c_fc": 4 * 192,
    "transformer.ln_f": 192,
    "lm_head": 1536,
}


@pytest.fixture(scope="module")
def without_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the demo model's config alone: nothing could be loaded from it."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copy(Path(MODEL) / "config.json", folder)
    return str(folder)


@pytest.mark.parametrize("hook", WIDTHS)
def test_the_width_of_a_hook_is_known_from_the_model_config(
    hook: str, without_weights: str
):
    cfg = config(WIDTHS[hook], model_name=without_weights, hook_name=hook)
    find_language_model(cfg)
    for d_in in (1, WIDTHS[hook] - 1, 2 * WIDTHS[hook]):
        cfg = config(d_in, model_name=without_weights, hook_name=hook)
        with pytest.raises(ValueError) as error:
            find_language_model(cfg)
        assert str(error.value) == (
            f"sae.d_in is {d_in}, but hook_name {hook!r} has {WIDTHS[hook]} dimensions: "
            f"give sae.d_in={WIDTHS[hook]}, or another hook."
        )


def transformer(device: str) -> HookedTransformer:
    """2 heads of 4 dimensions, 16 positions, 10 token ids."""
    cfg = HookedTransformerConfig(
        n_layers=2,
        d_model=8,
        n_heads=2,
        d_head=4,
        d_mlp=32,
        n_ctx=16,
        d_vocab=10,
        act_fn="gelu",
        init_weights=False,
        device=device,
    )
    with torch.device(device):
        return HookedTransformer(cfg, move_to_device=False)


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize(
    ("hook", "head", "width"),
    [
        ("blocks.0.hook_resid_pre", None, 8),
        ("blocks.1.mlp.hook_post", None, 32),
        ("blocks.1.attn.hook_z", None, 8),
        ("blocks.1.attn.hook_z", 1, 4),
        ("ln_final.hook_normalized", None, 8),
    ],
)
def test_the_width_of_a_transformer_lens_hook(
    device: str, hook: str, head: int | None, width: int
):
    model = transformer(device)
    settings: dict[str, Any] = {"context_size": 16, "sequence_separator_token": "bos"}
    settings |= {"hook_name": hook, "hook_head_index": head}
    check_language_model(model, config(width, **settings))
    with pytest.raises(ValueError, match=f"has {width} dimensions"):
        check_language_model(model, config(width + 1, **settings))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"hook_name": "blocks.2.hook_resid_pre"}, "did you mean 'blocks."),
        ({"hook_name": "blocks.0.attn.hook_pattern"}, "one vector for each position"),
        (
            {"hook_name": "blocks.0.attn.hook_z", "hook_head_index": 2},
            "hook_head_index is 2, but hook_name 'blocks.0.attn.hook_z' has 2 heads.",
        ),
        ({"hook_head_index": 0}, "has 0 heads"),
        ({"context_size": 17}, "has 16 positions: give context_size=16 or less."),
        ({"sequence_separator_token": 10}, "are 0 to 9."),
        ({"model_kwargs": {"bogus": 1}}, "with model_kwargs {'bogus': 1}"),
    ],
)
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_what_a_model_does_not_have_is_one_sentence(
    device: str, settings: dict[str, Any], sentence: str
):
    whole = {"hook_name": "blocks.0.hook_resid_pre", "context_size": 16, **settings}
    with pytest.raises(ValueError) as error:
        check_language_model(transformer(device), config(8, **whole))
    assert sentence in str(error.value)


def test_the_runner_checks_the_hook_of_a_model_that_it_is_given():
    """A hook of one dimension would fill all of d_in with one number."""
    cfg = config(9, hook_name="blocks.0.hook_resid_pre", context_size=16)
    cfg.n_batches_in_buffer = 64
    model: Any = transformer("cpu")
    tokens = Dataset.from_dict({"tokens": [[1] * 16] * 8})
    with pytest.raises(ValueError, match=r"sae.d_in is 9, but .* has 8 dimensions"):
        AllocSAETrainingRunner(cfg, tokens, model)


# memory


def test_memory_that_is_taken_is_warned_about_and_more_than_there_is_refused(
    caplog: pytest.LogCaptureFixture,
):
    memory = psutil.virtual_memory()
    # of the buffer, which holds each context twice
    context_bytes = 2 * 64 * D_MODEL * 4
    logger.addHandler(caplog.handler)
    try:
        check_memory(config())
        assert caplog.text == ""
        between = (memory.available + memory.total) // 2
        check_memory(config(n_batches_in_buffer=between // context_bytes))
        assert "free now." in caplog.text
    finally:
        logger.removeHandler(caplog.handler)
    enough = memory.total // context_bytes + 1
    with pytest.raises(
        ValueError, match="the training needs about .* on cpu, which has"
    ):
        check_memory(config(n_batches_in_buffer=enough))


def test_prefetched_batches_take_memory():
    before = estimate_memory(config())["activation buffer"]
    after = estimate_memory(config(prefetch_llm_batches=3))["activation buffer"]
    assert after - before == 3 * 256 * D_MODEL * 4


def test_muon_keeps_one_matrix_and_makes_a_half_in_a_step():
    cfg = config()
    adam = estimate_memory(cfg)
    cfg.optimizer = "muon"  # type: ignore[attr-defined]
    muon = estimate_memory(cfg)
    assert adam["optimizer"] == 2 * adam["parameters"]
    assert muon["optimizer"] == adam["parameters"]
    assert muon["step"] - adam["step"] == adam["parameters"] // 2


def test_each_of_several_processes_has_a_share_of_the_memory(
    monkeypatch: pytest.MonkeyPatch,
):
    cfg = config(prefetch_llm_batches=3)
    alone, one_of_3 = estimate_memory(cfg), estimate_memory(cfg, 3)
    # 22 of 64 features at most
    assert one_of_3["parameters"] == (2 * D_MODEL * 22 + 22 + D_MODEL) * 4
    assert one_of_3["optimizer"] == 2 * one_of_3["parameters"]
    # its own buffer, and a third of each batch
    waiting = 3 * 256 * D_MODEL * 4
    less = alone["activation buffer"] - one_of_3["activation buffer"]
    assert less == waiting - waiting // 3
    # the processes of a machine share what it has
    context_bytes = 2 * 64 * D_MODEL * 4
    third = psutil.virtual_memory().total // context_bytes // 3 + 1
    large = config(n_batches_in_buffer=third)
    check_memory(large, 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="the training needs about .* on cpu, which"):
        check_memory(large, 3)


# W&B


def test_nobody_logged_in_to_wandb_is_found_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    cfg = config(output_path=str(tmp_path / "output"))
    check_training(cfg)
    cfg.logger.log_to_wandb = True
    try:
        wandb.teardown()
        with pytest.raises(ValueError, match="nobody is logged in to W&B"):
            check_training(cfg)
        monkeypatch.setenv("WANDB_MODE", "offline")
        wandb.teardown()
        check_training(cfg)
    finally:
        wandb.teardown()


# --dry-run


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("device=meta", "device is 'meta', but torch finds no such device"),
        (
            "model_name=/no/such",
            "model_name is '/no/such', but there is no such folder.",
        ),
        ("dataset_path=/no/such", "dataset_path is '/no/such', but there is no such"),
        ("resume_from_checkpoint=/no/such", "but there is no such folder."),
        ("from_pretrained_path=/no/such", "but there is no such folder."),
        ("output_path=null", "output_path is missing: the result would be lost."),
        ("output_path=''", "output_path is missing: the result would be lost."),
        ("output_path=/dev/null/x", "is not a folder that can be written to."),
        ("checkpoint_path=/dev/null", "is not a folder that can be written to."),
        (f"checkpoint_path={'x' * 300}", "File name too long"),
        ("n_checkpoints=1", "n_checkpoints is 1, but checkpoint_path is null"),
        ("sae.d_in=191", "sae.d_in is 191, but"),
        ("context_size=257", "has 256 positions"),
    ],
)
def test_a_dry_run_fails_where_the_run_would(
    tmp_path: Path, override: str, sentence: str
):
    for how in ([], ["--dry-run"]):
        result = invoke(
            "train", CONFIG, *TINY, f"output_path={tmp_path / 'new'}", override, *how
        )
        assert result.exit_code == 1
        assert sentence in result.stderr
        assert result.stderr.count("\n") == 1
        assert not (tmp_path / "new").exists()


def test_a_dry_run_sees_that_the_output_is_not_empty(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    arguments = ("train", CONFIG, *TINY, f"output_path={tmp_path}", "--dry-run")
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert "is not empty: give --overwrite" in result.stderr
    assert invoke(*arguments, "--overwrite").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_warnings_of_saelens_about_overrides_are_the_users_own(
    caplog: pytest.LogCaptureFixture, demo_model: Any
):
    """What the config names is loaded by us, and is no override."""
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.WARNING)
    try:
        AllocSAETrainingRunner(config())
        assert "passed in" not in caplog.text
        # fails when SAELens words its warning otherwise
        AllocSAETrainingRunner(config(), None, demo_model)
        assert "You just passed in a model" in caplog.text
        assert "You just passed in a dataset" not in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


def test_a_dataset_that_cannot_be_decompressed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As the Pile of configs/gemma_3_*.yaml is, where zstandard is not installed."""
    monkeypatch.setitem(sys.modules, "zstandard", None)  # not to be found
    for name in ("00.jsonl.zst", "00.jsonl"):
        (tmp_path / name).touch()
    compressed, plain = (
        load_dataset_builder("json", data_files={"train": str(tmp_path / name)})
        for name in ("00.jsonl.zst", "00.jsonl")
    )
    require_decompressor("plain", plain)
    with pytest.raises(ValueError, match=r"'the/pile'.*`pip install zstandard`\.$"):
        require_decompressor("the/pile", compressed)
