"""Thresholds of a saved SAE set anew, to a wanted L0 on text of one's choice."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE
from sae_lens.saes.topk_sae import TopKSAE
from sae_lens.saes.transcoder import JumpReLUTranscoder

from sae_lens_alloc.evaluation.usage import Usage, as_user, measure_usage
from sae_lens_alloc.progress import announced
from sae_lens_alloc.saes.rows import encoded_and_target
from sae_lens_alloc.saes.saved_sae import load_sae
from sae_lens_alloc.thresholds.densities import set_densities
from sae_lens_alloc.thresholds.factor import Thresholded, set_l0
from sae_lens_alloc.thresholds.jumprelu_form import jumprelu_form
from sae_lens_alloc.thresholds.requirements import (
    require_activations,
    require_target_l0,
)

# Two in each half, or there is no variance.
MIN_TOKENS = 4
# An SAE whose squared error is twice the variance is not one of these activations.
MIN_EXPLAINED_VARIANCE = -1.0


@dataclass(frozen=True)
class Recalibration:
    """
    What new thresholds do, on the half of the activations that set them and on the other.

    Args:
        sae: The SAE with its new thresholds.
        target_l0: Wanted features per token.
        per_feature: Whether thresholds were set one by one rather than by one factor.
        before: The SAE as it was, on the half that set the thresholds.
        after: The SAE with its new thresholds, on the half that set them.
        held_out_before: The SAE as it was, on the other half.
        held_out_after: The SAE with its new thresholds, on the other half.
    """

    sae: Thresholded
    target_l0: float
    per_feature: bool
    before: Usage
    after: Usage
    held_out_before: Usage
    held_out_after: Usage

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        usages = ("before", "after", "held_out_before", "held_out_after")
        figures = {"l0": "l0", "ev": "explained_variance", "dead": "dead_features"}
        return {
            "target_l0": self.target_l0,
            "per_feature": self.per_feature,
            "n_tokens": self.before.n_tokens,
            **{
                f"{key}_{name}": getattr(getattr(self, name), figure)
                for name in usages
                for key, figure in figures.items()
            },
        }


def load_saved_sae(folder: str | Path) -> Thresholded | TopKSAE:
    """
    Loads an SAE that `recalibrate` can take.

    Args:
        folder: What SAELens saved for inference.

    Raises:
        ValueError: as `load_sae`, or if the SAE has no thresholds.
    """
    sae = load_sae(folder)
    if not isinstance(sae, Thresholded | TopKSAE):
        kind = " in training" if isinstance(sae, TrainingSAE) else ""
        raise ValueError(
            f"{str(folder)!r} is of the architecture {sae.cfg.architecture()!r}{kind}, whose "
            "thresholds cannot be set: give the folder of a saved jumprelu or topk SAE, as "
            "mutual_choice, feature_choice and batchtopk are after training."
        )
    # activations come flat, one vector a token
    sae.turn_off_forward_pass_hook_z_reshaping()
    return sae


@torch.no_grad()
def recalibrate(
    sae: Thresholded | TopKSAE,
    activations: torch.Tensor,
    target_l0: float,
    per_feature: bool = False,
) -> Recalibration:
    """
    A copy of an SAE whose thresholds give a wanted L0. The first half of the activations
    sets them, the second half only shows how they do.

    By default one factor moves all thresholds, which keeps their ratios (a topk SAE gets one
    threshold for all features). Per feature, one factor moves all densities, which keeps
    the shares of the features instead: feature j gets the threshold that it exceeds on
    c * p_j of the tokens, where p_j is the share of tokens on which the SAE as given
    activates it, and c makes the sum over features the wanted L0.

    Args:
        sae: A saved SAE, which is left as it is. A topk SAE gets a jumprelu form.
        activations: Activations as the SAE takes them, shape (T, d_in), T at least 4; of a
            transcoder, its rows [x, y] of shape (T, d_in + d_out).
        target_l0: Wanted features per token.
        per_feature: Set each feature's threshold by its density. A feature that is
            active too rarely for one of the tokens is then silenced on them.

    Raises:
        ValueError: if the activations are not finite, not of the SAE's d_in or fewer than
            4 tokens, no thresholds give the wanted L0, or the SAE reconstructs nothing.
    """
    require_target_l0(sae, target_l0)
    require_activations(sae, activations)
    if len(activations) < MIN_TOKENS:
        raise ValueError(
            f"activations of at least {MIN_TOKENS} tokens are needed, two for each half."
        )
    half = len(activations) // 2
    used, held_out = activations[:half], activations[half:]
    before, held_out_before = _usage(sae, used), _usage(sae, held_out)
    encoded, _ = encoded_and_target(sae.cfg, used)
    if isinstance(sae, JumpReLUTranscoder):
        calibrated = copy.deepcopy(sae)
    else:
        calibrated = jumprelu_form(sae)
    if isinstance(sae, TopKSAE):
        calibrated.threshold.fill_(1.0)  # a common one, that a factor can move
    with announced("setting the thresholds"):
        if isinstance(sae, TopKSAE) or not per_feature:
            set_l0(calibrated, encoded, target_l0)
        if per_feature:
            firings = before.firings.to(encoded.device)
            set_densities(calibrated, encoded, firings, target_l0)
    report = Recalibration(
        sae=calibrated,
        target_l0=target_l0,
        per_feature=per_feature,
        before=before,
        after=_usage(calibrated, used),
        held_out_before=held_out_before,
        held_out_after=_usage(calibrated, held_out),
    )
    _require_sense(report)
    calibrated.cfg.metadata.calibration = report.to_dict()
    calibrated.cfg.metadata.l0 = report.after.l0
    calibrated.cfg.metadata.held_out = None  # of other thresholds
    return report


def _require_sense(report: Recalibration) -> None:
    """Raises ValueError if an SAE explains less than nothing, or what cannot be told."""
    usages = (
        report.before,
        report.after,
        report.held_out_before,
        report.held_out_after,
    )
    found = [usage.explained_variance for usage in usages]
    if not all(map(math.isfinite, found)) or max(found) < MIN_EXPLAINED_VARIANCE:
        raise ValueError(
            f"the SAE explains {max(found):,.3g} of the variance of these activations, where "
            "the mean alone explains 0: its weights are damaged, or it belongs to another "
            "model, hook or normalization of the activations."
        )


def _usage(sae: SAE[Any], activations: torch.Tensor) -> Usage:
    encoded, target = encoded_and_target(sae.cfg, activations)
    return measure_usage(as_user(sae), encoded, target=target)
