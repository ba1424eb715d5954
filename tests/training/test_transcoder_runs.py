"""Runs of transcoders on the shipped language model: two hooks, one pass."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE
from sae_lens.saes.transcoder import JumpReLUSkipTranscoder
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.HookedTransformer import HookedRootModule
from transformer_lens.model_bridge import TransformerBridge

from sae_lens_alloc import (
    AllocSAERunnerConfig,
    AllocSAETrainingRunner,
    MutualChoiceTrainingTranscoder,
    MutualChoiceTrainingTranscoderConfig,
)
from sae_lens_alloc.activations.language_model import load_language_model
from sae_lens_alloc.activations.on_text import gather_activations, text_of_sae
from sae_lens_alloc.activations.store import ResumableActivationsStore
from sae_lens_alloc.saes.allocation_sae_config import AllocationTrainingSAEConfig
from sae_lens_alloc.thresholds.recalibration import load_saved_sae, recalibrate
from sae_lens_alloc.training.held_out import held_out_metrics
from tests.saes.conftest import changed, state_of
from tests.training.conftest import D_MODEL, MODEL, lm_config

pytestmark = pytest.mark.usefixtures("restore_signals", "few_calibration_tokens")
MLP_IN, MLP_OUT = "transformer.h.2.ln_2", "transformer.h.2.mlp"


def transcoder_run(
    sae: AllocationTrainingSAEConfig | None = None, **overrides: Any
) -> AllocSAERunnerConfig[Any]:
    """A run of a few thousand tokens, from what the MLP is given to what it puts out."""
    if sae is None:
        sae = MutualChoiceTrainingTranscoderConfig(
            d_in=D_MODEL, d_out=D_MODEL, d_sae=256, k=8, skip_connection=True
        )
    stock = lm_config(sae)
    settings: dict[str, Any] = {f.name: getattr(stock, f.name) for f in fields(stock)}
    hooks: dict[str, Any] = {"hook_name": MLP_IN, "hook_name_out": MLP_OUT}
    return AllocSAERunnerConfig(**{**settings, **hooks, **overrides})


@pytest.fixture(scope="module")
def model() -> HookedRootModule:
    return load_language_model(transcoder_run())


def test_rows_are_both_activations_of_a_token_from_one_pass(
    model: HookedRootModule, demo_text: Dataset
):
    cfg = transcoder_run(store_batch_size_prompts=2)
    store = ResumableActivationsStore.from_config(model, cfg, demo_text)
    passes: list[int] = []
    language_model: Any = model.model
    counted = language_model.register_forward_hook(lambda *_: passes.append(1))
    batch = store.get_batch_tokens()
    rows = store.get_activations(batch)
    counted.remove()
    assert len(passes) <= 1 and rows.shape == (2, 64, 2 * D_MODEL)
    _, cache = model.run_with_cache(batch, names_filter=[MLP_IN, MLP_OUT])
    assert torch.equal(rows[..., :D_MODEL], cache[MLP_IN])
    assert torch.equal(rows[..., D_MODEL:], cache[MLP_OUT])
    # and the MLP leads from one to the other, also in what training gets
    mlp = language_model.get_submodule(MLP_OUT)
    for got in (store.get_filtered_llm_batch(), next(store)):
        x, y = got.split(D_MODEL, dim=-1)
        with torch.no_grad():
            torch.testing.assert_close(mlp(x), y, rtol=1e-3, atol=1e-3)
    # no BOS: SAELens excludes it at one hook, so it is excluded at both
    assert len(store.get_filtered_llm_batch()) < 2 * 64


def skip_transcoder(normalize: Any) -> MutualChoiceTrainingTranscoderConfig:
    return MutualChoiceTrainingTranscoderConfig(
        d_in=D_MODEL,
        d_out=D_MODEL,
        d_sae=256,
        k=8,
        skip_connection=True,
        normalize_activations=normalize,
    )


@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in"])
def test_run_saves_what_sae_lens_loads_with_the_metrics_of_the_output(
    normalize: str, model: HookedRootModule, demo_text: Dataset, tmp_path: Path
):
    sae = skip_transcoder(normalize)
    cfg = transcoder_run(sae, output_path=str(tmp_path), training_tokens=40 * 256)
    runner = AllocSAETrainingRunner(cfg, demo_text, model)
    trained = runner.run()
    assert isinstance(trained, MutualChoiceTrainingTranscoder)
    saved = SAE.load_from_disk(tmp_path)
    assert isinstance(saved, JumpReLUSkipTranscoder)
    metadata: Any = saved.cfg.metadata
    assert (metadata.hook_name, metadata.hook_name_out) == (MLP_IN, MLP_OUT)
    assert metadata.calibration["l0"] == pytest.approx(8, rel=0.02)
    # by hand, on the activations as the language model gives them
    x, y = runner.held_out.split(D_MODEL, dim=-1)
    with torch.no_grad():
        error = (saved(x) - y).square().sum()
    explained = 1 - error / (y - y.mean(0)).square().sum()
    assert explained > 0.1
    recorded = metadata.held_out["explained_variance"]
    assert recorded == pytest.approx(explained.item(), abs=1e-3)
    rows = [
        json.loads(line)
        for line in (tmp_path / "metrics.jsonl").read_text().split("\n")[:-1]
    ]
    assert (
        rows[-1]["metrics/explained_variance"] > rows[0]["metrics/explained_variance"]
    )


@pytest.mark.parametrize("optimizer", ["adam", "muon", "row_sparse_adam"])
def test_resumed_run_is_the_run_that_was_not_interrupted(
    optimizer: str, model: HookedRootModule, demo_text: Dataset, tmp_path: Path
):
    sae = skip_transcoder("expected_average_only_in")
    settings: dict[str, Any] = {
        "optimizer": optimizer,
        "checkpoint_path": str(tmp_path / "checkpoints"),
        "n_checkpoints": 1,
    }
    whole = AllocSAETrainingRunner(
        transcoder_run(sae, **settings), demo_text, model
    ).run()
    (folder,) = (tmp_path / "checkpoints").iterdir()
    (checkpoint,) = folder.iterdir()
    scaler = json.loads((checkpoint / "activation_scaler.json").read_text())
    assert len(scaler["scaling_factor"]) == 2
    cfg = transcoder_run(sae, **settings, resume_from_checkpoint=str(checkpoint))
    resumed = AllocSAETrainingRunner(cfg, demo_text, model).run()
    assert changed(state_of(whole), resumed) == set()


def test_thresholds_of_a_saved_transcoder_are_set_anew(
    model: HookedRootModule, demo_text: Dataset, tmp_path: Path
):
    cfg = transcoder_run(output_path=str(tmp_path / "transcoder"))
    AllocSAETrainingRunner(cfg, demo_text, model).run()
    saved = load_saved_sae(tmp_path / "transcoder")
    rows = gather_activations(text_of_sae(saved), 2000)
    assert rows.shape == (2000, 2 * D_MODEL)
    for per_feature in (False, True):
        report = recalibrate(saved, rows, 5.0, per_feature)
        assert report.after.l0 == pytest.approx(5, rel=0.01)
        assert isinstance(report.sae, JumpReLUSkipTranscoder)
        measured = held_out_metrics(report.sae, rows[:1000], 500)
        assert measured["explained_variance"] == pytest.approx(
            report.after.explained_variance, abs=1e-5
        )


def test_hooked_transformer_with_an_output_of_another_width(demo_text: Dataset):
    torch.manual_seed(0)
    demo = load_language_model(transcoder_run())
    hooked = HookedTransformer(
        HookedTransformerConfig(
            n_layers=2,
            d_model=16,
            n_ctx=64,
            d_head=8,
            d_mlp=40,
            act_fn="gelu",
            d_vocab=4096,
        )
    )
    hooked.set_tokenizer(demo.tokenizer)
    sae = MutualChoiceTrainingTranscoderConfig(
        d_in=16,
        d_out=40,
        d_sae=64,
        k=4,
        normalize_activations="expected_average_only_in",
    )
    cfg = transcoder_run(
        sae,
        model_class_name="HookedTransformer",
        hook_name="blocks.1.ln2.hook_normalized",
        hook_name_out="blocks.1.mlp.hook_post",
        training_tokens=80 * 256,
        lr=1e-2,
    )
    trained = AllocSAETrainingRunner(cfg, demo_text, hooked).run()
    assert trained.W_dec.shape == (64, 40)
    assert trained.cfg.metadata.held_out["explained_variance"] > 0.05
    with pytest.raises(ValueError, match="sae.d_out is 40, but hook_name_out"):
        cfg.hook_name_out = "blocks.1.hook_mlp_out"
        AllocSAETrainingRunner(cfg, demo_text, hooked)
    with pytest.raises(
        ValueError,
        match="hook_name_out 'blocks.1.hook_mlp_oot' is not in .* did you mean",
    ):
        cfg.hook_name_out = "blocks.1.hook_mlp_oot"
        AllocSAETrainingRunner(cfg, demo_text, hooked)


def test_transformer_bridge(demo_text: Dataset):
    bridge: Any = TransformerBridge.boot_transformers(MODEL, device="cpu")
    cfg = transcoder_run(
        hook_name="blocks.2.ln2.hook_normalized",
        hook_name_out="blocks.2.hook_mlp_out",
        store_batch_size_prompts=2,
    )
    runner = AllocSAETrainingRunner(cfg, demo_text, bridge)
    mlp_in, mlp_out = runner.held_out.split(D_MODEL, dim=-1)
    # what the MLP of the same model makes of it
    language_model: Any = load_language_model(transcoder_run()).model
    norm, mlp = (language_model.get_submodule(name) for name in (MLP_IN, MLP_OUT))
    with torch.no_grad():
        expected = mlp(mlp_in * norm.weight + norm.bias)
    torch.testing.assert_close(mlp_out, expected, rtol=1e-3, atol=1e-3)
    assert runner.run().cfg.metadata.held_out["l0"] > 1
