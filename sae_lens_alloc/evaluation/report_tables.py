"""The tables of the report: what is in a line, for each run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sae_lens_alloc.allocation.zipf import BETA_GRID, ZipfLaw
from sae_lens_alloc.evaluation.metrics import Evaluation
from sae_lens_alloc.evaluation.report_run import ReportRun
from sae_lens_alloc.evaluation.usage import MIN_FIRINGS, Usage


@dataclass(frozen=True)
class Figure:
    """
    One figure of all runs.

    Args:
        name: Its name.
        meaning: What it means, in a sentence or two.
        values: As text, one for each run.
    """

    name: str
    meaning: str
    values: Sequence[str]


def figures_of_runs(runs: Sequence[ReportRun]) -> list[Figure]:
    """The main figures. Those of a language model are left out if a run has none."""
    usages = [run.evaluation for run in runs]
    evaluations = [usage for usage in usages if isinstance(usage, Evaluation)]
    n_features = {len(usage.densities) for usage in usages}
    out_of = f", of {n_features.pop():,}" if len(n_features) == 1 else ""

    def figure(name: str, meaning: str, value: Callable[[Usage], str]) -> Figure:
        return Figure(name, meaning, [value(usage) for usage in usages])

    figures = [
        figure(
            "variance explained",
            "1 − squared error ÷ variance of the activations, over all tokens. 1 is perfect.",
            lambda of: f"{of.explained_variance:.4f}",
        )
    ]
    if len(evaluations) == len(usages):
        figures += _of_language_model(evaluations)
    figures += [
        figure(
            "features per token",
            "Mean number of active features (L0). Compare the other figures only where it is "
            "about equal.",
            lambda of: f"{of.l0:.2f}",
        ),
        figure(
            "dead features",
            f"Active on none of these tokens{out_of}.",
            lambda of: f"{of.dead_features:,}",
        ),
        figure(
            "rare features",
            "Active on fewer than 1 token in 10,000, dead ones included.",
            lambda of: f"{of.rare_features:,}",
        ),
        figure(
            "budget of the 1% of tokens with the most features",
            "Their share of all active pairs. With equal shares it would be 1%.",
            lambda of: f"{100 * of.top_1_percent_share:.1f}%",
        ),
    ]
    if any(run.seconds is not None for run in runs):
        figures.append(
            Figure(
                "seconds of training",
                "On the machine that wrote this page, with the time of the language model.",
                ["–" if run.seconds is None else f"{run.seconds:.0f}" for run in runs],
            )
        )
    return figures


def _of_language_model(evaluations: Sequence[Evaluation]) -> list[Figure]:
    first = evaluations[0]
    return [
        Figure(
            "loss recovered, against the mean",
            "The language model runs on the SAE's reconstruction instead of its own activations. "
            f"1: as good as its own (next-token loss {first.loss:.3f} nats); 0: as bad as the mean "
            f"activation for every token ({first.loss_mean_ablated:.3f} nats).",
            [f"{of.loss_recovered_mean:.4f}" for of in evaluations],
        ),
        Figure(
            "loss recovered, against zero",
            "The same, but 0 is as bad as zero for every activation "
            f"({first.loss_zero_ablated:.3f} nats).",
            [f"{of.loss_recovered_zero:.4f}" for of in evaluations],
        ),
    ]


def figures_of_laws(runs: Sequence[ReportRun]) -> list[Figure]:
    """The Zipf laws fitted to the densities."""
    laws = [run.evaluation.zipf_law() for run in runs]

    def figure(name: str, meaning: str, value: Callable[[ZipfLaw], str]) -> Figure:
        return Figure(
            name, meaning, ["–" if law is None else value(law) for law in laws]
        )

    return [
        figure(
            "R², all ranks",
            "Over every feature that was fitted.",
            lambda law: f"{law.r2:.3f}",
        ),
        figure(
            "R², middle ranks",
            "Without the first and the last tenth of the ranks.",
            lambda law: f"{law.r2_middle:.3f}",
        ),
        figure(
            "α",
            "How steeply the law falls far to the right.",
            lambda law: f"{law.alpha:.2f}",
        ),
        figure(
            "β",
            f"About the length of the flat head, in ranks. The fit tries 0 to {max(BETA_GRID):.0f}.",
            lambda law: f"{law.beta:.0f}",
        ),
        Figure(
            "features fitted",
            f"Features that fired at least {MIN_FIRINGS} times.",
            [f"{len(run.evaluation.fitted_densities):,}" for run in runs],
        ),
    ]
