"""One factor for all thresholds of an SAE, which brings it to a wanted L0 and keeps their ratios."""

from typing import Any, TypeAlias

import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.transcoder import JumpReLUTranscoder

from sae_lens_alloc.allocation.mutual_choice import budget_for
from sae_lens_alloc.allocation.sparse_activations import SparseActivations
from sae_lens_alloc.distributed.ranks import ALONE, Ranks
from sae_lens_alloc.ops.block_encoder import Encoder
from sae_lens_alloc.ops.encode_select import encode_mutual_choice
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE

# SAEs for inference with a threshold for each feature
Thresholded: TypeAlias = JumpReLUSAE | JumpReLUTranscoder

# Stands for a threshold of 0 where affinities are divided by it.
ALWAYS_OPEN = 1e-20
# Thresholds below this share of the largest count as this much where they are scaled.
SMALLEST_SHARE = 1e-6


@torch.no_grad()
def set_l0(sae: Thresholded, activations: torch.Tensor, target_l0: float) -> None:
    """
    Multiplies all thresholds of a JumpReLU SAE or transcoder by one factor such that `target_l0` features
    per token are active on the given activations.

    Args:
        sae: An inference SAE, as batchtopk, jumprelu and our own architectures are saved.
            Its thresholds are changed in place.
        activations: Activations as the SAE takes them, shape (T, d_in).

    Raises:
        ValueError: if a threshold is negative, or no factor gives the wanted L0.
    """
    encoder = Encoder(sae.W_enc, sae.b_enc, None)
    x = sae.process_sae_in(activations)
    sae.threshold.mul_(threshold_factor(encoder, x, sae.threshold, target_l0))


@torch.no_grad()
def scale_thresholds(
    sae: AllocationTrainingSAE[Any], activations: torch.Tensor, target_l0: float
) -> None:
    """
    Multiplies all thresholds of an SAE by one factor such that `target_l0` features per
    token are active on activations of shape (T, d_in). Silenced features, of infinite
    threshold, stay silenced.

    Raises:
        ValueError: if no thresholds give the wanted L0. They are then as they were.
    """
    tracked = sae.allocation.threshold
    thresholds = movable_thresholds(tracked)
    factor = threshold_factor(
        sae.encoder(), sae.process_sae_in(activations), thresholds, target_l0
    )
    tracked.copy_(thresholds * factor)


@torch.no_grad()
def threshold_factor(
    encoder: Encoder, x: torch.Tensor, thresholds: torch.Tensor, target_l0: float
) -> torch.Tensor:
    """
    The factor by which to multiply all thresholds such that `target_l0` features per token
    are active, scalar tensor. It is the last affinity of a Mutual Choice among the
    affinities relative to their threshold.

    Args:
        encoder: What gives the affinities.
        x: Encoder inputs of shape (T, d_in).
        thresholds: Thresholds of shape (F,), none negative. One of 0, as training leaves it
            in JumpReLU SAEs, stays 0: its feature is active wherever its affinity is positive.
            An infinite one stays so: its feature is silenced.
        target_l0: Wanted features per token.

    Raises:
        ValueError: if a threshold is negative or NaN, or no factor gives the wanted L0.
    """
    relative = relative_encoder(encoder, thresholds)
    budget = budget_for(target_l0, len(x))
    guess = torch.ones_like(thresholds[0])
    pairs = encode_mutual_choice(relative, x, budget, guess).without_padding()
    return factor_of(pairs, thresholds, target_l0)


def relative_encoder(encoder: Encoder, thresholds: torch.Tensor) -> Encoder:
    """
    The encoder whose affinities are relative to their thresholds, of shape (F,).

    Raises:
        ValueError: if a threshold is negative or NaN.
    """
    if thresholds.isnan().any():
        raise ValueError(
            f"{int(thresholds.isnan().sum())} of {len(thresholds)} thresholds are NaN: the SAE "
            "is damaged, or its training has diverged."
        )
    if not (thresholds >= 0).all():
        raise ValueError(
            "no threshold may be negative if all are to be moved by one factor: set them one "
            "by one, per feature."
        )
    # pairs of features without a threshold come before all others
    divisor = thresholds.clamp_min(ALWAYS_OPEN)
    scale = 1 / divisor if encoder.scale is None else encoder.scale / divisor
    return Encoder(encoder.W_enc, encoder.b_enc, scale)


def factor_of(
    pairs: SparseActivations,
    thresholds: torch.Tensor,
    target_l0: float,
    ranks: Ranks = ALONE,
) -> torch.Tensor:
    """
    The factor of `threshold_factor`, scalar tensor.

    Args:
        pairs: The largest affinities relative to their thresholds, `target_l0` per token.
        thresholds: Thresholds of shape (F,).
        target_l0: Wanted features per token.
        ranks: The ranks that share the features, of which these pairs are this one's.

    Raises:
        ValueError: if no factor gives the wanted L0.
    """
    n_tokens = pairs.shape[0]
    budget = budget_for(target_l0, n_tokens)
    # affinities of silenced features are 0 relative to their threshold
    n_positive = int(ranks.sum((pairs.values > 0).sum()))
    if budget == 0 or n_positive < budget:
        raise ValueError(
            f"no thresholds give an L0 of {target_l0} on these {n_tokens} tokens: "
            f"{n_positive / n_tokens:.3g} affinities per token are positive, those of silenced "
            "features left out."
        )
    last = ranks.smallest(pairs.smallest_value())
    is_open = thresholds[pairs.feature_indices] == 0
    if ranks.any(bool((is_open & (pairs.values == last)).any())):
        raise ValueError(
            f"no factor gives an L0 of {target_l0} on these {n_tokens} tokens: the features "
            "whose threshold is 0, and stays so, are active more often: set them one by one, "
            "per feature."
        )
    # a pair is active where it exceeds the threshold, and the last of the pairs must be
    return last * (1 - 1e-6)


def movable_thresholds(thresholds: torch.Tensor, ranks: Ranks = ALONE) -> torch.Tensor:
    """
    Thresholds of shape (F,), those of this rank's features, of which a factor moves all: those of 0, as features of a gated or
    JumpReLU SAE may have, become very small ones. Silenced features, of infinite threshold,
    stay silenced.
    """
    largest = ranks.largest(thresholds.where(thresholds.isfinite(), 0.0).max())
    if largest == 0:  # of an SAE that has not been trained yet, or was a ReLU
        return thresholds.where(thresholds != 0, 1.0)
    return thresholds.clamp(min=SMALLEST_SHARE * float(largest))
