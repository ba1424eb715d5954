"""SAELens' runners, unchanged, and ours, on the shipped language model."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    BatchTopKTrainingSAEConfig,
    LanguageModelSAETrainingRunner,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.config import LoggingConfig
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.synthetic import (
    SyntheticModelConfig,
    SyntheticSAERunner,
    SyntheticSAERunnerConfig,
)
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer
from torch._dynamo.utils import counters
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.HookedTransformer import HookedRootModule

from sae_lens_alloc import (
    AllocSAETrainingRunner,
    FeatureChoiceTrainingSAEConfig,
    MutualChoiceTrainingSAE,
    MutualChoiceTrainingSAEConfig,
)
from sae_lens_alloc.saes.allocation_sae_config import AllocationTrainingSAEConfig
from sae_lens_alloc.training import runner as runner_module
from sae_lens_alloc.training.held_out import held_out_metrics
from tests.saes.conftest import ARCHITECTURES, changed, state_of, statistics
from tests.training.conftest import (
    CORPUS,
    D_MODEL,
    HOOK,
    MODEL,
    MODEL_CLASS,
    OTHER_HOOK,
    lm_config,
)

pytestmark = pytest.mark.usefixtures("restore_signals")
D_SAE, K = 256, 8


def sae_config(
    architecture: str = "mutual_choice", **overrides: Any
) -> AllocationTrainingSAEConfig:
    settings: dict[str, Any] = {
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "k": K,
        **overrides,
    }
    if architecture == "mutual_choice":
        return MutualChoiceTrainingSAEConfig(**settings)
    return FeatureChoiceTrainingSAEConfig(**settings)


def test_stock_runner_trains_from_paths_and_saves_a_jumprelu_sae(tmp_path: Path):
    cfg = lm_config(
        sae_config(normalize_activations="expected_average_only_in"),
        output_path=str(tmp_path / "sae"),
    )
    assert (cfg.model_name, cfg.dataset_path) == (MODEL, CORPUS)
    runner = LanguageModelSAETrainingRunner(cfg)
    before = state_of(runner.sae)
    sae = runner.run()
    assert changed(before, sae) >= {"W_enc", "W_dec", "b_enc", "b_dec"}
    assert statistics(sae).density_tokens.item() == 8 * 256

    saved = SAE.load_from_disk(tmp_path / "sae")
    assert isinstance(saved, JumpReLUSAE)
    metadata: Any = saved.cfg.metadata
    assert metadata.training_architecture == "mutual_choice"
    assert metadata.training_architecture_details["k"] == K
    assert metadata.hook_name == HOOK
    # Feature Choice comes first, whose whole quotas are k features per token on average
    assert metadata.l0 == pytest.approx(K, rel=0.01)
    x = next(runner.activations_store)
    sae.eval()
    torch.testing.assert_close(saved.encode(x), sae.encode(x), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(saved(x), sae(x), rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_stock_runner_with_compile_sae_learns_the_same(
    demo_model: HookedRootModule, demo_text: Dataset
):
    saes: list[Any] = []
    torch.compiler.reset()
    counters.clear()
    for compile_sae in (False, True):
        cfg = lm_config(sae_config(), training_tokens=3 * 256, compile_sae=compile_sae)
        torch.manual_seed(0)
        runner = LanguageModelSAETrainingRunner(cfg, demo_text, demo_model)
        torch.manual_seed(1)
        saes.append(runner.run())
    assert changed(state_of(saes[0]), saes[1]) == set()
    # the number of pairs is another in every batch, which must not compile anew each time
    assert counters["stats"]["unique_graphs"] <= 1


def test_multi_sae_runner_trains_ours_beside_stock_ones(
    demo_model: HookedRootModule, demo_text: Dataset, tmp_path: Path
):
    stock = TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=K)
    cfg = MultiSAETrainingRunnerConfig(
        saes={
            "mutual": sae_config(feature_choice_steps=4),
            "stock": stock,
            "feature": sae_config(
                "feature_choice", normalize_activations="expected_average_only_in"
            ),
        },
        # two hooks: batches are slices of a wider buffer, hence not contiguous
        hook_names={"mutual": HOOK, "stock": HOOK, "feature": OTHER_HOOK},
        model_name=MODEL,
        model_class_name=MODEL_CLASS,
        streaming=False,
        context_size=64,
        n_batches_in_buffer=16,
        store_batch_size_prompts=8,
        train_batch_size_tokens=256,
        training_tokens=8 * 256,
        n_batches_for_norm_estimate=3,
        lr=1e-3,
        exclude_special_tokens=True,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=str(tmp_path / "checkpoints"),
        save_final_checkpoint=True,
        output_path=str(tmp_path / "saes"),
    )
    saes = MultiSAETrainingRunner(cfg, demo_text, demo_model).run()
    assert {name: sae.cfg.architecture() for name, sae in saes.items()} == {
        "mutual": "mutual_choice",
        "stock": "topk",
        "feature": "feature_choice",
    }
    for name in ("mutual", "feature"):
        assert statistics(saes[name]).density_tokens.item() == 8 * 256
        assert isinstance(SAE.load_from_disk(tmp_path / "saes" / name), JumpReLUSAE)
    assert saes["feature"].cfg.normalize_activations == "none"
    # its checkpoints hold our statistics
    (weights,) = (tmp_path / "checkpoints").rglob("mutual/sae_weights.safetensors")
    restored = type(saes["mutual"])(saes["mutual"].cfg)
    restored.load_weights_from_checkpoint(weights.parent)
    assert changed(state_of(saes["mutual"]), restored) == set()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_synthetic_sae_runner(architecture: str, tmp_path: Path):
    sae = sae_config(architecture, d_in=16, d_sae=64, k=3)
    torch.manual_seed(0)
    result = SyntheticSAERunner(
        SyntheticSAERunnerConfig(
            synthetic_model=SyntheticModelConfig(
                num_features=48, hidden_dim=16, bias=0.5, seed=0
            ),
            sae=sae,
            training_samples=128 * 100,
            batch_size=128,
            lr=1e-2,
            eval_samples=4096,
            eval_frequency=50,
            checkpoint_path=None,
            output_path=str(tmp_path),
            logger=LoggingConfig(log_to_wandb=False),
        )
    ).run()
    assert result.final_eval is not None
    # thresholds as training left them
    assert result.final_eval.sae_l0 == pytest.approx(3, rel=0.15)
    assert result.final_eval.explained_variance > 0.5
    assert isinstance(SAE.load_from_disk(tmp_path), JumpReLUSAE)


class RecordingRunner(AllocSAETrainingRunner):
    """Keeps the activations on which the thresholds were calibrated."""

    calibration_tokens: torch.Tensor

    def _calibration_activations(self, trainer: SAETrainer[Any, Any]) -> torch.Tensor:
        self.calibration_tokens = super()._calibration_activations(trainer)
        return self.calibration_tokens


@pytest.mark.parametrize(
    ("architecture", "normalize_activations"),
    [("mutual_choice", "none"), ("feature_choice", "covariance_whitening")],
)
def test_our_runner_calibrates_and_records_what_it_did(
    architecture: str,
    normalize_activations: str,
    demo_model: HookedRootModule,
    demo_text: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(runner_module, "CALIBRATION_TOKENS", 4000)
    cfg = lm_config(
        sae_config(architecture, normalize_activations=normalize_activations),
        output_path=str(tmp_path),
        n_batches_for_norm_estimate=2,
    )
    runner = RecordingRunner(cfg, demo_text, demo_model)
    sae = runner.run()

    # 4000 tokens are 15.6 batches of 256, hence 16
    x = runner.calibration_tokens
    assert x.shape == (16 * 256, D_MODEL)
    saved = SAE.load_from_disk(tmp_path)
    l0 = (saved.encode(x) > 0).sum().item() / len(x)
    assert l0 == pytest.approx(K, rel=0.01)
    ev = 1 - ((saved(x) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()).item()

    recorded = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    calibration = recorded["calibration"]
    assert calibration["n_tokens"] == 16 * 256
    assert calibration["target_l0"] == K
    assert calibration["l0"] == pytest.approx(l0, rel=1e-3)
    assert calibration["ev"] == pytest.approx(ev, abs=1e-3)
    if architecture == "mutual_choice":
        assert calibration["training_l0"] == K
    assert recorded["l0"] == calibration["l0"] == sae.cfg.metadata.l0
    assert recorded["training_architecture"] == architecture

    metrics = [
        json.loads(line)
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in metrics] == [1, 3, 5, 7]
    assert all("metrics/threshold_l0" in line for line in metrics)

    held_out = recorded["held_out"]
    assert held_out["n_tokens"] == len(runner.held_out)
    for key, value in held_out_metrics(saved, runner.held_out, 256).items():
        assert held_out[key] == pytest.approx(value, rel=1e-3), key
    assert recorded["provenance"]["seed"] == cfg.seed
    assert recorded["provenance"]["versions"]["torch"] == torch.__version__
    assert not tmp_path.with_name(f"{tmp_path.name}.partial").exists()


def test_our_runner_puts_in_the_schedule(
    demo_model: HookedRootModule, demo_text: Dataset
):
    cfg = lm_config(sae_config(), training_tokens=20 * 256)
    runner = AllocSAETrainingRunner(cfg, demo_text, demo_model)
    assert cfg.sae.feature_choice_steps is None
    for schedule in (runner.cfg.sae, runner.sae.cfg):
        assert schedule.feature_choice_steps == schedule.k_decay_steps == 5
        assert schedule.k_start == 2 * K

    started = MutualChoiceTrainingSAE(dataclasses.replace(cfg.sae))
    runner = AllocSAETrainingRunner(cfg, demo_text, demo_model, override_sae=started)
    assert runner.sae.cfg.feature_choice_steps == 5


@pytest.mark.usefixtures("few_calibration_tokens")
def test_run_is_reproducible_bit_for_bit(
    demo_model: HookedRootModule, demo_text: Dataset, tmp_path: Path
):
    for name in ("first", "second"):
        cfg = lm_config(
            sae_config("feature_choice", aux_loss="aux_zipf"),
            output_path=str(tmp_path / name),
        )
        runner = AllocSAETrainingRunner(cfg, demo_text, demo_model)
        torch.rand(3 if name == "second" else 5)  # does not matter
        runner.run()
    for file in ("sae_weights.safetensors", "cfg.json", "metrics.jsonl"):
        first, second = (tmp_path / name / file for name in ("first", "second"))
        assert first.read_bytes() == second.read_bytes(), file


@pytest.mark.usefixtures("few_calibration_tokens")
def test_our_runner_logs_held_out_metrics_at_the_interval_of_sae_lens_evaluations(
    demo_model: HookedRootModule, demo_text: Dataset, tmp_path: Path
):
    cfg = lm_config(
        sae_config(normalize_activations="expected_average_only_in"),
        output_path=str(tmp_path),
        logger=LoggingConfig(
            log_to_wandb=False, wandb_log_frequency=2, eval_every_n_wandb_logs=2
        ),
    )
    AllocSAETrainingRunner(cfg, demo_text, demo_model).run()
    rows = [
        json.loads(line)
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert {row["step"]: "held_out/l0" in row for row in rows} == {
        1: False,
        3: True,
        5: False,
        7: True,
    }
    assert (
        rows[3]["held_out/explained_variance"] > rows[1]["held_out/explained_variance"]
    )
    assert 0 <= rows[3]["held_out/dead_features"] < D_SAE


@pytest.mark.usefixtures("few_calibration_tokens")
def test_hook_z_through_our_runner(tmp_path: Path):
    n_heads, d_head = 3, 4
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=1,
            d_model=12,
            n_ctx=16,
            n_heads=n_heads,
            d_head=d_head,
            d_vocab=40,
            act_fn="gelu",
            seed=0,
        )
    )
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(40, (300, 16), generator=generator)
    cfg = lm_config(
        sae_config(d_in=12, d_sae=64, k=4, reshape_activations="hook_z"),
        model_class_name="HookedTransformer",
        hook_name="blocks.0.attn.hook_z",
        is_dataset_tokenized=True,
        exclude_special_tokens=False,
        context_size=16,
        n_batches_in_buffer=32,
        output_path=str(tmp_path),
    )
    dataset = Dataset.from_dict({"tokens": text.tolist()})
    # the self-check passes
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The saved SAE")
        sae = AllocSAETrainingRunner(cfg, dataset, model).run()

    saved = SAE.load_from_disk(tmp_path)
    assert saved.cfg.reshape_activations == "hook_z"
    z = torch.randn(5, 7, n_heads, d_head, generator=generator)
    flat = z.flatten(-2)
    torch.testing.assert_close(saved.encode(z), sae.encode(flat), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(saved(z).flatten(-2), sae(flat), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("few_calibration_tokens")
def test_our_runner_goes_on_from_a_pretrained_sae(
    demo_model: HookedRootModule, demo_text: Dataset, tmp_path: Path
):
    cfg = lm_config(sae_config())
    pretrained = AllocSAETrainingRunner(cfg, demo_text, demo_model).run()
    pretrained.save_model(tmp_path)

    cfg = lm_config(sae_config(), from_pretrained_path=str(tmp_path))
    runner = AllocSAETrainingRunner(cfg, demo_text, demo_model)
    assert changed(state_of(pretrained), runner.sae) == set()
    sae = runner.run()
    assert statistics(sae).density_tokens.item() == 2 * 8 * 256
    assert {"W_enc", "W_dec"} <= changed(state_of(pretrained), sae)


def test_saved_sae_that_differs_from_the_trained_one_is_reported(
    demo_model: HookedRootModule, demo_text: Dataset, tmp_path: Path
):
    # SAELens' threshold for inference starts at 0 and is far too low after so few steps
    stock = BatchTopKTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=K)
    cfg = lm_config(stock, output_path=str(tmp_path))
    with pytest.warns(UserWarning, match="^The saved SAE, loaded with SAELens, has L0"):
        AllocSAETrainingRunner(cfg, demo_text, demo_model).run()


def test_our_runner_is_reproducible_and_trains_stock_architectures(
    demo_model: HookedRootModule, demo_text: Dataset
):
    saes: list[Any] = []
    for seed in (3, 3, 4):
        cfg = lm_config(
            TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=64, k=K),
            training_tokens=2 * 256,
            seed=seed,
        )
        torch.rand(len(saes) + 1)  # whatever was drawn before does not matter
        saes.append(AllocSAETrainingRunner(cfg, demo_text, demo_model).run())
    assert changed(state_of(saes[0]), saes[1]) == set()
    assert changed(state_of(saes[0]), saes[2])


def test_run_evals(
    demo_model: HookedRootModule,
    demo_text: Dataset,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(runner_module, "CALIBRATION_TOKENS", 4000)
    cfg = lm_config(sae_config(), training_tokens=24 * 256, lr=3e-3)
    runner = AllocSAETrainingRunner(cfg, demo_text, demo_model)
    sae = runner.run()
    assert not sae.training
    before = state_of(sae)
    metrics, per_feature = run_evals(
        sae=sae,
        activation_store=runner.activations_store,
        model=demo_model,
        activation_scaler=ActivationScaler(),
        eval_config=get_eval_everything_config(
            batch_size_prompts=8,
            n_eval_reconstruction_batches=1,
            n_eval_sparsity_variance_batches=2,
        ),
        exclude_special_tokens=True,
    )
    assert changed(before, sae) == set()
    # other tokens than those of the calibration
    assert metrics["sparsity"]["l0"] == pytest.approx(K, rel=0.25)
    assert metrics["reconstruction_quality"]["explained_variance"] > 0.1
    preserved = metrics["model_performance_preservation"]
    assert (
        preserved["ce_loss_without_sae"]
        < preserved["ce_loss_with_sae"]
        < preserved["ce_loss_with_ablation"]
    )
    assert len(per_feature["feature_density"]) == D_SAE
