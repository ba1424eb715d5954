"""Statistics and thresholds of a converted SAE before training, measured on activations."""

import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from sae_lens.saes.sae import SAE

from sae_lens_alloc.allocation.mutual_choice import budget_for
from sae_lens_alloc.allocation.schedule import budget_per_token
from sae_lens_alloc.evaluation.usage import by_pairs, measure_usage
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.saes.allocator import start_from_tokens
from sae_lens_alloc.thresholds.calibration import BATCH_SIZE
from sae_lens_alloc.thresholds.factor import scale_thresholds
from sae_lens_alloc.thresholds.requirements import require_activations
from sae_lens_alloc.training.source_selection import (
    carried_thresholds,
    source_selection,
)


@dataclass(frozen=True)
class ConversionReport:
    """
    Figures of a converted SAE before training.

    Args:
        source_l0: Features per token of the source at inference: by its thresholds, or k for
            a topk SAE.
        source_ev: Explained variance of the source.
        l0: Features per token of the converted SAE by its thresholds.
        ev: Explained variance of the converted SAE by its thresholds. At the source's L0 it
            is that of the source, except for a topk SAE, which has no thresholds.
        training_l0: Features per token of the allocation of the first training step.
        training_ev: Explained variance of the allocation of the first training step.
        n_tokens: Number of tokens used.
    """

    source_l0: float
    source_ev: float
    l0: float
    ev: float
    training_l0: float
    training_ev: float
    n_tokens: int


@torch.no_grad()
def warm_start(
    sae: AllocationTrainingSAE[Any], source: SAE[Any], activations: torch.Tensor
) -> ConversionReport:
    """
    Estimates the statistics of a converted SAE from activations, as if it had been trained on
    them: the running cut, the densities of the features, the Zipf law of the quotas, and the
    thresholds. The thresholds are those of the source times the factor that gives k features
    per token, or one common threshold if the source is a topk SAE.

    Args:
        sae: The converted SAE. Its statistics are changed in place, and the report is recorded
            in its metadata under `conversion`.
        source: The SAE that it was converted from.
        activations: Inputs of the converted SAE, shape (T, d_in). With 65k tokens, features
            denser than 1 in 6500 tokens take part in the fit of the law.

    Raises:
        ValueError: if the activations have another dimension than d_in, they or the source's
            reconstruction of them are not finite, or too few affinities are positive for k
            features per token.
    """
    activations = activations.to(sae.device)
    source_l0, source_ev = source_quality(source, sae, activations)
    state, cfg = sae.allocation, sae.cfg
    first_k = budget_per_token(0, cfg.k, cfg.k_start, cfg.k_decay_steps)
    start_from_tokens(
        sae.allocator,
        sae.encoder(),
        sae.process_sae_in(activations),
        budget_for(first_k, len(activations)),
        keep_law=_was_shaped_by_quotas(source),
    )
    thresholds = carried_thresholds(source, sae)
    state.threshold.copy_(state.cut if thresholds is None else thresholds)
    scale_thresholds(sae, activations, cfg.k)
    by_batch = by_pairs(partial(sae.autoencode_pairs, by_threshold=False))
    by_threshold = by_pairs(partial(sae.autoencode_pairs, by_threshold=True))
    training = measure_usage(by_batch, activations, BATCH_SIZE)
    start = measure_usage(by_threshold, activations, BATCH_SIZE)
    report = ConversionReport(
        source_l0=source_l0,
        source_ev=source_ev,
        l0=start.l0,
        ev=start.explained_variance,
        training_l0=training.l0,
        training_ev=training.explained_variance,
        n_tokens=len(activations),
    )
    cfg.metadata.conversion = asdict(report)
    return report


def source_quality(
    source: SAE[Any], converted: AllocationTrainingSAE[Any], activations: torch.Tensor
) -> tuple[float, float]:
    """
    Features per token and explained variance of the source at inference. They are computed with
    the converted weights, which needs no dense activations and does not change the source.

    Args:
        source: The source.
        converted: The converted SAE.
        activations: Inputs of the converted SAE, shape (T, d_in).

    Raises:
        ValueError: if the activations have another dimension than d_in, or they or their
            reconstruction are not finite.
    """
    require_activations(converted, activations)
    select = source_selection(source, converted)
    usage = measure_usage(
        by_pairs(partial(converted.autoencode_selected, select=select)),
        activations.to(converted.device),
    )
    if not math.isfinite(usage.explained_variance):
        raise ValueError(
            f"the SAE explains {usage.explained_variance} of the variance of these "
            "activations: its weights are damaged, or it belongs to another model or hook."
        )
    return usage.l0, usage.explained_variance


def _was_shaped_by_quotas(source: SAE[Any]) -> bool:
    """Whether Feature Choice trained the source last. Its law would drift if it was fitted again."""
    return (
        isinstance(source, AllocationTrainingSAE)
        and source.rule_at(source.step_count.last) == "feature"
    )
