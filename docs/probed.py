"""The tables of probes on the features of SAEs, from what `python -m benchmarks probes` measured."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from docs.measured import mean_and_range

PROBES = Path(__file__).parent / "results" / "probes.json"
FIGURES = {"auc": "AUC", "f1": "F1"}
# The rows in this order, and the one that the others are told against.
ROWS = (
    *("topk", "batchtopk", "mutual_choice", "refined_mutual_choice"),
    "refined_mutual_choice, stock form",
)
BESIDE = "batchtopk"

Seeds = Sequence[Sequence[float]]  # of each seed, a figure of each data set


def probes_table(model: str) -> str:
    """The rows of a model's SAEs, with what they were measured on."""
    report = json.loads(PROBES.read_text())
    return f"{probed_on(report, model)}\n\n{rows_table(report, model)}"


def probed_on(report: dict[str, Any], model: str) -> str:
    """What was measured, with what, and by which command."""
    found, versions = report["models"][model], report["versions"]
    whole = {
        title: f"{statistics.mean(found['activations'][name]):.3f}"
        for name, title in FIGURES.items()
    }
    packages = ("sae-probes", "sae-lens", "scikit-learn", "torch")
    return (
        f"A probe on all of the model's activations has an AUC of **{whole['AUC']}** and an F1 of "
        f"**{whole['F1']}**. {len(found['datasets'])} data sets; SAEs of `{found['hook_name']}` with "
        f"{found['l0']} features per token; at most {found['max_tokens']} tokens of a text; mean over the data "
        "sets, then over the seeds (lowest to highest); "
        f"{', '.join(f'{name} {versions[name]}' for name in packages)} (`{found['command']}`)."
    )


def rows_table(report: dict[str, Any], model: str) -> str:
    """A line for each row of SAEs."""
    found = report["models"][model]
    sizes = [str(n) for n in report["protocol"]["features"]]
    columns = [
        f"{title}, {n} feature{'s' * (n != '1')}"
        for title in FIGURES.values()
        for n in sizes
    ]
    columns += [f"AUC beside {BESIDE}, {sizes[-1]} features", "higher on"]
    lines = [
        f"| probe on | {' | '.join(columns)} | seeds |",
        "|---" * (len(columns) + 2) + "|",
    ]
    theirs = _seeds(found, BESIDE, sizes[-1], "auc")
    for row in ROWS:
        cells = [
            mean_and_range(
                [statistics.mean(seed) for seed in _seeds(found, row, n, name)], ".3f"
            )
            for name in FIGURES
            for n in sizes
        ]
        ours = _seeds(found, row, sizes[-1], "auc")
        cells += ["–", "–"] if row == BESIDE else beside(ours, theirs)
        lines.append(f"| {row} | {' | '.join(cells)} | {len(ours)} |")
    return "\n".join(lines)


def beside(ours: Seeds, theirs: Seeds) -> list[str]:
    """
    How much higher our figures are than theirs, data set by data set: the mean difference with its
    standard error over the data sets, and on how many of them it is above 0.
    """
    differences = [
        statistics.mean(own) - statistics.mean(other)
        for own, other in zip(zip(*ours), zip(*theirs), strict=True)
    ]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    above = sum(difference > 0 for difference in differences)
    return [
        f"{statistics.mean(differences):+.3f} ± {error:.3f}",
        f"{above} of {len(differences)}",
    ]


def _seeds(found: dict[str, Any], row: str, n: str, name: str) -> Seeds:
    return [sae["probes"][n][name] for sae in found["saes"] if sae["row"] == row]
