"""The shipped language model and text, and trainers on synthetic activations."""

import signal
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.load_model import load_model
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from transformer_lens.HookedTransformer import HookedRootModule

import sae_lens_alloc
from sae_lens_alloc import AllocSAERunnerConfig
from sae_lens_alloc.training import runner as runner_module
from tests.helpers import one_thread

__all__ = ["one_thread"]

DEMO = Path(sae_lens_alloc.__file__).parent / "demo"
MODEL = str(DEMO / "model")
CORPUS = str(DEMO / "corpus")
MODEL_CLASS = "AutoModelForCausalLM"
HOOK = "transformer.h.2"
OTHER_HOOK = "transformer.h.1"
D_MODEL = 192


def load_demo_model() -> HookedRootModule:
    """The shipped language model, as SAELens' runner would load it."""
    return load_model(MODEL_CLASS, MODEL, device="cpu", hook_names=[HOOK, OTHER_HOOK])


def short_documents(n: int) -> Dataset:
    """A few short documents of the shipped corpus: short ones are quick to tokenize."""
    texts: list[str] = pd.read_parquet(Path(CORPUS) / "train.parquet")["text"].tolist()
    return Dataset.from_dict({"text": [t for t in texts if 500 < len(t) < 3000][:n]})


@pytest.fixture(scope="session")
def demo_model() -> HookedRootModule:
    return load_demo_model()


@pytest.fixture(scope="session")
def demo_text() -> Dataset:
    return short_documents(60)


@pytest.fixture
def few_calibration_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "CALIBRATION_TOKENS", 1024)


@pytest.fixture
def restore_signals() -> Iterator[None]:
    """SAELens' runners leave their signal handlers behind."""
    before = {number: signal.getsignal(number) for number in (2, 15)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def lm_config(
    sae: TrainingSAEConfig, **overrides: Any
) -> LanguageModelSAERunnerConfig[Any]:
    """A run of a few thousand tokens on the shipped language model."""
    settings: dict[str, Any] = {
        "model_name": MODEL,
        "model_class_name": MODEL_CLASS,
        "hook_name": HOOK,
        "dataset_path": CORPUS,
        "dataset_trust_remote_code": None,
        "streaming": False,
        "is_dataset_tokenized": False,
        "exclude_special_tokens": True,
        "context_size": 64,
        "n_batches_in_buffer": 16,
        "store_batch_size_prompts": 8,
        "train_batch_size_tokens": 256,
        "training_tokens": 8 * 256,
        "n_batches_for_norm_estimate": 3,
        "n_eval_batches": 1,
        "lr": 1e-3,
        "logger": LoggingConfig(log_to_wandb=False, wandb_log_frequency=2),
        "checkpoint_path": None,
        "output_path": None,
        "verbose": False,
    }
    return LanguageModelSAERunnerConfig(sae=sae, **{**settings, **overrides})


def alloc_config(sae: TrainingSAEConfig, **overrides: Any) -> AllocSAERunnerConfig[Any]:
    """The same run, with the settings that SAELens' runner has not."""
    stock = lm_config(sae)
    settings: dict[str, Any] = {f.name: getattr(stock, f.name) for f in fields(stock)}
    settings["lr_end"] = None
    return AllocSAERunnerConfig(**{**settings, **overrides})


def make_trainer(
    sae: TrainingSAE[Any],
    batches: Iterable[torch.Tensor],
    n_steps: int,
    trainer_class: type[SAETrainer[Any, Any]] = SAETrainer,
    **overrides: Any,
) -> SAETrainer[Any, Any]:
    """A trainer of `n_steps` steps on batches of 64 tokens."""
    settings: dict[str, Any] = {
        "total_training_samples": 64 * n_steps,
        "train_batch_size_samples": 64,
        "lr": 1e-2,
        "lr_end": 1e-3,
        "dead_feature_window": 2,
        "n_batches_for_norm_estimate": 4,
        **overrides,
    }
    return trainer_class(SAETrainerConfig(**settings), sae, iter(batches))
