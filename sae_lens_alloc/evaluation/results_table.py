"""The main figures of some SAEs, for a terminal."""

from collections.abc import Sequence

from rich.table import Table

from sae_lens_alloc.evaluation.metrics import Evaluation
from sae_lens_alloc.evaluation.report_run import ReportRun

MEANINGS = {
    "EV": "EV: explained variance.",
    "CE mean": "CE: cross-entropy recovered against mean and zero ablation.",
    "L0": "L0: features per token.",
    "rare": "rare: on fewer than 1 token in 10,000.",
    "s": "s: seconds of training.",
}
SAVED_SAES = "Saved SAEs on {n_tokens:,} held-out tokens"


def results_table(runs: Sequence[ReportRun], title: str = SAVED_SAES) -> Table:
    """
    The main figures, one row for each run. What is known of none of them is left out.

    Args:
        runs: The runs.
        title: The title, with `n_tokens` in it.
    """
    cells = [_cells(run) for run in runs]
    # short, for a terminal of 80 columns
    columns = [name for name in cells[0] if any(row[name] for row in cells)]
    caption = " ".join(text for name, text in MEANINGS.items() if name in columns)
    table = Table(
        title=title.format(n_tokens=runs[0].evaluation.n_tokens), caption=caption
    )
    table.add_column("SAE", style="bold", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for run, row in zip(runs, cells, strict=True):
        table.add_row(run.name, *(row[name] or "–" for name in columns))
    return table


def _cells(run: ReportRun) -> dict[str, str]:
    """The figures by column, empty where one is not known."""
    usage = run.evaluation
    of_model = usage if isinstance(usage, Evaluation) else None
    return {
        "EV": f"{usage.explained_variance:.4f}",
        "CE mean": f"{of_model.loss_recovered_mean:.4f}" if of_model else "",
        "CE zero": f"{of_model.loss_recovered_zero:.4f}" if of_model else "",
        "L0": f"{usage.l0:.2f}",
        "dead": f"{usage.dead_features:,}",
        "rare": f"{usage.rare_features:,}",
        "s": "" if run.seconds is None else f"{run.seconds:.0f}",
    }
