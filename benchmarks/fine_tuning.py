"""
A stock TopK SAE, trained further for a fifth of its tokens: as TopK, as Mutual Choice, with two
passes, or as Feature Choice. Over seeds, on the same activations in the same order, and judged on
what none of them trained on. What has finished is kept; docs/fine-tuning.md has the tables.

    python -m benchmarks.fine_tuning docs/results/fine_tuning.json
    python -m benchmarks.fine_tuning docs/results/fine_tuning_minilm.json --subject minilm

The activations of MiniLM are collected first: `python -m benchmarks minilm output/minilm`.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import LanguageModelSAERunnerConfig

from benchmarks.results import main_versions, write_results
from sae_lens_alloc.comparison.own_stream import open_split
from sae_lens_alloc.config.run_file import load_fine_tuning_config, load_runner_config
from sae_lens_alloc.demo.methods import Trained
from sae_lens_alloc.demo.run import CONTEXTS, evaluate
from sae_lens_alloc.evaluation.usage import as_user, measure_usage
from sae_lens_alloc.saes.saved_sae import load_sae
from sae_lens_alloc.thresholds.operating_point import at_l0
from sae_lens_alloc.training.fine_tuning import FineTuningRunner
from sae_lens_alloc.training.runner import AllocSAETrainingRunner
from sae_lens_alloc.training.source_sae import load_source_sae

CONFIGS = Path(__file__).parent.parent / "configs"
MINILM = Path("output/minilm")
K = 16
SEEDS = (0, 1, 2)

Figures = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """
    Activations that SAEs are trained on.

    Args:
        start: Config and settings of the TopK SAE to start from.
        config: Config of the fine-tuning, on a fifth of the tokens.
        continuations: Settings beside those of this config, by name.
        measure: Figures of trained SAEs, in their order.
    """

    start: tuple[Path, Sequence[str]]
    config: Path
    continuations: Mapping[str, Sequence[str]]
    measure: Callable[[Sequence[Trained]], list[Figures]]


def on_held_out_text(trained: Sequence[Trained]) -> list[Figures]:
    """Figures on the demo's held-out text, with the thresholds as saved."""
    runs, _ = evaluate(trained, CONTEXTS)
    return [run.evaluation.to_dict() for run in runs]


def on_test_packages(trained: Sequence[Trained]) -> list[Figures]:
    """Figures on MiniLM's test split, at K features per token on its validation split."""
    splits = [open_split(str(MINILM / split), None) for split in ("validation", "test")]
    validation, test = (rows.read(0, rows.n_rows) for rows in splits)
    found = []
    for run in trained:
        sae = at_l0(load_sae(run.folder, "cpu").eval(), validation, K)
        found.append(measure_usage(as_user(sae), test).to_dict())
    return found


SUBJECTS = {
    "demo": Subject(
        start=(
            CONFIGS / "demo_mutual_choice.yaml",
            [f"sae={{architecture: topk, d_in: 192, d_sae: 3072, k: {K}}}"],
        ),
        config=CONFIGS / "finetune_demo.yaml",
        continuations={
            "topk": [],
            "topk, lr 1e-3": ["lr=1e-3"],
            "mutual_choice": [],
            "mutual_choice, lr 1e-3": ["lr=1e-3"],
            "mutual_choice, no margin": ["sae.selection_margin=0"],
            "mutual_choice, topk_steps 50%": ["sae.topk_steps=50%"],
            "refined_mutual_choice": ["sae.architecture=refined_mutual_choice"],
            "feature_choice": ["sae={architecture: feature_choice, aux_loss: none}"],
        },
        measure=on_held_out_text,
    ),
    "minilm": Subject(
        start=(
            CONFIGS / "finetune_minilm.yaml",
            [
                *("training_tokens=800_000", "lr=2e-3"),
                *("lr_warm_up_steps=5%", "lr_decay_steps=20%"),
                f"sae={{architecture: topk, d_in: 384, d_sae: 6144, k: {K}}}",
            ],
        ),
        config=CONFIGS / "finetune_minilm.yaml",
        continuations={
            "topk": [],
            "topk, lr 5e-4": ["lr=5e-4"],
            "mutual_choice": [],
            "mutual_choice, lr 5e-4": ["lr=5e-4"],
            "refined_mutual_choice": ["sae.architecture=refined_mutual_choice"],
        },
        measure=on_test_packages,
    ),
}


def train_topk(subject: Subject, folder: Path, seed: int) -> Trained:
    """The stock SAE to start from, saved for inference and, in `training`, to go on with."""
    path, settings = subject.start
    settings = [*settings, f"seed={seed}", f"output_path={folder}", "verbose=false"]
    cfg = load_runner_config(path, settings)
    if not (folder / "training").exists():
        sae = AllocSAETrainingRunner(cfg).run()
        sae.save_model(folder / "training")
    return Trained("topk", cfg, folder, 0.0, None)


def go_on(
    subject: Subject, name: str, start: Trained, folder: Path, seed: int
) -> Trained:
    """The same SAE after more tokens."""
    source = load_source_sae(str(start.folder), "cpu")
    settings = [f"seed={100 + seed}", f"output_path={folder}", "verbose=false"]
    settings += subject.continuations[name]
    cfg: LanguageModelSAERunnerConfig[Any]
    if name.startswith("topk"):
        sae = f"sae={{architecture: topk, k: {source.sae.cfg.k}}}"
        start_from = f"from_pretrained_path={start.folder / 'training'}"
        cfg, _ = load_fine_tuning_config(
            subject.config, [*settings, sae, start_from], source.sae.cfg
        )
        AllocSAETrainingRunner(cfg).run()
    else:
        cfg, chosen = load_fine_tuning_config(subject.config, settings, source.sae.cfg)
        FineTuningRunner(cfg, source, chosen).run()
    return Trained(name, cfg, folder, 0.0, None)


def run_seed(
    subject: Subject, work: Path, seed: int, known: dict[str, Figures]
) -> dict[str, Figures]:
    """
    Figures of the SAE to start from and of each continuation, those that are known already
    included.
    """
    names = ["start", *subject.continuations]
    missing = [name for name in names if name not in known]
    if not missing:
        return known
    start = train_topk(subject, work / f"start_{seed}", seed)
    trained = [
        replace(start, name=name)
        if name == "start"
        else go_on(
            subject, name, start, work / f"{name.replace(' ', '_')}_{seed}", seed
        )
        for name in missing
    ]
    measured = zip(missing, subject.measure(trained), strict=True)
    figures = {**known, **dict(measured)}
    return {name: figures[name] for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--subject", choices=SUBJECTS, default="demo")
    parser.add_argument("--work", type=Path, help="[output/fine_tuning_SUBJECT]")
    args = parser.parse_args()
    work = args.work or Path("output") / f"fine_tuning_{args.subject}"
    chosen = "" if args.subject == "demo" else f" --subject {args.subject}"
    report: dict[str, Any] = {
        "versions": main_versions(),
        "threads": torch.get_num_threads(),
        "command": f"python -m benchmarks.fine_tuning docs/results/{args.results.name}{chosen}",
        "seeds": {},
    }
    if args.results.exists():
        report["seeds"] = json.loads(args.results.read_text())["seeds"]
    for seed in map(str, SEEDS):
        known = report["seeds"].get(seed, {})
        report["seeds"][seed] = run_seed(SUBJECTS[args.subject], work, int(seed), known)
        write_results(args.results, report)


if __name__ == "__main__":
    main()
