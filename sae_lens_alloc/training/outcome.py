"""What a training has come to, in lines for the one who started it."""

import shlex
from typing import Any

from sae_lens.saes.sae import TrainingSAEConfig

from sae_lens_alloc.saes.allocation_sae_config import AllocationTrainingSAEConfig


def describe_outcome(sae: TrainingSAEConfig, output: str) -> str:
    """
    The figures of a trained SAE on held-out activations, where it is saved, and what to do next.

    Args:
        sae: The config of the trained SAE, with its metadata.
        output: The folder that it is saved in.
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
    text = "\n".join(f"{name:<12}{value}" for name, value in lines.items())
    return f"{text}\nsaved in {output}\n{_next_steps(output)}".lstrip()


def _next_steps(output: str) -> str:
    folder = shlex.quote(output)
    return "\n".join(
        (
            "next:",
            f"  sae-lens-alloc calibrate {folder} --l0 L0 --output NEW   # another sparsity",
            f"  sae_lens.SAE.load_from_disk({output!r})   # in Python",
        )
    )
