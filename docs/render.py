"""
Writes what the documents take from code and from result files, so that no figure is typed.

    python docs/render.py           rewrites docs/config.md, the marked parts of README.md,
                                    docs/performance.md, docs/fine-tuning.md,
                                    docs/experiments.md, docs/results.md, docs/faults.md and
                                    docs/host-tests.md, and their pictures
    python docs/render.py --check   exits with 1 if they are not up to date

Drawing a picture needs kaleido and a Chrome or Chromium; only new measurements need it.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from docstring_parser import parse
from sae_lens.saes.sae import TrainingSAEConfig

from benchmarks import comparison_tables, tables
from benchmarks.plot import comparison, continuations, draw, growth, is_drawn_from
from sae_lens_alloc.saes.allocation_sae_config import AllocationTrainingSAEConfig
from sae_lens_alloc.saes.auxiliary_loss import AuxiliaryLossTrainingSAEConfig
from sae_lens_alloc.saes.feature_choice_sae import FeatureChoiceTrainingSAEConfig
from sae_lens_alloc.saes.matryoshka_mutual_choice_sae import (
    MatryoshkaMutualChoiceTrainingSAEConfig,
)
from sae_lens_alloc.saes.mutual_choice_sae import MutualChoiceTrainingSAEConfig
from sae_lens_alloc.training.run_config import AllocSAETrainerConfig
from scripts.host_tests import compare as host_tests

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
RESULTS = DOCS / "results"
PERFORMANCE = RESULTS / "performance_cpu.json"
SWEEPS = RESULTS / "performance_cpu_sweeps.json"
PIPELINE = RESULTS / "pipeline_cpu.json"
FAULTS = RESULTS / "faults.json"
FINE_TUNING = RESULTS / "fine_tuning.json"
TIMED_SWITCH = RESULTS / "timed_switch.json"
HOST_TESTS = RESULTS / "host_tests.json"
EXPERIMENTS = {
    name: RESULTS / f"{name}.json"
    for name in ("experiments_demo", "experiments_synthetic")
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


def config_reference() -> str:
    """The page of all config fields, from the dataclasses and their docstrings."""
    own = {
        field.name
        for config_class in (
            MutualChoiceTrainingSAEConfig,
            FeatureChoiceTrainingSAEConfig,
        )
        for field in dataclasses.fields(config_class)
    }
    aux = AuxiliaryLossTrainingSAEConfig
    aux_fields = set(aux.__dataclass_fields__) - set(
        TrainingSAEConfig.__dataclass_fields__
    )
    shared = {field.name for field in dataclasses.fields(AllocationTrainingSAEConfig)}
    sections = [
        "# Config reference\n",
        "Fields under `sae:` of a YAML config, or of the config classes in Python. Written by "
        "`python docs/render.py` from the docstrings. The keys outside `sae:` are those of "
        "SAELens' `LanguageModelSAERunnerConfig`, "
        "[with a few differences](checks.md), and [two of ours](#the-run).\n",
        "## All of ours\n",
        _field_table(AllocationTrainingSAEConfig, shared),
        "## `mutual_choice`\n",
        _field_table(MutualChoiceTrainingSAEConfig, own - shared),
        "## `matryoshka_mutual_choice`\n",
        "The fields of `mutual_choice` and:\n",
        _field_table(
            MatryoshkaMutualChoiceTrainingSAEConfig,
            {"matryoshka_widths", "feature_choice_steps"},
        ),
        "## `feature_choice`\n",
        _field_table(FeatureChoiceTrainingSAEConfig, own - shared),
        "## `batchtopk_aux_zipf`, `gated_aux_zipf`, `jumprelu_aux_zipf`, "
        "`matryoshka_batchtopk_aux_zipf`, `standard_aux_zipf`, `topk_aux_zipf`\n",
        "The fields of SAELens' own architecture and:\n",
        _field_table(aux, aux_fields),
        "## The run\n",
        "Fields at top level, next to SAELens' own. In Python they are fields of "
        "`AllocSAERunnerConfig` for `AllocSAETrainingRunner`, and of `AllocSAETrainerConfig` for "
        "`AllocSAETrainer`, which take SAELens' own configs too.\n",
        _field_table(AllocSAETrainerConfig, {"optimizer", "cuda_graph"}),
    ]
    return "\n".join(sections)


def _field_table(config_class: type[Any], names: set[str]) -> str:
    described = {
        param.arg_name: " ".join((param.description or "").split())
        for param in parse(config_class.__doc__ or "").params
    }
    rows = ["| field | type | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(config_class):
        if field.name in names:
            rows.append(
                f"| `{field.name}` | {_type_name(field)} | {_default(field)} "
                f"| {described[field.name]} |"
            )
    return "\n".join(rows) + "\n"


def _type_name(field: dataclasses.Field[Any]) -> str:
    name = field.type if isinstance(field.type, str) else str(field.type)
    name = name.replace("typing.", "").replace("<class '", "").replace("'>", "")
    return name.split(".")[-1].replace("|", "\\|")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    return "" if field.default_factory is not dataclasses.MISSING else "required"


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
