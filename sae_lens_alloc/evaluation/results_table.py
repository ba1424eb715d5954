"""The main figures of some SAEs, for a terminal."""

from collections.abc import Sequence

from rich.table import Table

from sae_lens_alloc.evaluation.metrics import Evaluation
from sae_lens_alloc.evaluation.report_run import ReportRun


def results_table(runs: Sequence[ReportRun]) -> Table:
    """The main figures, one row for each run."""
    evaluations = [run.evaluation for run in runs]
    has_loss = all(isinstance(figures, Evaluation) for figures in evaluations)
    loss = "CE: cross-entropy recovered against mean and zero ablation. "
    source = "text" if has_loss else "activations"
    table = Table(
        title=f"Saved SAEs on {evaluations[0].n_tokens:,} tokens of held-out {source}",
        caption=f"EV: explained variance. {loss if has_loss else ''}"
        "L0: features per token. rare: on fewer than 1 token in 10,000. "
        "s: seconds of training.",
    )
    table.add_column("SAE", style="bold", no_wrap=True)
    # short, for a terminal of 80 columns
    of_loss = ("CE mean", "CE zero") if has_loss else ()
    for column in ("EV", *of_loss, "L0", "dead", "rare", "s"):
        table.add_column(column, justify="right", no_wrap=True)
    for run in runs:
        figures = run.evaluation
        recovered = (
            (figures.loss_recovered_mean, figures.loss_recovered_zero)
            if isinstance(figures, Evaluation)
            else ()
        )
        table.add_row(
            run.name,
            f"{figures.explained_variance:.4f}",
            *(f"{share:.4f}" for share in recovered),
            f"{figures.l0:.2f}",
            f"{figures.dead_features:,}",
            f"{figures.rare_features:,}",
            f"{run.seconds:.0f}",
        )
    return table
