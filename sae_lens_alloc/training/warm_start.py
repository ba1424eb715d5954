"""How a converted SAE starts: its statistics and thresholds, measured on activations."""

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
    How a converted SAE starts, on the activations it was given.

    Args:
        source_l0: Features per token of the source at inference: by its thresholds, or its k
            best features of each token.
        source_ev: Explained variance of the source.
        l0: Features per token of the converted SAE by its thresholds.
        ev: Explained variance of the converted SAE by its thresholds. At the source's L0 it
            is the source's own, except for a topk SAE, which has no thresholds.
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
    Starts a converted SAE from activations, as if they had been trained on already: running
    cut and densities of the features, the Zipf law of the quotas, and the source's thresholds
    times the factor that gives k features per token, or one common threshold after topk.

    Args:
        sae: What `convert_sae` made of the source. Its statistics are changed in place, and
            the report is recorded in its metadata under `conversion`.
        source: The SAE it was converted from.
        activations: Activations as the converted SAE takes them, shape (T, d_in). Of 65k
            tokens, features denser than 1 in 6500 tokens take part in the law.

    Raises:
        ValueError: if activations are not of the SAE's d_in or not finite, their
            reconstruction by the source is not, or too few affinities are positive for k
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
    Features per token and explained variance of the source at inference, computed with the
    converted weights, which spares dense activations and leaves the source alone.
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
    """Whether Feature Choice trained the source last; its law would drift if fitted again."""
    return (
        isinstance(source, AllocationTrainingSAE)
        and source.rule_at(source.step_count.last) == "feature"
    )
