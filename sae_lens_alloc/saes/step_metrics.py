"""What SAELens' logger shows of a training step; functions run only when a step is logged."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias

import torch

from sae_lens_alloc.allocation.sparse_activations import Pairs
from sae_lens_alloc.allocation.zipf import ZipfLaw
from sae_lens_alloc.ops.block_encoder import Encoder
from sae_lens_alloc.ops.encode_thresholds import encode_thresholds
from sae_lens_alloc.saes.allocation_statistics import AllocationStatistics
from sae_lens_alloc.saes.density_statistics import DensityStatistics
from sae_lens_alloc.saes.step_count import StepCount

# as SAELens' TrainStepOutput types them
Metrics: TypeAlias = dict[
    str, torch.Tensor | float | int | Callable[[], torch.Tensor | float]
]


def allocation_metrics(
    statistics: AllocationStatistics,
    step_count: StepCount,
    pairs: Pairs,
    make_encoder: Callable[[], Encoder],
    x: torch.Tensor,
) -> Metrics:
    """
    Metrics of an allocated batch.

    Args:
        statistics: The running statistics.
        step_count: Number of the step.
        pairs: The active pairs.
        make_encoder: Gives the encoder as it is when a step is logged.
        x: Encoder inputs of shape (B, d_in).
    """
    n_tokens, shard = len(x), statistics.shard

    def threshold_l0() -> torch.Tensor:
        found = encode_thresholds(make_encoder(), x, statistics.threshold)
        n_active = torch.full((), len(found.values), device=x.device)
        return shard.ranks.sum(n_active) / n_tokens

    return {
        "threshold_l0": threshold_l0,
        "mean_threshold": lambda: shard.gather(statistics.threshold).mean(),
        "cut": lambda: statistics.cut,
        "top_1pct_tokens_budget_share": lambda: _top_tokens_share(
            shard.ranks.sum(pairs.token_counts())
        ),
        **density_metrics(statistics, step_count, n_tokens),
    }


def density_metrics(
    statistics: DensityStatistics, step_count: StepCount, n_tokens: int
) -> Metrics:
    """
    Metrics of the densities.

    Args:
        statistics: The running statistics.
        step_count: Number of the step.
        n_tokens: Tokens per batch.
    """

    @lru_cache(maxsize=1)
    def law_after(step: int | None) -> ZipfLaw | None:
        del step  # the law of one step is not that of the next
        return statistics.fit_law(n_tokens)

    def of_law(name: str) -> Callable[[], float]:
        return lambda: getattr(law_after(step_count.running), name, float("nan"))

    return {
        "underused_features": lambda: statistics.shard.ranks.sum(
            statistics.underused.sum()
        ),
        "zipf_alpha": of_law("alpha"),
        "zipf_beta": of_law("beta"),
        "zipf_r2": of_law("r2"),
        "zipf_r2_middle": of_law("r2_middle"),
    }


def _top_tokens_share(counts: torch.Tensor) -> torch.Tensor:
    """Share of the budget that the 1% of tokens with the most features take, of (B,) counts."""
    n_top = math.ceil(len(counts) / 100)
    return counts.topk(n_top).values.sum() / counts.sum().clamp(min=1)
