"""The tables of docs/experiments.md and docs/results.md, from what `sae-lens-alloc compare` wrote."""

import json
from pathlib import Path
from typing import Any

from benchmarks import comparison_tables

RESULTS = Path(__file__).parent / "results"
EXPERIMENTS = {
    name: RESULTS / f"{name}.json"
    for name in (
        *("experiments_demo", "experiments_synthetic"),
        *("optimizer_demo", "optimizer_synthetic"),
    )
}
# The rows of each table of docs/experiments.md; the others are told against the first.
EXPERIMENT_ROWS = {
    "experiments_demo": {
        "demo": ("mutual_choice", "topk", "batchtopk"),
        "margin": (
            "mutual_choice",
            "no margin",
            "margin of 25%",
        ),
        "order": (
            "mutual_choice",
            "no Feature Choice",
            "Feature Choice for 12.5%",
            "Feature Choice for 50%",
            "Feature Choice throughout",
            "Mutual Choice, then Feature Choice",
        ),
        "budget": (
            "mutual_choice",
            "k throughout",
            "from 4 k",
            "at least a token a batch for each feature",
        ),
        "aux": (
            "mutual_choice",
            "no auxiliary loss",
            "aux_k",
            "aux_zipf, gone for the last quarter",
            "aux_zipf, a tenth as strong",
            "aux_zipf, twice as many features a token",
            "aux_zipf, below 25% of the law",
            "aux_zipf, below 90% of the law",
        ),
        "nested language": (
            "matryoshka_mutual_choice",
            "nested, no margin",
            "nested, margin of 25%",
            "nested, Feature Choice for 25%",
        ),
    },
    "experiments_synthetic": {
        "synthetic": (
            "mutual_choice",
            "topk",
            "batchtopk",
            "matryoshka_batchtopk",
            "no margin",
            "k throughout",
            "no Feature Choice",
            "Feature Choice for 50%",
        ),
        "nested": (
            "matryoshka_mutual_choice",
            "matryoshka_batchtopk",
            "nested, no margin",
            "nested, margin of 25%",
            "nested, k throughout",
            "nested, no Feature Choice",
            "nested, Feature Choice for 25%",
            "nested, Feature Choice for 75%",
        ),
    },
    "optimizer_demo": {"optimizers": ("adam", "row_sparse_adam")},
    "optimizer_synthetic": {"optimizers, synthetic": ("adam", "row_sparse_adam")},
}
COMPARISONS = {
    name: RESULTS / f"{name}.json"
    for name in (
        *("compare_demo", "compare_minilm"),
        *("compare_synthetic_small", "compare_synthetic_2k", "compare_synthetic_4k"),
    )
}
TRANSCODERS = RESULTS / "compare_transcoders_demo.json"
# the rows of ours whose lead is told
LEADS = (
    ("compare_demo", "mutual_choice"),
    ("compare_demo", "refined_mutual_choice"),
    ("compare_demo", "refined_mutual_choice, stock form"),
    ("compare_demo", "mutual_choice, muon"),
    ("compare_demo", "refined_mutual_choice, muon"),
    ("compare_minilm", "mutual_choice"),
    ("compare_minilm", "refined_mutual_choice"),
    ("compare_minilm", "refined_mutual_choice, stock form"),
    ("compare_minilm", "mutual_choice, muon"),
    ("compare_minilm", "refined_mutual_choice, muon"),
    ("compare_synthetic_small", "mutual_choice"),
    ("compare_synthetic_2k", "mutual_choice"),
    ("compare_synthetic_2k", "matryoshka_mutual_choice"),
    ("compare_synthetic_4k", "mutual_choice"),
    ("compare_synthetic_4k", "matryoshka_mutual_choice"),
)


def experiment_parts() -> dict[str, str]:
    """The tables of docs/experiments.md."""
    parts: dict[str, str] = {}
    for name, path in EXPERIMENTS.items():
        results = json.loads(path.read_text())
        parts[f"{name} on"] = compared_on(name, results)
        for table, rows in EXPERIMENT_ROWS[name].items():
            parts[table] = comparison_tables.experiment_table(results, rows)
    return parts


def comparison_parts() -> dict[str, str]:
    """The tables of docs/results.md."""
    measured = {
        name: json.loads(path.read_text()) for name, path in COMPARISONS.items()
    }
    parts: dict[str, str] = {}
    for name, results in measured.items():
        parts[f"{name} on"] = compared_on(name, results)
        parts[f"{name} all"] = comparison_tables.all_rows(results)
    for name, row in LEADS:
        parts[f"{name} lead of {row}"] = comparison_tables.lead_table(
            measured[name], row
        )
    return parts


def transcoder_parts() -> dict[str, str]:
    """The tables of docs/transcoders.md, or that there are none yet."""
    command = "sae-lens-alloc compare configs/compare_transcoders_demo.yaml"
    if not TRANSCODERS.exists():
        missing = f"Not measured yet. `{command}` writes the figures."
        return {
            "transcoders on": missing,
            "transcoders lead": "",
            "transcoders all": "",
        }
    results = json.loads(TRANSCODERS.read_text())
    picture = "![Variance and cross-entropy](images/compare_transcoders_demo.svg)"
    return {
        "transcoders on": f"{picture}\n\n{comparison_tables.compared_on(results, command)}",
        "transcoders lead": comparison_tables.lead_table(
            results, "mutual_choice_transcoder"
        ),
        "transcoders all": comparison_tables.all_rows(results),
    }


def compared_on(name: str, results: dict[str, Any]) -> str:
    """What the comparison of configs/<name>.yaml was on, and its command."""
    return comparison_tables.compared_on(
        results, f"sae-lens-alloc compare configs/{name}.yaml"
    )
