"""
A stock TopK SAE of the demo's language model, trained further for a fifth of its tokens: as TopK, as
Mutual Choice at once, by way of TopK or with two passes, as Feature Choice. Over seeds, on the same text in the
same order, and judged on held-out text. What has finished is kept; docs/fine-tuning.md has the
table.

    python -m benchmarks.fine_tuning docs/results/fine_tuning.json --work output/fine_tuning
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import LanguageModelSAERunnerConfig

from benchmarks.results import main_versions, write_results
from sae_lens_alloc.config.run_file import load_fine_tuning_config, load_runner_config
from sae_lens_alloc.demo.methods import Trained
from sae_lens_alloc.demo.run import CONTEXTS, evaluate
from sae_lens_alloc.training.fine_tuning import FineTuningRunner
from sae_lens_alloc.training.runner import AllocSAETrainingRunner
from sae_lens_alloc.training.source_sae import load_source_sae

CONFIGS = Path(__file__).parent.parent / "configs"
TOPK = "sae={architecture: topk, d_in: 192, d_sae: 3072, k: 16}"
SEEDS = (0, 1, 2)
# Settings beside those of configs/finetune_demo.yaml, which trains on a fifth of the tokens.
CONTINUATIONS = {
    "topk": [],
    "topk, lr 1e-3": ["lr=1e-3"],
    "mutual_choice": [],
    "mutual_choice, lr 1e-3": ["lr=1e-3"],
    "mutual_choice, no margin": ["sae.selection_margin=0"],
    "mutual_choice, topk_steps 50%": ["sae.topk_steps=50%"],
    "refined_mutual_choice": ["sae.architecture=refined_mutual_choice"],
    "feature_choice": ["sae={architecture: feature_choice, aux_loss: none}"],
}


def train_topk(folder: Path, seed: int) -> Trained:
    """The stock SAE to start from, saved for inference and, in `training`, to go on with."""
    cfg = load_runner_config(
        CONFIGS / "demo_mutual_choice.yaml",
        [TOPK, f"seed={seed}", f"output_path={folder}", "verbose=false"],
    )
    if not (folder / "training").exists():
        sae = AllocSAETrainingRunner(cfg).run()
        sae.save_model(folder / "training")
    return Trained("topk", cfg, folder, 0.0, None)


def go_on(name: str, start: Trained, folder: Path, seed: int) -> Trained:
    """The same SAE after more tokens."""
    source = load_source_sae(str(start.folder), "cpu")
    settings = [f"seed={100 + seed}", f"output_path={folder}", "verbose=false"]
    settings += CONTINUATIONS[name]
    cfg: LanguageModelSAERunnerConfig[Any]
    if name.startswith("topk"):
        sae = f"sae={{architecture: topk, k: {source.sae.cfg.k}}}"
        start_from = f"from_pretrained_path={start.folder / 'training'}"
        cfg, _ = load_fine_tuning_config(
            CONFIGS / "finetune_demo.yaml", [*settings, sae, start_from], source.sae.cfg
        )
        AllocSAETrainingRunner(cfg).run()
    else:
        cfg, chosen = load_fine_tuning_config(
            CONFIGS / "finetune_demo.yaml", settings, source.sae.cfg
        )
        FineTuningRunner(cfg, source, chosen).run()
    return Trained(name, cfg, folder, 0.0, None)


def run_seed(
    work: Path, seed: int, known: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """
    Figures on held-out text of the SAE to start from and of each continuation, those that are
    known already included.
    """
    missing = [name for name in ("start", *CONTINUATIONS) if name not in known]
    if not missing:
        return known
    start = train_topk(work / f"start_{seed}", seed)
    trained = [
        replace(start, name=name)
        if name == "start"
        else go_on(name, start, work / f"{name.replace(' ', '_')}_{seed}", seed)
        for name in missing
    ]
    runs, _ = evaluate(trained, CONTEXTS)
    figures = {**known, **{run.name: run.evaluation.to_dict() for run in runs}}
    return {name: figures[name] for name in ("start", *CONTINUATIONS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--work", type=Path, default=Path("output/fine_tuning"))
    args = parser.parse_args()
    report: dict[str, Any] = {
        "versions": main_versions(),
        "threads": torch.get_num_threads(),
        "command": "python -m benchmarks.fine_tuning docs/results/fine_tuning.json",
        "seeds": {},
    }
    if args.results.exists():
        report["seeds"] = json.loads(args.results.read_text())["seeds"]
    for seed in map(str, SEEDS):
        known = report["seeds"].get(seed, {})
        report["seeds"][seed] = run_seed(args.work, int(seed), known)
        write_results(args.results, report)


if __name__ == "__main__":
    main()
