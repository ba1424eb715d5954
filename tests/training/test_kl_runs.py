"""Whole runs whose last steps have the KL divergence of the language model in their loss."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE
from sae_lens.config import LoggingConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.HookedTransformer import HookedRootModule

from sae_lens_alloc import (
    AllocSAERunnerConfig,
    AllocSAETrainer,
    AllocSAETrainingRunner,
    MutualChoiceTrainingSAEConfig,
    train_on_activations,
)
from sae_lens_alloc.activations.store import ResumableActivationsStore
from sae_lens_alloc.evaluation.metrics import evaluate_sae
from sae_lens_alloc.evaluation.report_run import read_history
from sae_lens_alloc.ops.backend import BACKEND_VARIABLE
from sae_lens_alloc.training import fine_tuning, step_graph
from sae_lens_alloc.training.fine_tuning import FineTuningRunner
from sae_lens_alloc.training.kl_finish import KLStep
from sae_lens_alloc.training.source_sae import SourceSAE
from sae_lens_alloc.training.step_graph import StepGraph
from sae_lens_alloc.training.train_step import clip_gradients
from tests.training.conftest import (
    D_MODEL,
    alloc_config,
    lm_config,
    load_demo_model,
    short_documents,
)
from tests.training.recorded_operations import OperationRecording

pytestmark = pytest.mark.usefixtures("restore_signals", "few_calibration_tokens")

N_STEPS, N_KL_STEPS = 10, 4


def mutual_choice(**settings: Any) -> MutualChoiceTrainingSAEConfig:
    defaults: dict[str, Any] = {"d_in": D_MODEL, "d_sae": 128, "k": 8}
    return MutualChoiceTrainingSAEConfig(**{**defaults, **settings})


def run_settings(folder: Path, **overrides: Any) -> dict[str, Any]:
    return {
        "training_tokens": N_STEPS * 256,
        "output_path": str(folder / "sae"),
        "logger": LoggingConfig(
            log_to_wandb=False, wandb_id="run", wandb_log_frequency=1
        ),
        **overrides,
    }


def files(folder: Path) -> dict[str, bytes]:
    names = ("sae_weights.safetensors", "sparsity.safetensors", "metrics.jsonl")
    return {name: (folder / "sae" / name).read_bytes() for name in names}


def test_a_run_resumed_within_the_finish_ends_bit_for_bit(
    demo_model: HookedRootModule, tmp_path: Path
):
    # so few that both the batches and the contexts of the finish begin anew
    text = short_documents(5)

    def run(folder: Path, **overrides: Any) -> None:
        settings = run_settings(folder, kl_finish="60%", context_size=32, **overrides)
        sae = mutual_choice(normalize_activations="expected_average_only_in")
        AllocSAETrainingRunner(alloc_config(sae, **settings), text, demo_model).run()

    whole = tmp_path / "whole"
    checkpoints = whole / "checkpoints"
    run(whole, checkpoint_path=str(checkpoints), n_checkpoints=N_STEPS - 1)
    expected = files(whole)
    steps = [int(folder.name) // 256 for folder in (checkpoints / "run").iterdir()]
    assert {3, 5, 7, 9} <= set(steps)
    for step in (3, 5, 7, 9):
        folder = tmp_path / str(step)
        (folder / "sae").mkdir(parents=True)
        (folder / "sae" / "metrics.jsonl").write_bytes(expected["metrics.jsonl"])
        checkpoint = checkpoints / "run" / str(256 * step)
        run(
            folder,
            checkpoint_path=str(checkpoints),
            resume_from_checkpoint=str(checkpoint),
        )
        assert files(folder) == expected, step


def test_the_finish_changes_nothing_before_it_and_nothing_without_it(
    demo_model: HookedRootModule, demo_text: Dataset, tmp_path: Path
):
    runs = {
        "stock config": lm_config(mutual_choice(), **run_settings(tmp_path / "a")),
        "none": alloc_config(mutual_choice(), **run_settings(tmp_path / "b")),
        "finish": alloc_config(
            mutual_choice(), **run_settings(tmp_path / "c", kl_finish="40%")
        ),
    }
    for run in runs.values():
        AllocSAETrainingRunner(run, demo_text, demo_model).run()
    assert files(tmp_path / "a") == files(tmp_path / "b")
    plain, finished = (
        read_history(tmp_path / name / "sae" / "metrics.jsonl") for name in "bc"
    )
    n_before = N_STEPS - N_KL_STEPS
    assert plain[:n_before] == finished[:n_before]
    assert len(plain) == len(finished) == N_STEPS
    for before, after in zip(plain[n_before:], finished[n_before:], strict=True):
        assert after.keys() - before.keys() == {"losses/kl_loss"}
        mse = after["losses/mse_loss"]
        losses = [
            value
            for name, value in after.items()
            if name.startswith("losses/")
            and name not in ("losses/overall_loss", "losses/kl_loss")
        ]
        # the margin's term is 0 in value
        assert after["losses/overall_loss"] == pytest.approx(
            sum(losses) + 0.03 * mse, rel=1e-4
        )
        assert after["metrics/l0"] == before["metrics/l0"]


def test_batches_that_a_thread_prefetches(
    demo_model: HookedRootModule, demo_text: Dataset, tmp_path: Path
):
    # without a shuffle, whose draws would be another thread's
    for name, prefetch in (("a", False), ("b", 2)):
        settings = run_settings(
            tmp_path / name,
            kl_finish="60%",
            prefetch_llm_batches=prefetch,
            activations_mixing_fraction=0.0,
            store_batch_size_prompts=4,
        )
        cfg = alloc_config(mutual_choice(), **settings)
        AllocSAETrainingRunner(cfg, demo_text, demo_model).run()
    rows = [read_history(tmp_path / name / "sae" / "metrics.jsonl") for name in "ab"]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_the_language_model_changes_less(
    demo_model: HookedRootModule, demo_text: Dataset, tmp_path: Path
):
    # few enough contexts that each step has them all before long
    of_text = alloc_config(mutual_choice())
    store = ResumableActivationsStore.from_config(demo_model, of_text, demo_text)
    tokens = store.get_batch_tokens(8)
    contexts = Dataset.from_dict({"tokens": tokens.tolist() * 30})
    found: dict[str, float] = {}
    for finish in ("0%", "50%"):
        settings = run_settings(
            tmp_path / finish, training_tokens=60 * 256, lr=2e-3, lr_decay_steps="25%"
        )
        cfg = alloc_config(
            mutual_choice(d_sae=256), kl_finish=finish, kl_weight=0.3, **settings
        )
        AllocSAETrainingRunner(cfg, contexts, demo_model).run()
        saved = SAE.load_from_disk(tmp_path / finish / "sae")
        evaluation = evaluate_sae(saved, demo_model, tokens, cfg.hook_name)
        found[finish] = evaluation.kl_divergence
    assert found["50%"] < 0.8 * found["0%"]
    rows = read_history(tmp_path / "50%" / "sae" / "metrics.jsonl")
    divergences = [r["losses/kl_loss"] for r in rows if "losses/kl_loss" in r]
    assert len(divergences) == 30
    # a step has two contexts, so the last eight steps have the contexts of the first eight
    assert sum(divergences[-8:]) < 0.5 * sum(divergences[:8])


def test_a_fine_tuning_has_the_finish_too(
    demo_model: HookedRootModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fine_tuning, "CALIBRATION_TOKENS", 1024)
    # random weights explain nothing
    monkeypatch.setattr(fine_tuning, "require_plausible", lambda *_: None)
    monkeypatch.setattr(
        "sae_lens_alloc.training.sourced_runner.load_language_model",
        lambda _: demo_model,
    )
    short_documents(20).to_parquet(tmp_path / "text.parquet")
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=64, k=4))
    settings = run_settings(
        tmp_path, kl_finish="40%", dataset_path=str(tmp_path / "text.parquet")
    )
    cfg = alloc_config(mutual_choice(d_sae=64, k=4, feature_choice_steps=0), **settings)
    FineTuningRunner(cfg, SourceSAE("random", sae, None, None, None), {}).run()
    rows = read_history(tmp_path / "sae" / "metrics.jsonl")
    assert ["losses/kl_loss" in row for row in rows] == 6 * [False] + 4 * [True]


@pytest.mark.slow
def test_a_finish_after_replayed_steps(
    demo_model: Any, demo_text: Dataset, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(BACKEND_VARIABLE, "triton")
    monkeypatch.setattr(step_graph, "STEPS_BEFORE_RECORDING", 1)
    monkeypatch.setattr(OperationRecording, "replays", 0)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_layers": 1, "d_model": 8, "n_ctx": 8, "d_head": 4}
    small = HookedTransformer(
        HookedTransformerConfig(**sizes, act_fn="gelu", d_vocab=1536, device="cpu")
    )
    small.set_tokenizer(demo_model.tokenizer)

    def weights(with_graph: bool) -> dict[str, torch.Tensor]:
        sizes = {"d_in": 8, "d_sae": 40, "k": 2, "feature_choice_steps": 0}
        sae = mutual_choice(**sizes, aux_loss="none", selection_margin=0.25)
        cfg = alloc_config(
            sae,
            hook_name="blocks.0.hook_resid_pre",
            kl_finish="40%",
            context_size=8,
            train_batch_size_tokens=12,
            training_tokens=N_STEPS * 12,
        )
        runner = AllocSAETrainingRunner(cfg, demo_text, small)
        trainer = AllocSAETrainer(
            cfg.to_sae_trainer_config(), runner.sae, runner.activations_store
        )
        trainer.kl_finish = runner.kl_finish
        clip, autocast = partial(clip_gradients, trainer), trainer.autocast_if_enabled
        graph = StepGraph(runner.sae, clip, autocast, OperationRecording)  # pyright: ignore
        monkeypatch.setattr(
            trainer, "_make_graph", lambda _: graph if with_graph else None
        )
        trainer.fit()
        return dict(runner.sae.named_parameters())

    expected = weights(with_graph=False)
    assert OperationRecording.replays == 0
    found = weights(with_graph=True)
    assert OperationRecording.replays == N_STEPS - N_KL_STEPS - 2
    assert [n for n, w in expected.items() if not torch.equal(found[n], w)] == []


def test_what_cannot_work_is_refused_before_the_training(
    demo_text: Dataset,
):
    cfg = alloc_config(mutual_choice(), kl_finish=4)
    model: Any = load_demo_model()
    forward = model.model.forward
    model.model.forward = torch.no_grad()(forward)
    beginning = (
        "kl_finish needs a gradient of the language model with respect to the activations at "
        "'transformer.h.2', but "
    )
    end = ": give kl_finish=0, or another hook or model."
    with pytest.raises(ValueError) as error:
        AllocSAETrainingRunner(cfg, demo_text, model)
    assert str(error.value) == f"{beginning}none comes back{end}"

    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:  # noqa: ARG004
            raise RuntimeError("this kernel has no backward pass")

    model.model.forward = forward
    model.model.lm_head.register_forward_hook(
        lambda *passed: NoBackward.apply(passed[-1])
    )
    with pytest.raises(ValueError) as error:
        AllocSAETrainingRunner(cfg, demo_text, model)
    assert str(error.value) == (
        f"{beginning}that fails (RuntimeError: this kernel has no backward pass){end}"
    )


def test_a_run_without_a_language_model_has_no_finish():
    cfg = AllocSAERunnerConfig(
        sae=mutual_choice(),
        training_tokens=N_STEPS * 256,
        train_batch_size_tokens=256,
        kl_finish=4,
        checkpoint_path=None,
        output_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )
    with pytest.raises(ValueError, match="kl_finish is 4, but the run is on activ"):
        train_on_activations(torch.randn(4000, D_MODEL), cfg)


def test_a_divergence_that_is_not_finite_ends_the_training(
    demo_model: HookedRootModule, demo_text: Dataset, monkeypatch: pytest.MonkeyPatch
):
    cfg = alloc_config(
        mutual_choice(), training_tokens=N_STEPS * 256, kl_finish=N_KL_STEPS
    )
    runner = AllocSAETrainingRunner(cfg, demo_text, demo_model)
    assert runner.kl_finish is not None
    begin = runner.kl_finish.begin

    def of_a_broken_model(*args: Any) -> KLStep | None:
        kl_step = begin(*args)
        if kl_step is not None:
            kl_step.untouched.fill_(float("nan"))
        return kl_step

    monkeypatch.setattr(runner.kl_finish, "begin", of_a_broken_model)
    with pytest.raises(ValueError, match="KL divergence of training step 6 is NaN"):
        runner.run()
