"""The demo: train, evaluate and report Mutual Choice beside SAELens' batchtopk."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import sae_lens
import torch
from rich.console import Console
from sae_lens import SAE
from sae_lens.load_model import load_model
from safetensors.torch import save_file

from sae_lens_alloc.activations.contexts import held_out_contexts
from sae_lens_alloc.activations.on_text import text_of_sae
from sae_lens_alloc.demo.methods import (
    CORPUS,
    RunnerConfig,
    Trained,
    demo_configs,
    events,
    train,
)
from sae_lens_alloc.evaluation.baseline import measure_baseline
from sae_lens_alloc.evaluation.metrics import evaluate_sae
from sae_lens_alloc.evaluation.report import write_report
from sae_lens_alloc.evaluation.report_run import ReportRun, read_history
from sae_lens_alloc.evaluation.results_table import results_table
from sae_lens_alloc.evaluation.snippets import Snippet, take_snippets
from sae_lens_alloc.features.loading import load_readable_sae
from sae_lens_alloc.features.measure import measure_features
from sae_lens_alloc.features.page import FeaturePage
from sae_lens_alloc.training.output_folder import (
    OWN_PREFIX,
    locked_folder,
    new_files,
)
from sae_lens_alloc.training.runner import METRICS_FILENAME
from sae_lens_alloc.version import __version__

# For a first look: fewer tokens of training and of evaluation.
QUICK = "training_tokens=120_000"
QUICK_CONTEXTS = 64
CONTEXTS = 400
N_SNIPPETS = 3

RESULTS_FILENAME = "results.json"
REPORT_FILENAME = "report.html"
FEATURES_FILENAME = "features.html"
HELD_OUT_TEXT = CORPUS / "heldout.parquet"
DENSITIES_FILENAME = "densities.safetensors"


def run_demo(output: Path, quick: bool, overwrite: bool) -> None:
    """
    Trains a Mutual Choice SAE and a stock batchtopk SAE on the same tokens, and evaluates the
    saved SAEs on held-out text. Prints a table, and writes the SAEs, `results.json`,
    `report.html`, and `features.html` about the features of the first. Needs no network.

    Args:
        output: Folder to write to.
        quick: Whether to train and evaluate on less text, for a first look.
        overwrite: Whether to write into the folder even if it holds something.

    Raises:
        FileExistsError: if the folder holds something and `overwrite` is not given.
        ValueError: if it is in use by another run, or has no room.
        OSError: if it cannot be written to.
    """
    with locked_folder(output, "--output"):
        names = (path.name for path in output.iterdir())
        if not overwrite and not all(name.startswith(OWN_PREFIX) for name in names):
            raise FileExistsError(
                f"{str(output)!r} is not empty: give --overwrite to write into it, or another "
                "folder."
            )
        _run_demo(output, quick, overwrite)


def _run_demo(output: Path, quick: bool, overwrite: bool) -> None:
    console = Console()
    configs = demo_configs(output, *([QUICK] if quick else []))
    trained: list[Trained] = []
    for name, cfg in configs.items():
        console.print(f"Training [bold]{name}[/] on {cfg.training_tokens:,} tokens")
        trained.append(train(name, cfg, overwrite))
    console.print("Evaluating the saved SAEs on held-out text")
    n_contexts = QUICK_CONTEXTS if quick else CONTEXTS
    runs, snippets = evaluate(trained, n_contexts)
    console.print(results_table(runs))
    console.print(f"Looking at the features of [bold]{trained[0].name}[/]")
    features = _features(trained[0], n_contexts)
    with new_files(output, "the report") as folder:
        write_results(folder, trained, runs, quick)
        write_report(
            folder / REPORT_FILENAME,
            "Two ways to spend one sparsity budget",
            _intro(trained[0].cfg, quick),
            runs,
            snippets,
            _facts(trained[0].cfg),
            {f"What each feature of {trained[0].name} does": FEATURES_FILENAME},
        )
        features.write(folder / FEATURES_FILENAME)
    console.print(f"Saved in {output}; open {output / REPORT_FILENAME} in a browser")


def evaluate(
    trained: Sequence[Trained], max_contexts: int
) -> tuple[list[ReportRun], list[Snippet]]:
    """Evaluates saved SAEs on at most `max_contexts` held-out contexts, and takes snippets to show."""
    cfg = trained[0].cfg
    model = load_model(
        cfg.model_class_name, cfg.model_name, cfg.device, hook_names=[cfg.hook_name]
    )
    tokenizer: Any = model.tokenizer
    texts = pq.read_table(HELD_OUT_TEXT, columns=["text"])["text"]
    tokens = held_out_contexts(
        texts.to_pylist(), tokenizer, cfg.context_size, max_contexts
    )
    baseline = measure_baseline(model, tokens, cfg.hook_name, [tokenizer.bos_token_id])
    runs = [
        ReportRun(
            name=run.name,
            evaluation=evaluate_sae(
                SAE.load_from_disk(run.folder), model, tokens, cfg.hook_name, baseline
            ),
            seconds=run.seconds,
            history=read_history(run.folder / METRICS_FILENAME),
            events=events(run.cfg),
            settings=_settings(run),
        )
        for run in trained
    ]
    shown = [len(tokens) * (2 * i + 1) // (2 * N_SNIPPETS) for i in range(N_SNIPPETS)]
    return runs, take_snippets(tokens, tokenizer, shown)


def write_results(
    output: Path, trained: Sequence[Trained], runs: Sequence[ReportRun], quick: bool
) -> None:
    """Writes results.json, and the densities of each SAE beside it."""
    results: dict[str, Any] = {
        "quick": quick,
        "versions": {
            "sae_lens_alloc": __version__,
            "sae_lens": sae_lens.__version__,
            "torch": torch.__version__,
        },
        "threads": torch.get_num_threads(),
        "runs": {},
    }
    for run, shown in zip(trained, runs, strict=True):
        law = shown.evaluation.zipf_law()
        results["runs"][run.name] = {
            "folder": run.folder.name,
            "seconds": run.seconds,
            "training_tokens": run.cfg.training_tokens,
            "lr": run.cfg.lr,
            "l0_before_calibration": run.l0_before,
            **shown.evaluation.to_dict(),
            "zipf": None if law is None else asdict(law),
        }
        with new_files(run.folder, "the densities") as folder:
            save_file(
                {"densities": shown.evaluation.densities}, folder / DENSITIES_FILENAME
            )
    (output / RESULTS_FILENAME).write_text(json.dumps(results, indent=2) + "\n")


def _features(run: Trained, n_contexts: int) -> FeaturePage:
    """What the features of a saved SAE do on about as much held-out text as is evaluated."""
    sae = load_readable_sae(str(run.folder))
    text = text_of_sae(sae, dataset_path=str(HELD_OUT_TEXT))
    features = torch.arange(sae.cfg.d_sae)
    return measure_features(
        sae, text, n_contexts * run.cfg.context_size, features, run.name
    )


def _intro(cfg: RunnerConfig, quick: bool) -> str:
    text = (
        "Two sparse autoencoders of a small language model, trained on the same text in the same "
        f"order, with {cfg.sae.k:g} features per token on average. They differ in the rule that "
        "allocates these features."
    )
    if quick:
        text += (
            " This was the quick demo. With so little training, look at the pictures and not at "
            "the figures."
        )
    return text


def _facts(cfg: RunnerConfig) -> dict[str, str]:
    return {
        "activations": f"{cfg.hook_name}, {cfg.sae.d_in} dimensions",
        "features": f"{cfg.sae.d_sae:,}",
        "trained on": f"{cfg.training_tokens:,} tokens",
        "in batches of": f"{cfg.train_batch_size_tokens:,}",
        "PyTorch threads": str(torch.get_num_threads()),
    }


def _settings(run: Trained) -> dict[str, str]:
    cfg = run.cfg
    settings = {
        "architecture": cfg.sae.architecture(),
        "learning rate": f"{cfg.lr:g}, {cfg.lr_warm_up_steps} steps of warm-up, "
        f"{cfg.lr_decay_steps} of decay, of {cfg.total_training_steps}",
        "dead_feature_window": f"{cfg.dead_feature_window} steps",
        "seed": str(cfg.seed),
    }
    if run.l0_before is not None:
        settings["threshold"] = (
            f"set for {cfg.sae.k:g} features per token on training text, as for the other SAE; "
            f"with the threshold that SAELens saved there were {run.l0_before:.1f}"
        )
    return settings
