"""
The whole pipeline on a randomly initialised language model of GPT-2 small's shape and random
tokens: nothing is downloaded, and the time does not depend on what the weights are.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
from sae_lens.training.sae_trainer import SAETrainer
from transformer_lens import HookedTransformer
from transformer_lens.config import HookedTransformerConfig

from benchmarks.clock import Clock
from benchmarks.gpu.scale import LanguageModelScale
from benchmarks.measure import synchronize
from benchmarks.pipeline import time_the_parts
from benchmarks.subject import Machine
from sae_lens_alloc import AllocSAETrainingRunner

OURS = "mutual_choice"
# Texts that the language model reads at a time.
CONTEXTS_PER_BATCH = 32
WARM_UP_STEPS = 8


def measure_pipeline(
    architecture: str, scale: LanguageModelScale, machine: Machine
) -> dict[str, Any]:
    """
    Trains twice: as a user does, for the tokens per second from the first step to the last; and
    with the device waited for at both ends of every part, for the share of each. The waits make
    the second training longer than the first.
    """
    machine.prepare()
    torch.manual_seed(0)
    model, text = language_model(scale, machine), random_text(scale)

    def train(tokens: int) -> None:
        with TemporaryDirectory() as output:
            cfg = _config(architecture, scale, machine, tokens, Path(output))
            runner_class = (
                AllocSAETrainingRunner
                if architecture == OURS
                else LanguageModelSAETrainingRunner
            )
            runner_class(cfg, override_dataset=text, override_model=model).run()

    # what is compiled or loaded at first use does not count
    train(WARM_UP_STEPS * scale.batch)
    with _timed_fit(machine) as taken:
        train(scale.training_tokens)
    clock = Clock(lambda: synchronize(machine))
    time_the_parts(clock)
    with clock.part("run"):
        train(scale.training_tokens)
    return {
        "training_tokens": scale.training_tokens,
        "tokens_per_second": scale.training_tokens / sum(taken),
        "seconds": clock.seconds(),
        "background_seconds": clock.seconds_of_other_threads(),
    }


def language_model(scale: LanguageModelScale, machine: Machine) -> HookedTransformer:
    """A randomly initialised model."""
    return HookedTransformer(
        HookedTransformerConfig(
            n_layers=scale.n_layers,
            d_model=scale.d_model,
            d_head=scale.d_model // scale.n_heads,
            n_heads=scale.n_heads,
            n_ctx=scale.context_size,
            d_vocab=scale.vocabulary,
            act_fn="gelu_new",
            device=machine.device,
        )
    )


def random_text(scale: LanguageModelScale) -> Dataset:
    """Tokens for the training, and as many again to hold out and to calibrate on."""
    n_texts = 2 * scale.training_tokens // scale.context_size + 4 * CONTEXTS_PER_BATCH
    tokens = torch.randint(scale.vocabulary, (n_texts, scale.context_size))
    return Dataset.from_dict({"input_ids": tokens.tolist()})


@contextmanager
def _timed_fit(machine: Machine) -> Iterator[list[float]]:
    """A list of the seconds that each training loop within takes."""
    taken: list[float] = []
    fit = SAETrainer.fit

    def timed(self: SAETrainer[Any, Any]) -> Any:
        synchronize(machine)
        start = time.perf_counter()
        sae = fit(self)
        synchronize(machine)
        taken.append(time.perf_counter() - start)
        return sae

    SAETrainer.fit = timed
    try:
        yield taken
    finally:
        SAETrainer.fit = fit


def _config(
    architecture: str,
    scale: LanguageModelScale,
    machine: Machine,
    tokens: int,
    output: Path,
) -> LanguageModelSAERunnerConfig[Any]:
    return LanguageModelSAERunnerConfig.from_dict(
        {
            "sae": {
                "architecture": architecture,
                "d_in": scale.d_model,
                "d_sae": scale.d_sae,
                "k": scale.k,
            },
            "model_name": "random",
            "dataset_path": "random",
            "hook_name": f"blocks.{scale.hooked_layer}.hook_resid_pre",
            "context_size": scale.context_size,
            "is_dataset_tokenized": True,
            "prepend_bos": False,
            "training_tokens": tokens,
            "train_batch_size_tokens": scale.batch,
            "n_batches_in_buffer": 16,
            "store_batch_size_prompts": CONTEXTS_PER_BATCH,
            "device": machine.device,
            "autocast": machine.autocast,
            "autocast_lm": machine.autocast,
            "lr": 3e-4,
            "n_checkpoints": 0,
            "checkpoint_path": None,
            "output_path": str(output),
            "verbose": False,
            "logger": {"log_to_wandb": False},
        }
    )
