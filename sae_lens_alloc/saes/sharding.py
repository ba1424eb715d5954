"""SAEs of which each rank holds its own features (docs/distributed.md)."""

from collections.abc import Callable
from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from torch import nn

from sae_lens_alloc.distributed.feature_shard import FeatureShard
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.saes.allocation_sae_config import AllocationTrainingSAEConfig
from sae_lens_alloc.saes.allocation_statistics import AllocationStatistics
from sae_lens_alloc.saes.initial_weights import initial_decoder, initial_encoder
from sae_lens_alloc.saes.rows import output_width
from sae_lens_alloc.saes.weight_names import OF_NO_FEATURE

# Elements of W_dec that are drawn at a time.
BLOCK_ELEMENTS = 2**24


@torch.no_grad()
def new_shard(
    cfg: AllocationTrainingSAEConfig, shard: FeatureShard
) -> AllocationTrainingSAE[Any]:
    """
    A new SAE of which only the own features are ever in memory. They start with the weights
    that they would have in the whole SAE, if its weights were drawn on a CPU from the same seed:
    all ranks draw all weights and keep their own.

    Args:
        cfg: The whole SAE. Its architecture must be one that allocates.
        shard: The features of this rank, which the SAE holds.
    """
    sae = TrainingSAE.from_dict({**cfg.to_dict(), "device": "meta"})
    assert isinstance(sae, AllocationTrainingSAE)
    d_out = output_width(cfg)
    W_dec = _drawn_rows(cfg, d_out or cfg.d_in, initial_decoder, sae.dtype, shard)
    W_dec = W_dec.to(cfg.device)
    columns = W_dec
    if d_out is not None:  # a transcoder's encoder is drawn by itself
        columns = _drawn_rows(cfg, cfg.d_in, initial_encoder, sae.dtype, shard)
        columns = columns.to(cfg.device)
    zeros = {
        name: torch.zeros_like(weight, device=cfg.device)
        for name, weight in sae.named_parameters()
        if name in OF_NO_FEATURE
    }
    _put_weights(
        sae,
        # stored by rows, as SAELens has it: gradients in another order are summed otherwise
        W_enc=columns.T.clone(memory_format=torch.contiguous_format),
        W_dec=W_dec,
        b_enc=torch.zeros(len(shard), dtype=sae.dtype, device=cfg.device),
        **zeros,
    )
    for name, buffer in sae.named_buffers(recurse=False):  # of no feature
        setattr(sae, name, torch.zeros_like(buffer, device=cfg.device))
    whole = AllocationStatistics(
        cfg.d_sae, cfg.density_window_tokens, torch.device("cpu")
    )
    for name, buffer in whole.named_buffers():
        setattr(sae.allocation, name, buffer.to(cfg.device))
    _keep_own(sae.allocation, shard)
    sae.cfg.device = cfg.device
    sae.device = torch.device(cfg.device)
    return sae


@torch.no_grad()
def keep_own_features(sae: AllocationTrainingSAE[Any], shard: FeatureShard) -> None:
    """
    Makes a whole SAE one that holds the own features alone.

    Args:
        sae: The SAE, changed in place.
        shard: The features of this rank.
    """
    _put_weights(
        sae,
        W_enc=shard.own(sae.W_enc.data.T).T.contiguous(),
        W_dec=shard.own(sae.W_dec.data),
        b_enc=shard.own(sae.b_enc.data),
        b_dec=sae.b_dec.data,
    )
    _keep_own(sae.allocation, shard)


def _drawn_rows(
    cfg: AllocationTrainingSAEConfig,
    width: int,
    draw: Callable[[torch.Tensor, TrainingSAEConfig], torch.Tensor],
    dtype: torch.dtype,
    shard: FeatureShard,
) -> torch.Tensor:
    """The own rows of what `draw` fills, a part of the whole at a time."""
    own = torch.empty(len(shard), width, dtype=dtype)
    n_rows = max(1, BLOCK_ELEMENTS // width)
    for start in range(0, cfg.d_sae, n_rows):
        stop = min(start + n_rows, cfg.d_sae)
        rows = draw(torch.empty(stop - start, width, dtype=dtype), cfg)
        here = slice(shard.n_below(start), shard.n_below(stop))
        own[here] = rows[shard.ids()[here] - start]
    return own


def _put_weights(sae: AllocationTrainingSAE[Any], **weights: torch.Tensor) -> None:
    for name, weight in weights.items():
        setattr(sae, name, nn.Parameter(weight))


def _keep_own(statistics: AllocationStatistics, shard: FeatureShard) -> None:
    for name in statistics.by_feature:
        setattr(statistics, name, shard.own(getattr(statistics, name)))
    statistics.shard = shard
    statistics.forget_derived()
