"""
Where the time of a whole training run goes: start-up, language model, activation store, SAE,
metrics, calibration and saving. Runs `sae-lens-alloc train` on the demo's config, on fewer
tokens, and SAELens' own runner with batchtopk beside it; each variant in a fresh process.
Variants that are in the results file are kept.

    python -m benchmarks.pipeline docs/results/pipeline_cpu.json
"""

import argparse
import io
import multiprocessing
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sae_lens import LanguageModelSAETrainingRunner
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.training.sae_trainer import SAETrainer

import sae_lens_alloc_cli as cli
from benchmarks.clock import Clock
from benchmarks.results import (
    describe_machine,
    installed_versions,
    load_results,
    write_results,
)
from sae_lens_alloc.activations.store import ResumableActivationsStore
from sae_lens_alloc.config.run_file import load_runner_config
from sae_lens_alloc.saes.training_step import SparseStepTrainingSAE
from sae_lens_alloc.training import after_training, run_trainer
from sae_lens_alloc.training import train_step as train_step_module
from sae_lens_alloc.training import trainer as trainer_module
from sae_lens_alloc.training.runner import AllocSAETrainingRunner
from sae_lens_alloc.training.step_graph import StepGraph
from sae_lens_alloc.training.trainer import AllocSAETrainer

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "demo_mutual_choice.yaml"
PACKAGES = ("torch", "sae-lens", "transformer-lens", "transformers", "datasets")
TOKENS = 200_000


@dataclass(frozen=True)
class Variant:
    """
    A training run.

    Args:
        overrides: Settings besides those of the demo's config.
        training_tokens: Tokens to train on.
        stock: By SAELens' own runner rather than the command.
    """

    overrides: tuple[str, ...] = ()
    training_tokens: int = TOKENS
    stock: bool = False


VARIANTS = {
    "as shipped": Variant(),
    "compile_sae": Variant(("compile_sae=true",)),
    # few tokens: CPUs without bfloat16 instructions take very long over these products
    "autocast": Variant(("autocast=true",), training_tokens=40_000),
    "prefetch_llm_batches": Variant(("prefetch_llm_batches=true",)),
    "SAELens batchtopk": Variant(
        ("sae={architecture: batchtopk, d_in: 192, d_sae: 3072, k: 16}",), stock=True
    ),
}


def measure(variant: Variant, started: float) -> dict[str, Any]:
    """
    Runs a variant in this process.

    Args:
        variant: What to run.
        started: When the process was started, in seconds since the epoch.

    Returns:
        Seconds of the parts of the run, see Clock, and of those of background threads.
    """
    imports = time.time() - started
    clock = Clock()
    time_the_parts(clock)
    with (
        TemporaryDirectory() as output,
        clock.part("run"),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        overrides = [
            *variant.overrides,
            f"model_name={ROOT / 'sae_lens_alloc/demo/model'}",
            f"dataset_path={ROOT / 'sae_lens_alloc/demo/corpus'}",
            f"training_tokens={variant.training_tokens}",
            f"output_path={output}",
        ]
        if variant.stock:
            cfg = load_runner_config(CONFIG, overrides)
            LanguageModelSAETrainingRunner(cfg).run()
        else:
            cli.train.train(CONFIG, overrides, overwrite=True)
    return {
        "training_tokens": variant.training_tokens,
        "seconds": {"run;imports": imports, **clock.seconds()},
        "background_seconds": clock.seconds_of_other_threads(),
    }


def time_the_parts(clock: Clock) -> None:
    """Counts the seams of SAELens and of ours as parts, in this process from now on."""
    seams: list[tuple[Any, str, str]] = [
        (LanguageModelSAETrainingRunner, "__init__", "start-up"),
        (AllocSAETrainingRunner, "__init__", "start-up"),
        (ActivationsStore, "get_filtered_llm_batch", "activation store"),
        (ActivationsStore, "__next__", "activation store"),
        (ResumableActivationsStore, "__next__", "activation store"),
        (ActivationsStore, "get_activations", "language model"),
        (PrefetchingIterator, "__next__", "activation store"),
        (SAETrainer, "_train_step", "trainer"),
        (trainer_module, "train_step", "trainer"),
        (SparseStepTrainingSAE, "take_step", "SAE forward"),
        (StepGraph, "_replay", "replayed step"),
        (torch.Tensor, "backward", "SAE backward"),
        (torch.nn.utils, "clip_grad_norm_", "optimizer"),
        (train_step_module, "clip_gradients", "optimizer"),
        (AllocSAETrainer, "_log", "metrics"),
        (trainer_module, "held_out_metrics", "held-out metrics"),
        (AllocSAETrainingRunner, "_calibration_activations", "calibration"),
        (after_training, "calibrate_thresholds", "calibration"),
        (after_training, "held_out_metrics", "saving and check"),
        (run_trainer, "provenance", "saving and check"),
        (after_training, "write_sae_somewhere", "saving and check"),
        (LanguageModelSAETrainingRunner, "save_final_sae", "saving and check"),
        (AllocSAETrainingRunner, "save_final_sae", "saving and check"),
    ]
    for owner, name, part in seams:
        setattr(owner, name, clock.timed(part, getattr(owner, name)))
    fit = SAETrainer.fit

    def timed_fit(self: SAETrainer[Any, Any]) -> Any:
        # not before: SAELens compiles the forward of the instance
        sae: Any = self.sae
        if not isinstance(sae, SparseStepTrainingSAE):
            sae.training_forward_pass = clock.timed(
                "SAE forward", sae.training_forward_pass
            )
        self.optimizer.step = clock.timed("optimizer", self.optimizer.step)
        with clock.part("training"):
            return fit(self)

    SAETrainer.fit = timed_fit


def in_fresh_process(variant: Variant) -> dict[str, Any]:
    """What `measure` returns in a process that has imported nothing yet."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, variant, time.time()).result()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pipeline",
        description="Where the time of a whole training run goes.",
    )
    parser.add_argument("json", type=Path, help="results file, continued if it exists")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    args = parser.parse_args()
    about = {
        "machine": describe_machine("cpu"),
        "versions": installed_versions(PACKAGES),
        "config": str(CONFIG.relative_to(ROOT)),
    }
    report = load_results(args.json, about) or {**about, "variants": {}}
    for name in args.variants:
        if name not in report["variants"]:
            measured = in_fresh_process(VARIANTS[name])
            # in the order of VARIANTS, whichever was measured first
            found = {**report["variants"], name: measured}
            report["variants"] = {key: found[key] for key in VARIANTS if key in found}
            write_results(args.json, report)
            print(f"{name}: {sum(measured['seconds'].values()):.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
