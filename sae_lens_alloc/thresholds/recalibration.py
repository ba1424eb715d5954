"""Thresholds of a saved SAE set anew, to a wanted L0 on text of one's choice."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.sae import TrainingSAE
from sae_lens.saes.topk_sae import TopKSAE

from sae_lens_alloc.allocation.mutual_choice import budget_for
from sae_lens_alloc.allocation.quota_curve import QuotaCurve
from sae_lens_alloc.evaluation.usage import Usage, as_user, measure_usage
from sae_lens_alloc.ops.block_encoder import Encoder
from sae_lens_alloc.ops.encode_select import encode_feature_choice
from sae_lens_alloc.saes.saved_sae import load_sae
from sae_lens_alloc.thresholds.calibration import require_activations
from sae_lens_alloc.thresholds.factor import set_l0
from sae_lens_alloc.thresholds.jumprelu_form import jumprelu_form

# Relative distance of a threshold from the affinity that decides it.
MARGIN = 1e-6
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

    sae: JumpReLUSAE
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


def load_saved_sae(folder: str | Path) -> JumpReLUSAE | TopKSAE:
    """
    Loads an SAE that `recalibrate` can take.

    Args:
        folder: What SAELens saved for inference.

    Raises:
        ValueError: as `load_sae`, or if the SAE has no thresholds.
    """
    sae = load_sae(folder)
    if not isinstance(sae, JumpReLUSAE | TopKSAE):
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
    sae: JumpReLUSAE | TopKSAE,
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
        activations: Activations as the SAE takes them, shape (T, d_in), T at least 4.
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
    calibrated = jumprelu_form(sae)
    if isinstance(sae, TopKSAE):
        calibrated.threshold.fill_(1.0)  # a common one, that a factor can move
    if isinstance(sae, TopKSAE) or not per_feature:
        set_l0(calibrated, used, target_l0)
    if per_feature:
        _set_densities(calibrated, used, before.firings.to(used.device), target_l0)
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
    return report


def require_target_l0(sae: SAE[Any], target_l0: float) -> None:
    """Raises ValueError if an L0 is not above 0 and at most the number of features."""
    if not 0 < target_l0 <= sae.cfg.d_sae:
        raise ValueError(
            f"no thresholds give an L0 of {target_l0:g}: it must be above 0 and at most "
            f"{sae.cfg.d_sae}, the number of features."
        )


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
    return measure_usage(as_user(sae), activations)


def _set_densities(
    sae: JumpReLUSAE, activations: torch.Tensor, counts: torch.Tensor, target_l0: float
) -> None:
    """
    Sets each threshold such that the feature is active on a number of tokens in proportion
    to `counts`, all together on `target_l0` features per token.

    Args:
        sae: The SAE; its thresholds, which are changed in place, make this fast if they are
            near.
        activations: Activations as the SAE takes them, shape (T, d_in).
        counts: Shape (F,).
        target_l0: Wanted features per token.

    Raises:
        ValueError: if the features cannot be active on so many tokens.
    """
    encoder, x = Encoder(sae.W_enc, sae.b_enc, None), sae.process_sae_in(activations)
    budget = budget_for(target_l0, len(x))
    guess = sae.threshold / 2
    never = guess.new_tensor(torch.inf)
    caps = torch.full_like(counts, len(x))
    while True:
        quotas = _quotas_in_proportion(counts, budget, caps)
        if budget == 0 or int(quotas.sum()) < budget:
            raise ValueError(
                f"no thresholds give an L0 of {target_l0} on these {len(x)} tokens: the "
                f"{int((counts > 0).sum())} features that are active on them reach "
                f"{int(quotas.sum()) / len(x):.3g}."
            )
        # a feature without quota is silenced, so its largest affinity has to be known, too
        wanted = quotas.clamp(min=1)
        best = encode_feature_choice(
            encoder, x, wanted, guess, never, guess, int(wanted.sum())
        ).pairs.without_padding()
        found = best.feature_counts()
        if not (found < quotas).any():
            break
        caps = torch.where(found < quotas, found, caps)  # all its positive affinities
    last = torch.full_like(guess, torch.inf).scatter_reduce(
        0, best.feature_indices, best.values.to(guess), "amin"
    )
    largest = last.where(found > 0, 0.0)
    silencing = torch.maximum(largest * (1 + MARGIN), sae.threshold)
    sae.threshold.copy_(torch.where(quotas > 0, last * (1 - MARGIN), silencing))


def _quotas_in_proportion(
    counts: torch.Tensor, budget: int, caps: torch.Tensor
) -> torch.Tensor:
    """Whole quotas in proportion to `counts` that sum to the budget; int64 of shape (F,)."""
    active = (counts > 0).nonzero().squeeze(1)
    quotas = torch.zeros_like(counts, dtype=torch.float64)
    if len(active) > 0:
        log_shares = counts[active].double().log()
        quotas[active] = QuotaCurve.of(log_shares, caps[active]).quotas(budget)
    # remainders are handed on from feature to feature, so that the sum is right
    return (quotas.cumsum(0) + 1e-6).floor().diff(prepend=quotas.new_zeros(1)).long()
