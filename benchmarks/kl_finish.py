"""
A finish by the KL divergence of the language model (`kl_finish`), beside the same training without
one: on the shipped model, over seeds, at equal features per token. What has finished is kept;
docs/experiments.md has the table.

    python -m benchmarks.kl_finish docs/results/kl_finish.json
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE
from sae_lens.util import get_special_token_ids

from benchmarks.results import (
    describe_machine,
    load_results,
    main_versions,
    write_results,
)
from sae_lens_alloc.activations.contexts import held_out_contexts
from sae_lens_alloc.comparison.language_model import held_out_texts
from sae_lens_alloc.config.run_config import AllocSAERunnerConfig
from sae_lens_alloc.config.run_file import load_runner_config
from sae_lens_alloc.demo.run import HELD_OUT_TEXT
from sae_lens_alloc.evaluation.on_contexts import OnContexts
from sae_lens_alloc.saes.saved_sae import load_sae
from sae_lens_alloc.thresholds.operating_point import at_l0
from sae_lens_alloc.training.runner import AllocSAETrainingRunner
from sae_lens_alloc.training.trainer import AllocSAETrainer

CONFIG = Path(__file__).parent.parent / "configs" / "demo_mutual_choice.yaml"
NONE = "none"
TIMED_STEPS = 21

Figures = dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """
    What is trained.

    Args:
        tokens: Tokens of a training.
        finishes: Values of kl_finish.
        weights: Values of kl_weight.
        split: Half of the held-out text that the figures are of, "validation" or "test". The
            thresholds are set on the validation split.
    """

    tokens: int
    finishes: Sequence[str]
    weights: Sequence[float]
    split: str

    def rows(self) -> dict[str, list[str]]:
        """Settings by name, those without a finish first."""
        return {
            NONE: [],
            **{
                f"{finish}, {weight:g}": [f"kl_finish={finish}", f"kl_weight={weight}"]
                for finish in self.finishes
                for weight in self.weights
            },
        }


class HeldOut:
    """
    The held-out text, whose contexts go to the validation and the test split in turn.

    Args:
        runner: A run, with its language model.
        split: The split that figures are of.
    """

    def __init__(self, runner: AllocSAETrainingRunner, split: str) -> None:
        tokenizer: Any = runner.model.tokenizer
        contexts = held_out_contexts(
            held_out_texts(HELD_OUT_TEXT), tokenizer, runner.cfg.context_size
        )
        store: Any = runner.activations_store
        special = get_special_token_ids(tokenizer)
        self._validation, test = (
            OnContexts(store, runner.cfg, half, special)
            for half in (contexts[::2], contexts[1::2])
        )
        self._measured = test if split == "test" else self._validation

    def measure(self, folder: Path, k: float) -> Figures:
        """Figures of a saved SAE with k features per token on the validation split."""
        sae = at_l0(load_sae(folder, "cpu").eval(), self._validation.activations, k)
        figures = self._measured.measure(sae).to_dict()
        return {
            name: value for name, value in figures.items() if name != "l0_histogram"
        }


def new_runner(
    grid: Grid, settings: Sequence[str], folder: Path, seed: int
) -> AllocSAETrainingRunner:
    """A training of the grid."""
    cfg = load_runner_config(
        CONFIG,
        [
            *(f"training_tokens={grid.tokens}", f"seed={seed}", "verbose=false"),
            *(f"output_path={folder}", *settings),
        ],
    )
    return AllocSAETrainingRunner(cfg, overwrite=True)


def train(runner: AllocSAETrainingRunner, held_out: HeldOut) -> Figures:
    """Trains one SAE and measures it."""
    start = time.perf_counter()
    sae = runner.run()
    cfg: Any = runner.cfg
    found: Figures = {
        "steps": cfg.total_training_steps,
        "kl_steps": cfg.kl_finish,
        "seconds": time.perf_counter() - start,
        **held_out.measure(Path(cfg.output_path), cfg.sae.k),
    }
    if cfg.kl_finish:
        found["step_seconds"] = step_seconds(runner, cfg, sae)
    return found


def step_seconds(
    runner: AllocSAETrainingRunner,
    cfg: AllocSAERunnerConfig[Any],
    sae: TrainingSAE[Any],
) -> dict[str, float]:
    """Median seconds of a step at the end of the training, by what it is."""
    batches = [next(runner.activations_store) for _ in range(TIMED_STEPS)]
    trainer = AllocSAETrainer(cfg.to_sae_trainer_config(), sae, iter(batches))
    trainer.n_training_steps = cfg.total_training_steps
    seconds: dict[str, list[float]] = {"step": [], "step_with_kl": []}
    for batch in batches:
        for name, kl_finish in (("step", None), ("step_with_kl", runner.kl_finish)):
            trainer.kl_finish = kl_finish
            start = time.perf_counter()
            trainer.step(batch)
            seconds[name].append(time.perf_counter() - start)
            trainer.n_training_steps += 1
    start = time.perf_counter()
    for _ in range(TIMED_STEPS):
        next(runner.activations_store)
    return {
        **{name: median(times) for name, times in seconds.items()},
        "activations": (time.perf_counter() - start) / TIMED_STEPS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="continued if it exists")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--finish", nargs="+", default=["20%"])
    parser.add_argument("--weight", type=float, nargs="+", default=[0.03])
    parser.add_argument("--split", choices=["validation", "test"], default="test")
    parser.add_argument("--work", type=Path, default=Path("output/kl_finish"))
    args = parser.parse_args()
    grid = Grid(args.tokens, args.finish, args.weight, args.split)
    about = {
        "versions": main_versions(),
        "machine": describe_machine("cpu"),
        "tokens": grid.tokens,
        "split": grid.split,
    }
    report = load_results(args.results, about) or {**about, "rows": {}}
    report["command"] = (
        f"python -m benchmarks.kl_finish docs/results/{args.results.name} --tokens {grid.tokens} "
        f"--seeds {' '.join(map(str, args.seeds))} --finish {' '.join(grid.finishes)} "
        f"--weight {' '.join(f'{w:g}' for w in grid.weights)} --split {grid.split}"
    )
    held_out = None
    for seed in args.seeds:
        for name, settings in grid.rows().items():
            row = report["rows"].setdefault(name, {})
            if str(seed) not in row:
                folder = args.work / f"{name}_{seed}".replace(" ", "")
                runner = new_runner(grid, settings, folder, seed)
                held_out = held_out or HeldOut(runner, grid.split)
                row[str(seed)] = train(runner, held_out)
                write_results(args.results, report)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
