"""
Probes on the features of SAEs, by sae-probes' protocol and on its data sets of English text: how well
does a logistic regression on a few features tell the classes apart, beside one on all of the
model's activations? docs/results.md has the tables.

    python -m benchmarks probes docs/results/probes.json --model minilm output/compare_minilm
    python -m benchmarks probes docs/results/probes.json --model demo output/compare_demo

The SAEs are those of a folder that `sae-lens-alloc compare CONFIG --output FOLDER` wrote. What is in
the file already is not measured again. sae-probes asks for other versions than constraints.txt, so it needs an
environment of its own, see benchmarks/requirements-probes.txt.
"""

import argparse
import hashlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.last_tokens import SUBJECTS, Subject, last_token_activations
from benchmarks.results import installed_versions, load_results, write_results
from sae_lens_alloc.saes.saved_sae import load_sae, read_json_mapping

PACKAGES = ("sae-probes", "sae-lens", "scikit-learn", "torch", "transformers")
# As in sae-probes' own example: balanced classes, at most 1,024 texts to learn from, l1.
SETTING = "normal"
PENALTY = "l1"
FEATURES = (1, 16)  # of a probe
FIGURES = {"auc": "test_auc", "f1": "test_f1"}
BASELINE = "logreg"  # on all activations, l2


def in_drawn_order(datasets: Sequence[str]) -> list[str]:
    """Data sets in an order that is the same everywhere and says nothing about them."""
    return sorted(datasets, key=lambda name: hashlib.sha256(name.encode()).hexdigest())


def find_saes(comparison: Path, l0: int, d_in: int) -> dict[tuple[str, int], Path]:
    """
    The SAEs of a comparison at an L0, by row and seed, each row at the settings that were best.

    Args:
        comparison: The folder that `sae-lens-alloc compare` wrote.
        l0: Features per token that the SAEs were brought to.
        d_in: Width of the activations that they are to take.

    Raises:
        ValueError: if the comparison has not written its results, has no SAE at this L0, or is one
            of SAEs of another model.
    """
    results = read_json_mapping(comparison / "results.json")
    width = results.get("subject", {}).get("d_in")
    if width != d_in:
        raise ValueError(
            f"{str(comparison)!r} is no comparison of SAEs of this model: they take {width} "
            f"dimensions, and the model has {d_in}."
        )
    found = {
        (point["row"], run["seed"]): comparison / f"cells/{run['cell']}/l0-{l0}"
        for point in results["points"]
        if point["k"] == l0
        for run in point["runs"]
    }
    if not found:
        raise ValueError(f"{str(comparison)!r} has no SAE at {l0} features per token.")
    return found


def texts_of(dataset: str) -> list[str]:
    """
    The texts of one of sae-probes' data sets, in its order. sae-probes exports functions that read
    them for models of TransformerLens alone, so this calls what those call.
    """
    from sae_probes.utils_data import (  # type: ignore[import-not-found]
        read_numbered_dataset_df,
    )

    return read_numbered_dataset_df(dataset)["prompt"].tolist()


def cache_file(work: Path, model: str, dataset: str, hook_name: str) -> Path:
    """Where sae-probes looks for a model's activations on a data set before it makes them."""
    return work / f"model_activations_{model}" / f"{dataset}_{hook_name}.pt"


def store_activations(
    work: Path, model: str, subject: Subject, datasets: Sequence[str]
) -> None:
    """Writes the activations that are not there yet."""
    for dataset in datasets:
        path = cache_file(work, model, dataset, subject.hook_name)
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(last_token_activations(subject, texts_of(dataset)), partial)
        partial.replace(path)
        print(f"activations of {model}: {dataset}", file=sys.stderr)


def read_figures(paths: Sequence[Path]) -> dict[int, dict[str, list[float]]]:
    """
    The figures in sae-probes' output files, a file a data set: by features of the probe (0 for one
    on activations) and name, a number for each data set.
    """
    figures: dict[int, dict[str, list[float]]] = {}
    for path in paths:
        for probe in json.loads(path.read_text()):
            of_probe = figures.setdefault(
                probe.get("k", 0), {name: [] for name in FIGURES}
            )
            for name, key in FIGURES.items():
                of_probe[name].append(round(probe[key], 4))
    return figures


def common_arguments(
    work: Path, model: str, hook_name: str, datasets: Sequence[str]
) -> dict[str, Any]:
    """What sae-probes' functions need to find activations and to measure as here."""
    return {
        "model_name": model,
        "hook_name": hook_name,
        "setting": SETTING,
        "model_cache_path": work,
        "datasets": list(datasets),
        "device": "cpu",
    }


def probe_activations(arguments: dict[str, Any], output: Path) -> dict[str, Any]:
    """Figures of logistic regressions on all of the model's activations."""
    from sae_probes import run_baseline_evals  # type: ignore[import-not-found]

    run_baseline_evals(**arguments, method=BASELINE, results_path=output)
    folder = output / f"baseline_results_{arguments['model_name']}/{SETTING}_setting"
    return read_figures(_files(folder, arguments, BASELINE))[0]


def probe_sae(folder: Path, arguments: dict[str, Any], output: Path) -> dict[str, Any]:
    """Figures of logistic regressions on the features of an SAE that differ most by class."""
    from sae_probes import run_sae_evals  # type: ignore[import-not-found]

    run_sae_evals(
        **arguments,
        sae=load_sae(folder),
        reg_type=PENALTY,
        ks=list(FEATURES),
        results_path=output,
    )
    results = output / f"sae_probes_{arguments['model_name']}/{SETTING}_setting"
    figures = read_figures(_files(results, arguments, PENALTY))
    return {str(k): of_probe for k, of_probe in figures.items()}


def _files(folder: Path, arguments: dict[str, Any], ending: str) -> list[Path]:
    return [
        folder / f"{dataset}_{arguments['hook_name']}_{ending}.json"
        for dataset in arguments["datasets"]
    ]


def run(args: argparse.Namespace) -> None:
    """Measures what the file of results does not have yet, and writes it after each SAE."""
    from sae_probes import DATASETS  # type: ignore[import-not-found]

    subject = SUBJECTS[args.model]()
    saes = find_saes(args.comparison, args.l0, subject.d_in)
    datasets = in_drawn_order(DATASETS)[: args.datasets]
    protocol = {"setting": SETTING, "penalty": PENALTY, "features": list(FEATURES)}
    about = {"versions": installed_versions(PACKAGES), "protocol": protocol}
    content = load_results(args.results, about) or {**about, "models": {}}
    found = content["models"].setdefault(
        args.model,
        {
            "command": command(args),
            "hook_name": subject.hook_name,
            "max_tokens": subject.max_tokens,
            "l0": args.l0,
            "datasets": datasets,
            "saes": [],
        },
    )
    if (found["l0"], found["datasets"]) != (args.l0, datasets):
        raise ValueError(
            f"{str(args.results)!r} has figures at {found['l0']} features per token on "
            f"{len(found['datasets'])} data sets: give the same, or another file."
        )
    work = args.work / args.model
    store_activations(work, args.model, subject, datasets)
    arguments = common_arguments(work, args.model, subject.hook_name, datasets)
    if "activations" not in found:
        found["activations"] = probe_activations(arguments, work / "activations")
        write_results(args.results, content)
    done = {(sae["row"], sae["seed"]) for sae in found["saes"]}
    for (row, seed), folder in saes.items():
        if (row, seed) in done:
            continue
        output = work / "saes" / f"{folder.parent.name}-{folder.name}"
        figures = probe_sae(folder, arguments, output)
        found["saes"].append({"row": row, "seed": seed, "probes": figures})
        write_results(args.results, content)


def command(args: argparse.Namespace) -> str:
    """The command of these measurements."""
    return (
        f"python -m benchmarks probes docs/results/probes.json --model {args.model} "
        f"{args.comparison} --l0 {args.l0} --datasets {args.datasets}"
    )


def main(arguments: Sequence[str]) -> None:
    """Probes the SAEs of a comparison."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks probes")
    parser.add_argument(
        "results", type=Path, help="results file, continued if it is there"
    )
    parser.add_argument("comparison", type=Path, help="folder of a comparison's SAEs")
    parser.add_argument("--model", choices=SUBJECTS, required=True)
    parser.add_argument("--l0", type=int, default=16, help="features per token")
    parser.add_argument(
        "--datasets", type=int, default=113, help="how many, in an order that is drawn"
    )
    parser.add_argument("--work", type=Path, default=Path("output/probes"))
    args = parser.parse_args(arguments)
    if importlib.util.find_spec("sae_probes") is None:
        parser.error(
            "sae-probes is not installed: see benchmarks/requirements-probes.txt."
        )
    if args.datasets < 1:
        parser.error("--datasets must be at least 1.")
    try:
        run(args)
    except ValueError as error:
        parser.error(str(error))
