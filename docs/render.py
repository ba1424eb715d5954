"""
Writes what the documents take from code and from result files, so that no figure is typed.

    python docs/render.py           rewrites docs/config.md, the marked parts of README.md,
                                    docs/performance.md, docs/fine-tuning.md,
                                    docs/experiments.md, docs/results.md, docs/faults.md and
                                    docs/host-tests.md, and their pictures
    python docs/render.py --check   exits with 1 if they are not up to date

Drawing a picture needs kaleido and a Chrome or Chromium; only new measurements need it.
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import comparison_tables, tables
from benchmarks.gpu.tables import section_of
from benchmarks.plot import comparison, continuations, draw, growth, is_drawn_from
from scripts.config_reference import config_reference
from scripts.host_tests import compare as host_tests

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
RESULTS = DOCS / "results"
PERFORMANCE = RESULTS / "performance_cpu.json"
SWEEPS = RESULTS / "performance_cpu_sweeps.json"
PIPELINE = RESULTS / "pipeline_cpu.json"
GPU = RESULTS / "performance_gpu.json"
FAULTS = RESULTS / "faults.json"
FINE_TUNING = RESULTS / "fine_tuning.json"
TIMED_SWITCH = RESULTS / "timed_switch.json"
HOST_TESTS = RESULTS / "host_tests.json"
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
    for name in ("compare_demo", "compare_synthetic_small", "compare_synthetic_2k")
}
# the rows of ours whose lead is told
LEADS = (
    ("compare_demo", "mutual_choice"),
    ("compare_synthetic_small", "mutual_choice"),
    ("compare_synthetic_2k", "mutual_choice"),
    ("compare_synthetic_2k", "matryoshka_mutual_choice"),
)
# what each picture shows
PICTURES = {
    DOCS / "images" / "performance_cpu.svg": (SWEEPS, growth),
    DOCS / "images" / "fine_tuning.svg": (FINE_TUNING, continuations),
    DOCS / "images" / "compare_demo.svg": (COMPARISONS["compare_demo"], comparison),
}


def step_table() -> str:
    """The table of step times, from the file that `python -m benchmarks` wrote."""
    report = json.loads(PERFORMANCE.read_text())
    return f"{tables.measured_on(report)}\n\n{tables.centre_table(report)}"


def performance_parts() -> dict[str, str]:
    """The tables of docs/performance.md."""
    report = json.loads(SWEEPS.read_text())
    parts = {
        "limits": tables.limits(report),
        "centre": step_table(),
        "memory line": tables.memory_line_table(report),
        "pipeline": tables.pipeline_table(json.loads(PIPELINE.read_text())),
        "gpu": section_of(GPU),
    }
    for axis in tables.AXES:
        parts[f"time {axis}"] = tables.time_table(report, axis)
        parts[f"memory {axis}"] = tables.memory_table(report, axis)
    return parts


def demo_table() -> str:
    """The table of the demo, from the results.json that `make demo` wrote."""
    results = json.loads((RESULTS / "demo.json").read_text())
    versions, runs = results["versions"], results["runs"]
    first = next(iter(runs.values()))
    rows = [
        f"{first['training_tokens']:,} training tokens, {first['n_tokens']:,} tokens of "
        f"held-out text, {results['threads']} threads; torch {versions['torch']}, sae-lens "
        f"{versions['sae_lens']}, one seed (`make demo`):\n",
        "| saved SAE | variance explained | CE recovered (mean ablation) "
        "| CE recovered (zero ablation) | features per token | dead | rare (< 1e-4) "
        "| training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        rows.append(
            f"| `{name}` | {run['explained_variance']:.4f} "
            f"| {run['ce_recovered_mean']:.4f} | {run['ce_recovered_zero']:.4f} "
            f"| {run['l0']:.2f} | {run['dead_features']:,} | {run['rare_features']:,} "
            f"| {run['seconds']:.0f} s |"
        )
    return "\n".join(rows)


def fine_tuning_table() -> str:
    """The continuations of a TopK SAE, from what benchmarks/fine_tuning.py measured."""
    report = json.loads(FINE_TUNING.read_text())
    versions, seeds = report["versions"], list(report["seeds"].values())
    columns = {
        "variance explained": ("explained_variance", ".4f"),
        "CE recovered (mean ablation)": ("ce_recovered_mean", ".4f"),
        "CE recovered (zero ablation)": ("ce_recovered_zero", ".4f"),
        "features per token": ("l0", ".2f"),
        "dead": ("dead_features", ".0f"),
        "rare (< 1e-4)": ("rare_features", ".0f"),
    }
    rows = [
        f"Mean of {len(seeds)} seeds (lowest to highest), {seeds[0]['start']['n_tokens']:,} "
        f"tokens; torch {versions['torch']}, sae-lens {versions['sae_lens']} "
        f"(`{report['command']}`):\n",
        f"| trained on as | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name in seeds[0]:
        cells = [
            _mean_and_range([seed[name][key] for seed in seeds], style)
            for key, style in columns.values()
        ]
        label = "not at all" if name == "start" else name
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(rows)


def compared_on(name: str, results: dict[str, Any]) -> str:
    """What the comparison of configs/<name>.yaml was on, and its command."""
    return comparison_tables.compared_on(
        results, f"sae-lens-alloc compare configs/{name}.yaml"
    )


def experiment_parts() -> dict[str, str]:
    """The tables of docs/experiments.md."""
    parts: dict[str, str] = {}
    for name, path in EXPERIMENTS.items():
        results = json.loads(path.read_text())
        parts[f"{name} on"] = compared_on(name, results)
        for table, rows in EXPERIMENT_ROWS[name].items():
            parts[table] = comparison_tables.experiment_table(results, rows)
    parts["timed switch"] = timed_switch_table()
    return parts


def timed_switch_table() -> str:
    """The switch that times itself, from what benchmarks/timed_switch.py measured."""
    report = json.loads(TIMED_SWITCH.read_text())
    versions = report["versions"]
    rows = [
        f"One seed; torch {versions['torch']}, sae-lens {versions['sae_lens']} "
        f"(`{report['command']}`).\n",
        "| trained on | steps | our schedule: Mutual Choice from step | variance explained | dead "
        "| by itself: Mutual Choice from step | variance explained | dead | not explained |",
        "|---" * 9 + "|",
    ]
    for name, runs in report["subjects"].items():
        ours, timed = runs["schedule"], runs["timed"]
        more = (1 - timed["explained_variance"]) / (1 - ours["explained_variance"]) - 1
        cells = [
            f"{run['switch']:,} | {run['explained_variance']:.4f} | {run['dead_features']:,}"
            for run in (ours, timed)
        ]
        rows.append(
            f"| {name} | {ours['steps']:,} | {' | '.join(cells)} | {more:+.1%} |"
        )
    return "\n".join(rows)


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


def faults_table() -> str:
    """How bad inputs and faults ended, from what `python -m scripts.faults` counted."""
    if not FAULTS.exists():
        return "Not counted yet."
    report = json.loads(FAULTS.read_text())
    versions = report["versions"]
    every = report["every"]
    which = "All cases" if every == 1 else f"One case of {every}"
    outcomes = list(next(iter(report["scripts"].values()))["counts"])
    rows = [
        f"{which}; torch {versions['torch']}, sae-lens {versions['sae-lens']} "
        f"(`{report['command']}`):\n",
        f"| | cases | {' | '.join(outcomes)} |",
        "|---" * (len(outcomes) + 2) + "|",
    ]
    for name, script in report["scripts"].items():
        cells = [f"{script['counts'][outcome]:,}" for outcome in outcomes]
        rows.append(f"| {name} | {script['n_cases']:,} | {' | '.join(cells)} |")
    return "\n".join(rows)


def host_tests_parts() -> dict[str, str]:
    report = json.loads(HOST_TESTS.read_text())
    return {
        "host-tests": host_tests.counts(report),
        "host-tests-differences": host_tests.differences(report),
    }


def _mean_and_range(values: list[float], style: str) -> str:
    mean = sum(values) / len(values)
    return f"{mean:{style}} ({min(values):{style}}–{max(values):{style}})"


def rendered(page: Path, parts: dict[str, str]) -> str:
    """The text of a page with its marked parts written anew."""
    text = page.read_text()
    for name, content in parts.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, rest = text.split(start)
        _, after = rest.split(end)
        text = f"{before}{start}\n{content}\n{end}{after}"
    return text


def main() -> None:
    performance_page = DOCS / "performance.md"
    fine_tuning_page = DOCS / "fine-tuning.md"
    experiments_page = DOCS / "experiments.md"
    results_page = DOCS / "results.md"
    faults_page = DOCS / "faults.md"
    host_tests_page = DOCS / "host-tests.md"
    pages = {
        DOCS / "config.md": config_reference(),
        performance_page: rendered(performance_page, performance_parts()),
        fine_tuning_page: rendered(
            fine_tuning_page, {"fine-tuning": fine_tuning_table()}
        ),
        experiments_page: rendered(experiments_page, experiment_parts()),
        results_page: rendered(results_page, comparison_parts()),
        faults_page: rendered(faults_page, {"faults": faults_table()}),
        host_tests_page: rendered(host_tests_page, host_tests_parts()),
        README: rendered(README, {"step": step_table(), "demo": demo_table()}),
    }
    stale = [
        path
        for path, text in pages.items()
        if not path.exists() or path.read_text() != text
    ]
    stale += [
        picture
        for picture, (results, _) in PICTURES.items()
        if not is_drawn_from(picture, results)
    ]
    if "--check" in sys.argv[1:]:
        sys.exit(
            f"not up to date, run python docs/render.py: {', '.join(map(str, stale))}"
            if stale
            else 0
        )
    for path, text in pages.items():
        path.write_text(text)
    for picture, (results, figure) in PICTURES.items():
        if picture in stale:
            draw(picture, results, figure)


if __name__ == "__main__":
    main()
