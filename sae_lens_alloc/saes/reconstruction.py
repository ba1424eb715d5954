"""Reconstructions from pairs, and one backward for all of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sae_lens_alloc.allocation.sparse_activations import Pairs, real_places
from sae_lens_alloc.distributed.ranks import ALONE, Ranks, summed, used_by_all
from sae_lens_alloc.ops.block_encoder import Encoder
from sae_lens_alloc.ops.feature_order import FeatureOrder
from sae_lens_alloc.ops.pair_autoencoder import (
    GradientMemory,
    decode_pairs,
    pair_pre_acts,
)


@dataclass(frozen=True)
class Weights:
    """
    The weights that learn from a reconstruction.

    Args:
        W_enc: Shape (d_in, F).
        b_enc: Shape (F,).
        W_dec: Shape (F, d_in).
        subtracted: What was subtracted from the encoder inputs and learns here, shape (d_in,);
            see `pair_pre_acts`. None for nothing.
        memory: Memory for the gradients.
        ranks: The ranks that share the features, of which these are the weights of this one's.
    """

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    subtracted: torch.Tensor | None = None
    memory: GradientMemory | None = None
    ranks: Ranks = ALONE


def reconstruct(
    weights: Weights,
    encoder: Encoder,
    x: torch.Tensor,
    sets: Sequence[Pairs],
    not_decoded: Sequence[Pairs] = (),
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """
    Reconstructions from sets of pairs. All share one gradient of the encoder and one of the
    decoder.

    Args:
        weights: The weights.
        encoder: The encoder that found the pairs.
        x: Encoder inputs of shape (B, d_in).
        sets: The sets of pairs.
        not_decoded: Sets of which only the pre-activations are wanted.

    Returns:
        For each set its reconstruction by all ranks without b_dec, shape (B, d_in), and the pre-activations
        of the pairs that are not decoded, shape (N,).
    """
    encoded = [*sets, *not_decoded]
    if not encoded:
        return [], x.new_zeros(0)
    rows = torch.cat(
        [pairs.places.token_indices + i * len(x) for i, pairs in enumerate(encoded)]
    )
    features = torch.cat([pairs.places.feature_indices for pairs in encoded])
    real = real_places(encoded)
    order = FeatureOrder(features, real, weights.W_enc.shape[1])
    subtracted = weights.subtracted
    if subtracted is not None:
        subtracted = used_by_all(subtracted, weights.ranks)
    pre_acts = pair_pre_acts(
        x,
        weights.W_enc,
        weights.b_enc,
        rows,
        features,
        encoder.pre_acts(torch.cat([p.places.values for p in encoded]), features),
        n_sets=len(encoded),
        subtracted=subtracted,
        memory=weights.memory,
        real=real,
        order=order,
    )
    if not sets:
        return [], pre_acts
    n_decoded = sum(len(pairs.places.values) for pairs in sets)
    decoded, others = pre_acts.split((n_decoded, len(pre_acts) - n_decoded))
    recons = decode_pairs(
        decoded,
        weights.W_dec,
        rows[:n_decoded],
        features[:n_decoded],
        len(x),
        n_sets=len(sets),
        memory=weights.memory,
        real=None if real is None else real[:n_decoded],
        order=order,
    )
    return list(summed(recons, weights.ranks)), others
