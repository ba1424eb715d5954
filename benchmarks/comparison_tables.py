"""Markdown tables of what `sae-lens-alloc compare` measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sae_lens_alloc.comparison.results import numbers_of_seeds
from sae_lens_alloc.config.run_file import sae_config_class
from sae_lens_alloc.saes.reference_transcoders import (
    BatchTopKTrainingTranscoderConfig,
    TopKTrainingTranscoderConfig,
)

Results = dict[str, Any]

REFERENCES = (
    TopKTrainingTranscoderConfig.architecture(),
    BatchTopKTrainingTranscoderConfig.architecture(),
)

SHARED = {
    "variance explained": ("explained_variance", ".4f"),
}
OF_KIND = {
    "language_model": {
        "CE recovered (mean ablation)": ("ce_recovered_mean", ".4f"),
        "CE recovered (zero ablation)": ("ce_recovered_zero", ".4f"),
        "KL": ("kl_divergence", ".4f"),
    },
    "synthetic": {
        "F1": ("f1", ".4f"),
        "MCC": ("mcc", ".4f"),
        "uniqueness": ("uniqueness", ".4f"),
    },
    "own_activations": {},
}
COUNTS = {
    "L0": ("l0", ".2f"),
    "dead": ("dead_features", ",.0f"),
    "rare (< 1e-4)": ("rare_features", ",.0f"),
}
COST = {"training (s)": ("seconds", ",.0f")}
# The rows of ours of which one must be trained at a k before the tables show it.
RECIPES = ("mutual_choice", "mutual_choice_transcoder")


def compared_on(results: Results, command: str) -> str:
    """What was compared, on what, and how to do it again."""
    subject, machine, versions = (
        results["subject"],
        results["machine"],
        results["versions"],
    )
    compare = results["settings"]["compare"]
    split = compare.get("measured_on", "test")
    seeds = numbers_of_seeds(compare)
    lrs = _numbers(compare["lr"]) + "".join(
        f"; {row}: {_numbers(sae['lr'])}"
        for row, sae in compare["rows"].items()
        if "lr" in sae
    )
    return (
        f"{subject['activations']}, {subject['d_in']} dimensions, {subject['d_sae']:,} "
        f"features, {subject['tokens']['train']:,} training tokens; measured on "
        f"{subject['tokens'][split]:,} tokens of the {split} split; mean of {seeds} "
        f"{'seed' if seeds == '1' else 'seeds (lowest to highest)'}; learning rates tried: "
        f"{lrs}{'' if results['complete'] else '; of which what had finished is shown'}. "
        f"{machine['machine']}, "
        f"{machine['device']}, {machine['jobs']} × {machine['threads_per_job']} threads; "
        f"torch {versions['torch']}, sae-lens {versions['sae_lens']} (`{command}`)."
    )


def experiment_table(results: Results, rows: Sequence[str]) -> str:
    """Some rows of a comparison at one k, against the first of them."""
    columns = {**SHARED, **OF_KIND[results["subject"]["kind"]], **COUNTS}
    chosen = {point["row"]: point for point in results["points"]}
    base = chosen[rows[0]]["over_seeds"]["explained_variance"]["mean"]

    lines = [
        f"| | {' | '.join(columns)} | not explained |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for point in (chosen[row] for row in rows):
        figures = point["over_seeds"]
        cells = [_cell(figures, *column) for column in columns.values()]
        unexplained = 1 - figures["explained_variance"]["mean"]
        cells.append(f"{unexplained / (1 - base) - 1:+.1%}")
        lines.append(f"| {point['row']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def stock_rows(results: Results) -> dict[str, str]:
    """
    The rows whose architecture is SAELens' own, if only for another output than the input, with
    their architectures.
    """
    return {
        row: sae["architecture"]
        for row, sae in results["settings"]["compare"]["rows"].items()
        # a row in the stock form of another one is ours
        if "architecture" in sae
        and (
            sae_config_class(sae["architecture"]).__module__.startswith("sae_lens.")
            or sae["architecture"] in REFERENCES
        )
    }


def finished_ks(results: Results) -> list[float]:
    """The k at which SAELens' architectures and the recipe are trained, if only with one seed."""
    stock = stock_rows(results)
    rows = results["settings"]["compare"]["rows"]
    needed = {*(row for row in RECIPES if row in rows), *stock.values()}
    return [
        k
        for k in results["settings"]["compare"]["k"]
        if needed
        <= {
            stock.get(point["row"], point["row"])
            for point in results["points"]
            if point["k"] == k and (point["runs"] or results["complete"])
        }
    ]


def all_rows(results: Results) -> str:
    """Every row of a comparison with its number of seeds, a table for each finished k."""
    columns = {**SHARED, **OF_KIND[results["subject"]["kind"]], **COUNTS, **COST}
    missing = "out of reach" if results["complete"] else "not trained yet"
    lines: list[str] = []
    for k in finished_ks(results):
        lines += [
            f"**{k:g} features per token**\n",
            f"| | {' | '.join(columns)} | lr | seeds |",
            "|---" * (len(columns) + 3) + "|",
        ]
        trained = {
            point["row"]: point
            for point in results["points"]
            if point["k"] == k and point["runs"]
        }
        for row in results["settings"]["compare"]["rows"]:
            cells = [missing, *["–"] * (len(columns) + 1)]
            if row in trained:
                point = trained[row]
                cells = [
                    *(
                        _cell(point["over_seeds"], *column)
                        for column in columns.values()
                    ),
                    f"{point['chosen']['lr']:g}",
                    str(len(point["runs"])),
                ]
            lines.append(f"| {row} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines[:-1])


def lead_table(results: Results, row: str) -> str:
    """
    A row of ours beside SAELens' best in each figure, which need not be one and the same, at
    every finished k.
    """
    columns = {**SHARED, **OF_KIND[results["subject"]["kind"]]}
    lines = [
        f"| features per token | | {row} | best of SAELens' | error smaller by | "
        "every seed ahead of every seed |",
        "|---" * 6 + "|",
    ]
    for k in finished_ks(results):
        figures = {
            point["row"]: point["over_seeds"]
            for point in results["points"]
            if point["k"] == k and point["runs"]
        }
        stock = [other for other in stock_rows(results) if other in figures]
        for name, (key, style) in columns.items():
            short = {other: _shortfall(figures[other][key], key) for other in figures}
            _, best = min((short[other].mean, other) for other in stock)
            ours, missing = short[row], short[best].mean
            less = f"{1 - ours.mean / missing:.1%}" if missing else "–"
            ahead = ours.most < min(short[other].least for other in stock)
            lines.append(
                f"| {k:g} | {name} | {_cell(figures[row], key, style)} | "
                f"{_cell(figures[best], key, style)}, {best} | {less} | "
                f"{'yes' if ahead else 'no'} |"
            )
    return "\n".join(lines)


@dataclass(frozen=True)
class Shortfall:
    """How far a figure is from the best it could be: mean over the seeds, least, most."""

    mean: float
    least: float
    most: float


def _shortfall(over_seeds: dict[str, float], key: str) -> Shortfall:
    ideal = 0 if key == "kl_divergence" else 1
    mean, *ends = (abs(ideal - over_seeds[x]) for x in ("mean", "min", "max"))
    return Shortfall(mean, min(ends), max(ends))


def _numbers(values: Sequence[float | str]) -> str:
    return ", ".join(f"{float(value):g}" for value in values)


def _cell(over_seeds: Results, key: str, style: str) -> str:
    mean, low, high = (f"{over_seeds[key][x]:{style}}" for x in ("mean", "min", "max"))
    return mean if low == high else f"{mean} ({low}–{high})"
