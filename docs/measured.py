"""The tables of single measurements: the demo, fine-tuning, timed switch, finish, and faults."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DEMO = RESULTS / "demo.json"
FINE_TUNING = RESULTS / "fine_tuning.json"
FINE_TUNING_MINILM = RESULTS / "fine_tuning_minilm.json"
TIMED_SWITCH = RESULTS / "timed_switch.json"
KL_FINISH = RESULTS / "kl_finish.json"
KL_FINISH_VALIDATION = RESULTS / "kl_finish_validation.json"
FAULTS = RESULTS / "faults.json"
SHIFT = RESULTS / "shift.json"


def demo_table() -> str:
    """The table of the demo, from the results.json that `make demo` wrote."""
    results = json.loads(DEMO.read_text())
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


def fine_tuning_table(path: Path) -> str:
    """The continuations of a TopK SAE, from what benchmarks/fine_tuning.py measured."""
    report = json.loads(path.read_text())
    versions, seeds = report["versions"], list(report["seeds"].values())
    columns = {
        "variance explained": ("explained_variance", ".4f"),
        "CE recovered (mean ablation)": ("ce_recovered_mean", ".4f"),
        "CE recovered (zero ablation)": ("ce_recovered_zero", ".4f"),
        "features per token": ("l0", ".2f"),
        "dead": ("dead_features", ".0f"),
        "rare (< 1e-4)": ("rare_features", ".0f"),
    }
    # there is no cross-entropy without a language model
    measured = seeds[0]["start"]
    columns = {
        name: column for name, column in columns.items() if column[0] in measured
    }
    rows = [
        f"{_number_of(seeds)}, {seeds[0]['start']['n_tokens']:,} "
        f"tokens; torch {versions['torch']}, sae-lens {versions['sae_lens']} "
        f"(`{report['command']}`):\n",
        f"| trained on as | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name in seeds[0]:
        cells = _over_seeds(columns, [seed[name] for seed in seeds])
        label = "not at all" if name == "start" else name
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(rows)


def shift_table() -> str:
    """SAEs on unlike text, from what benchmarks/shift.py measured."""
    report = json.loads(SHIFT.read_text())
    versions = report["versions"]
    columns = {
        "features per token": ("l0", ".2f"),
        "variance explained": ("explained_variance", ".4f"),
        "CE recovered (mean ablation)": ("ce_recovered_mean", ".4f"),
        "KL": ("kl_divergence", ".3f"),
        "dead": ("dead_features", ".0f"),
    }
    rows = [
        f"Mean over the seeds (lowest to highest); torch {versions['torch']}, sae-lens "
        f"{versions['sae_lens']} (`{report['command']}`).\n",
        f"| text | SAE | seeds | {' | '.join(columns)} |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for text, saes in report["texts"].items():
        for name, seeds in saes.items():
            cells = _over_seeds(columns, seeds)
            where = f"{text}, {seeds[0]['n_tokens']:,} tokens"
            rows.append(f"| {where} | {name} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(rows)


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


def kl_finish_table(path: Path) -> str:
    """A finish by the KL divergence, from what benchmarks/kl_finish.py measured."""
    report = json.loads(path.read_text())
    versions, runs = report["versions"], report["rows"]
    columns = {
        "variance explained": ("explained_variance", ".4f"),
        "CE recovered (mean ablation)": ("ce_recovered_mean", ".4f"),
        "KL": ("kl_divergence", ".4f"),
        "dead": ("dead_features", ".0f"),
    }
    # beside the training of the same seed without a finish
    beside = {
        "not explained, change": ("not explained", "+.1%"),
        "CE gap, change": ("CE gap", "+.1%"),
        "KL, change": ("KL", "+.1%"),
        "time of a step, ratio": ("step", ".1f"),
        "with its activations, ratio": ("step and activations", ".1f"),
    }
    rows = [
        f"{_number_of(list(runs['none']))}, shipped language model, {report['tokens']:,} training "
        f"tokens, {report['split']} split; {report['machine']}, torch {versions['torch']}, "
        f"sae-lens {versions['sae_lens']} (`{report['command']}`):\n",
        f"| kl_finish, kl_weight | {' | '.join([*columns, *beside])} |",
        "|---" * (len(columns) + len(beside) + 1) + "|",
    ]
    for name, seeds in runs.items():
        cells = _over_seeds(columns, list(seeds.values()))
        if name == "none":
            cells += [""] * len(beside)
        else:
            changes = [_changes(run, runs["none"][seed]) for seed, run in seeds.items()]
            cells += _over_seeds(beside, changes)
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _changes(run: dict[str, Any], without: dict[str, Any]) -> dict[str, float]:
    """What a finish changes of a training, and how many times as long its steps take."""
    seconds = run["step_seconds"]
    step, activations = seconds["step"], seconds["activations"]
    return {
        "not explained": (1 - run["explained_variance"])
        / (1 - without["explained_variance"])
        - 1,
        "CE gap": (1 - run["ce_recovered_mean"]) / (1 - without["ce_recovered_mean"])
        - 1,
        "KL": run["kl_divergence"] / without["kl_divergence"] - 1,
        "step": seconds["step_with_kl"] / step,
        "step and activations": (seconds["step_with_kl"] + activations)
        / (step + activations),
    }


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


def _number_of(seeds: list[Any]) -> str:
    if len(seeds) == 1:
        return "One seed"
    return f"Mean of {len(seeds)} seeds (lowest to highest)"


def _over_seeds(
    columns: dict[str, tuple[str, str]], seeds: list[dict[str, float]]
) -> list[str]:
    """A cell for each column, which names a figure of every seed and its style."""
    return [
        mean_and_range([seed[key] for seed in seeds], style)
        for key, style in columns.values()
    ]


def mean_and_range(values: list[float], style: str) -> str:
    """The mean, and lowest to highest where there are several."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:{style}}"
    return f"{mean:{style}} ({min(values):{style}}–{max(values):{style}})"
