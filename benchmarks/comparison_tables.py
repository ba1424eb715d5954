"""Markdown tables of what `sae-lens-alloc compare` measured."""

from collections.abc import Sequence
from typing import Any

Results = dict[str, Any]

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
}
COUNTS = {
    "L0": ("l0", ".2f"),
    "dead": ("dead_features", ",.0f"),
    "rare (< 1e-4)": ("rare_features", ",.0f"),
}
LAW = {
    "α": ("zipf_alpha", ".2f"),
    "β": ("zipf_beta", ".0f"),
    "R²": ("zipf_r2", ".3f"),
}
COST = {"seconds": ("seconds", ",.0f")}


def compared_on(results: Results, command: str) -> str:
    """What was compared, on what, and how to do it again."""
    subject, machine, versions = (
        results["subject"],
        results["machine"],
        results["versions"],
    )
    compare = results["settings"]["compare"]
    split = compare.get("measured_on", "test")
    seeds = compare["seeds"]
    return (
        f"{subject['activations']}, {subject['d_in']} dimensions, {subject['d_sae']:,} "
        f"features, {subject['tokens']['train']:,} training tokens; measured on "
        f"{subject['tokens'][split]:,} tokens of the {split} split; mean of {len(seeds)} "
        f"seed{'s' if len(seeds) != 1 else ''}"
        f"{' (lowest to highest)' if len(seeds) != 1 else ''}; learning rates tried: "
        f"{', '.join(f'{float(lr):g}' for lr in compare['lr'])}. {machine['machine']}, "
        f"{machine['device']}, {machine['jobs']} × {machine['threads_per_job']} threads; "
        f"torch {versions['torch']}, sae-lens {versions['sae_lens']} (`{command}`)."
    )


def comparison_table(results: Results, k: float) -> str:
    """Every row at one k."""
    columns = {
        **SHARED,
        **OF_KIND[results["subject"]["kind"]],
        **COUNTS,
        **LAW,
        **COST,
    }
    return _table(
        columns,
        [point for point in results["points"] if point["k"] == k],
        {"lr": lambda point: f"{point['chosen']['lr']:g}"},
    )


def experiment_table(results: Results, rows: Sequence[str]) -> str:
    """Some rows at every k, against the first of them."""
    columns = {**SHARED, **OF_KIND[results["subject"]["kind"]], **COUNTS}
    chosen = {point["row"]: point for point in results["points"]}
    base = chosen[rows[0]]["over_seeds"]["explained_variance"]["mean"]

    def against_first(point: Results) -> str:
        unexplained = 1 - point["over_seeds"]["explained_variance"]["mean"]
        return f"{unexplained / (1 - base) - 1:+.1%}"

    return _table(
        columns, [chosen[row] for row in rows], {"not explained": against_first}
    )


def _table(
    columns: dict[str, tuple[str, str]],
    points: Sequence[Results],
    more: dict[str, Any],
) -> str:
    names = [*columns, *more]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for point in points:
        cells = [_cell(point["over_seeds"], *column) for column in columns.values()]
        if point["runs"]:
            cells += [value(point) for value in more.values()]
        else:
            cells += ["" for _ in more]
        lines.append(f"| {point['row']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(over_seeds: Results, key: str, style: str) -> str:
    figures = over_seeds.get(key)
    if figures is None:
        return "–"
    mean, low, high = (f"{figures[x]:{style}}" for x in ("mean", "min", "max"))
    return mean if low == high else f"{mean} ({low}–{high})"
