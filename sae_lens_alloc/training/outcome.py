"""What a training has come to, in lines for the one who started it."""

import shlex
from typing import Any

from sae_lens.saes.sae import SAEConfig, TrainingSAEConfig

from sae_lens_alloc.saes.allocation_sae_config import AllocationTrainingSAEConfig
from sae_lens_alloc.saes.rows import output_width


def describe_outcome(
    sae: TrainingSAEConfig, output: str, report: str | None = None
) -> str:
    """
    The figures of a trained SAE on held-out activations, where it is saved, and what to do next.

    Args:
        sae: The config of the trained SAE, with its metadata.
        output: The folder that it is saved in.
        report: The page that was written about it, if there is one.
    """
    lines: dict[str, str] = {}
    found: dict[str, Any] | None = sae.metadata.held_out
    if found is not None:
        lines["L0"] = f"{found['l0']:.2f} features per token"
        if isinstance(sae, AllocationTrainingSAEConfig):
            lines["L0"] += f", {sae.k:g} wanted"
        lines["explained"] = f"{found['explained_variance']:.4f} of the variance"
        lines["dead"] = (
            f"{found['dead_features']:,} of {sae.d_sae:,} features, active on none of "
            f"{found['n_tokens']:,} held-out tokens"
        )
    stock: dict[str, Any] | None = sae.metadata.stock_form
    if stock is not None:
        lines["stock form"] = (
            f"in {stock['folder']}/ there: {stock['explained_variance']:.4f} of the variance by "
            f"{stock['l0']:.2f} features per token, loads without sae_lens_alloc"
        )
    if report is not None:
        lines["report"] = report
    text = "\n".join(f"{name:<12}{value}" for name, value in lines.items())
    return f"{text}\nsaved in {output}\n{next_steps(sae, output, report)}".lstrip()


def next_steps(sae: SAEConfig, output: str, report: str | None = None) -> str:
    """What to do with a saved SAE, in lines; see `describe_outcome`."""
    commands = {
        "features": ("--output features.html", "what each feature does"),
        "report": ("--output report.html", "its figures, as a page"),
        "calibrate": ("--l0 L0 --output NEW", "another sparsity"),
        "push": ("--to ORG/NAME --dry-run", "give it to others"),
    }
    if report is not None:
        del commands["report"]
    if output_width(sae) is not None:  # it refuses transcoders
        del commands["features"]
    folder = shlex.quote(output)
    return "\n".join(
        (
            "next:",
            *(
                f"  sae-lens-alloc {name} {folder} {options}   # {what}"
                for name, (options, what) in commands.items()
            ),
            f"  sae_lens.SAE.load_from_disk({output!r})   # in Python",
        )
    )
