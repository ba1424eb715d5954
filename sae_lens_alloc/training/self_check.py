"""Compares a saved SAE with the SAE in memory."""

import warnings
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import SAE

from sae_lens_alloc.saes.split_weights import INDEX_FILENAME
from sae_lens_alloc.training.held_out import held_out_metrics

L0_TOLERANCE = 0.01  # of the recorded L0
EV_TOLERANCE = 0.005


def check_saved_sae(
    folder: Path,
    recorded: dict[str, Any],
    activations: torch.Tensor,
    batch_size: int,
    device: str,
) -> None:
    """
    Loads an SAE with stock SAELens, and warns if its L0 and explained variance are not those in
    its metadata (SAELens #308, #553). Does nothing for an SAE in several files, which stock
    SAELens does not load.

    Args:
        folder: The saved SAE.
        recorded: `held_out_metrics` of the SAE in memory.
        activations: The activations of these metrics, shape (n_tokens, d_in).
        batch_size: Tokens to run at once.
        device: Device to load it to.
    """
    if (folder / INDEX_FILENAME).is_file():
        return
    sae = SAE.load_from_disk(folder, device=device)
    # the store gives flat activations, as in training
    sae.turn_off_forward_pass_hook_z_reshaping()
    found = held_out_metrics(sae, activations, batch_size)
    l0, ev = recorded["l0"], recorded["explained_variance"]
    # written so that NaN warns
    if (
        abs(found["l0"] - l0) <= L0_TOLERANCE * l0
        and abs(found["explained_variance"] - ev) <= EV_TOLERANCE
    ):
        return
    warnings.warn(
        f"The saved SAE, loaded with SAELens, has L0 {found['l0']:.2f} and explained "
        f"variance {found['explained_variance']:.4f} on held-out activations, but the SAE "
        f"as trained has {l0:.2f} and {ev:.4f}: inference will differ from training.",
        stacklevel=2,
    )
