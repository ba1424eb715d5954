"""Inference thresholds set on activations, so that the saved SAE has the wanted L0."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from sae_lens_alloc.evaluation.equal_l0 import threshold_factor
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE


@dataclass(frozen=True)
class CalibrationReport:
    """
    What calibration found, on the activations it was given.

    Args:
        target_l0: Wanted features per token.
        training_l0: Features per token of the training allocation.
        l0_before: Features per token by the thresholds as training left them.
        l0: Features per token by the calibrated thresholds.
        training_ev: Explained variance of the training allocation.
        ev_before: Explained variance by the thresholds as training left them.
        ev: Explained variance by the calibrated thresholds.
        n_tokens: Number of tokens used.
    """

    target_l0: float
    training_l0: float
    l0_before: float
    l0: float
    training_ev: float
    ev_before: float
    ev: float
    n_tokens: int


@torch.no_grad()
def calibrate_thresholds(
    sae: AllocationTrainingSAE[Any],
    activations: torch.Tensor,
    target_l0: float | None = None,
    batch_size: int = 4096,
) -> CalibrationReport:
    """
    Scales all thresholds of an SAE by one factor such that `target_l0` features per token
    are active on the given activations, and records the result in the SAE's metadata.

    One factor keeps what training found about each feature: a common threshold stays
    common, and the thresholds of Feature Choice keep their ratios.

    Args:
        sae: A Mutual Choice or Feature Choice SAE. Its thresholds are changed in place.
        activations: Activations as the SAE takes them, shape (T, d_in). The more the better:
            65k tokens put L0 within about 1%.
        target_l0: Wanted features per token; the SAE's k by default.
        batch_size: Tokens per batch of the training allocation that is compared with.

    Raises:
        ValueError: if the activations are not of the SAE's d_in, or no thresholds give the
            wanted L0.
    """
    wanted: float = sae.cfg.k if target_l0 is None else target_l0
    if activations.ndim != 2 or activations.shape[1] != sae.cfg.d_in:
        raise ValueError(
            f"activations must have shape (tokens, {sae.cfg.d_in}), got "
            f"{tuple(activations.shape)}."
        )
    training_l0, training_ev = _l0_and_ev(sae, activations, batch_size, False)
    l0_before, ev_before = _l0_and_ev(sae, activations, batch_size, True)

    thresholds = sae.allocation.threshold
    if not thresholds.any():  # an SAE that has not been trained yet
        thresholds.fill_(1.0)
    thresholds *= threshold_factor(
        sae.encoder(), sae.process_sae_in(activations), thresholds, wanted
    )

    l0, ev = _l0_and_ev(sae, activations, batch_size, True)
    report = CalibrationReport(
        target_l0=wanted,
        training_l0=training_l0,
        l0_before=l0_before,
        l0=l0,
        training_ev=training_ev,
        ev_before=ev_before,
        ev=ev,
        n_tokens=len(activations),
    )
    sae.cfg.metadata.calibration = asdict(report)
    return report


def _l0_and_ev(
    sae: AllocationTrainingSAE[Any],
    activations: torch.Tensor,
    batch_size: int,
    by_threshold: bool,
) -> tuple[float, float]:
    """Features per token and explained variance, over batches of tokens."""
    n_pairs, squared_error = 0, 0.0
    for batch in activations.split(batch_size):
        pairs, sae_out = sae.autoencode_pairs(batch, by_threshold)
        n_pairs += len(pairs.values)
        squared_error += float((sae_out - batch).pow(2).sum(dtype=torch.float64))
    variance = float(
        (activations - activations.mean(0)).pow(2).sum(dtype=torch.float64)
    )
    return n_pairs / len(activations), 1 - squared_error / variance
