"""
The whole pipeline on a randomly initialised language model of GPT-2 small's shape and random
tokens: nothing is downloaded, and the time does not depend on what the weights are.
"""

import time
from dataclasses import replace
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
from benchmarks.subjects import Machine
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
    # what is compiled or loaded at first use does not count
    short = replace(scale, training_tokens=WARM_UP_STEPS * scale.batch)
    _train(architecture, short, machine, None)
    seconds = _train(architecture, scale, machine, None)
    clock = Clock(lambda: synchronize(machine))
    time_the_parts(clock)
    with clock.part("run"):
        _train(architecture, scale, machine, clock)
    return {
        "training_tokens": scale.training_tokens,
        "tokens_per_second": scale.training_tokens / seconds,
        "seconds": clock.seconds(),
        "background_seconds": clock.seconds_of_other_threads(),
    }


def _train(
    architecture: str,
    scale: LanguageModelScale,
    machine: Machine,
    clock: Clock | None,
) -> float:
    """Runs a whole training, and returns the seconds of its loop."""
    taken: list[float] = []
    with TemporaryDirectory() as output:
        runner = _runner(architecture, scale, machine, Path(output))
        fit = SAETrainer.fit
        if clock is None:

            def timed_fit(self: SAETrainer[Any, Any]) -> Any:
                synchronize(machine)
                start = time.perf_counter()
                sae = fit(self)
                synchronize(machine)
                taken.append(time.perf_counter() - start)
                return sae

            SAETrainer.fit = timed_fit
        try:
            runner.run()
        finally:
            SAETrainer.fit = fit
    return sum(taken)


def _runner(
    architecture: str, scale: LanguageModelScale, machine: Machine, output: Path
) -> LanguageModelSAETrainingRunner:
    torch.manual_seed(0)
    model = HookedTransformer(
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
    # twice what is trained on, for the held-out activations and the calibration
    n_texts = 2 * scale.training_tokens // scale.context_size + 4 * CONTEXTS_PER_BATCH
    tokens = torch.randint(scale.vocabulary, (n_texts, scale.context_size))
    text = Dataset.from_dict({"input_ids": tokens.tolist()})
    runner_class = (
        AllocSAETrainingRunner
        if architecture == OURS
        else LanguageModelSAETrainingRunner
    )
    cfg = LanguageModelSAERunnerConfig.from_dict(
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
            "training_tokens": scale.training_tokens,
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
    return runner_class(cfg, override_dataset=text, override_model=model)
