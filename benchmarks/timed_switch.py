"""
The recipe where nobody tells how long the training is: SAELens' own runner and trainer, whose
switch of rules times itself, beside ours, which puts in the schedule. On the demo's language
model and where the features are known, both at equal features per token. docs/experiments.md has
the table.

    python -m benchmarks.timed_switch docs/results/timed_switch.json --work output/timed_switch
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, LanguageModelSAETrainingRunner, SAETrainer
from sae_lens.saes.sae import TrainingSAE

from benchmarks.results import load_results, main_versions, write_results
from sae_lens_alloc.activations.on_text import take_tokens
from sae_lens_alloc.comparison.config import load_comparison
from sae_lens_alloc.comparison.shared_activations import make_subject
from sae_lens_alloc.comparison.stream import stored_stream
from sae_lens_alloc.demo.methods import Trained, demo_configs
from sae_lens_alloc.demo.run import CONTEXTS, evaluate
from sae_lens_alloc.evaluation.usage import as_user, measure_usage
from sae_lens_alloc.thresholds.operating_point import at_l0
from sae_lens_alloc.training.runner import (
    CALIBRATION_TOKENS,
    METRICS_FILENAME,
    AllocSAETrainingRunner,
)
from sae_lens_alloc.training.trainer import AllocSAETrainer

SYNTHETIC = Path(__file__).parent.parent / "configs" / "experiments_synthetic.yaml"
# Nothing but the architecture is said.
OPEN = {"feature_choice_steps": None, "k_start": None, "k_decay_steps": 0}
# Training tokens of the runs on the language model: the demo's, and those of its experiments.
LANGUAGE_MODEL_TOKENS = (800_000, 2_000_000)
HOW = ("schedule", "timed")


def language_model(how: str, n_tokens: int, work: Path) -> dict[str, Any]:
    """Trains on the demo's language model by our runner or by SAELens', and evaluates."""
    folder = work / f"language-model-{n_tokens}-{how}"
    cfg = demo_configs(folder, f"training_tokens={n_tokens}")["mutual_choice"]
    cfg.sae = replace(cfg.sae, **OPEN)
    torch.manual_seed(cfg.seed)
    start = time.perf_counter()
    runner: LanguageModelSAETrainingRunner
    if how == "schedule":
        runner = AllocSAETrainingRunner(cfg, overwrite=True)
    else:
        runner = LanguageModelSAETrainingRunner(cfg)
    sae = runner.run()
    seconds = time.perf_counter() - start
    saved = Path(cfg.output_path or "")
    taken = take_tokens(runner.activations_store, CALIBRATION_TOKENS)
    at_l0(SAE.load_from_disk(saved), taken, cfg.sae.k).save_model(saved)
    # SAELens' runner writes no metrics, where the evaluation looks for them
    (saved / METRICS_FILENAME).touch()
    runs, _ = evaluate([Trained(how, cfg, saved, seconds, None)], CONTEXTS)
    return {
        **runs[0].evaluation.to_dict(),
        "steps": cfg.total_training_steps,
        "switch": _switch(sae),
    }


def known_features(how: str, work: Path) -> dict[str, Any]:
    """Trains on SynthSAEBench-2k by our trainer or by SAELens', and evaluates."""
    config, _ = load_comparison(SYNTHETIC)
    subject = make_subject(config)
    stream = stored_stream(work / "activations") or subject.write(work / "activations")
    cell = next(cell for cell in config.cells() if cell.row == "mutual_choice")
    cfg = cell.runner_config()
    cfg.sae = replace(cfg.sae, **OPEN)
    torch.manual_seed(cell.seed)
    sae: Any = TrainingSAE.from_dict(cfg.sae.to_dict())
    trainer_class = AllocSAETrainer if how == "schedule" else SAETrainer
    trainer_class(
        cfg.to_sae_trainer_config(),
        sae,
        stream.training_batches(cfg.train_batch_size_tokens),
    ).fit()
    validation = stream.split("validation")
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        saved = at_l0(SAE.load_from_disk(folder).eval(), validation, cfg.sae.k)
    usage = measure_usage(as_user(saved), validation)
    return {
        **usage.to_dict(),
        "steps": cfg.total_training_steps,
        "switch": _switch(sae),
    }


def _switch(sae: Any) -> int:
    """The first step of Mutual Choice."""
    steps = range(sae.step_count.last + 1)
    return next((step for step in steps if sae.rule_at(step) == "mutual"), len(steps))


def main() -> None:
    parser = argparse.ArgumentParser(description="The switch that times itself.")
    parser.add_argument("json", type=Path, help="results file, continued if it exists")
    parser.add_argument("--work", type=Path, default=Path("output/timed_switch"))
    args = parser.parse_args()
    about = {
        "command": "python -m benchmarks.timed_switch docs/results/timed_switch.json",
        "versions": main_versions(),
    }
    report = load_results(args.json, about) or {**about, "subjects": {}}
    subjects = {
        **{
            f"language model, {n:,} tokens": lambda how, n=n: language_model(
                how, n, args.work
            )
            for n in LANGUAGE_MODEL_TOKENS
        },
        "SynthSAEBench-2k, 4,000,000 samples": lambda how: known_features(
            how, args.work
        ),
    }
    for name, run in subjects.items():
        results = report["subjects"].setdefault(name, {})
        for how in HOW:
            if how not in results:
                results[how] = run(how)
                write_results(args.json, report)


if __name__ == "__main__":
    main()
