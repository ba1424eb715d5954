"""The main figures of some SAEs, for a terminal."""

from collections.abc import Sequence

from rich.table import Table

from sae_lens_alloc.evaluation.report_run import ReportRun


def results_table(runs: Sequence[ReportRun]) -> Table:
    """The main figures, one row for each run."""
    n_tokens = runs[0].evaluation.n_tokens
    table = Table(
        title=f"Saved SAEs on {n_tokens:,} tokens of held-out text",
        caption="EV: explained variance. CE: cross-entropy recovered against mean and zero "
        "ablation. L0: features per token. rare: on fewer than 1 token in 10,000. "
        "s: seconds of training.",
    )
    table.add_column("SAE", style="bold", no_wrap=True)
    # short, for a terminal of 80 columns
    for column in ("EV", "CE mean", "CE zero", "L0", "dead", "rare", "s"):
        table.add_column(column, justify="right", no_wrap=True)
    for run in runs:
        figures = run.evaluation
        table.add_row(
            run.name,
            f"{figures.explained_variance:.4f}",
            f"{figures.loss_recovered_mean:.4f}",
            f"{figures.loss_recovered_zero:.4f}",
            f"{figures.l0:.2f}",
            f"{figures.dead_features:,}",
            f"{figures.rare_features:,}",
            f"{run.seconds:.0f}",
        )
    return table
