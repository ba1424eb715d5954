"""
The margin: how the encoder learns whom to select ("Learning whom to select" in docs/method.md).

The gradient of the selection is known in closed form, and belongs to no loss that could be written
down. It enters the step as a term of value 0.
"""

from collections.abc import Mapping

import torch

from sae_lens_alloc.allocation.margin import (
    Margin,
    gains,
    selection_gradient,
    total_gain,
)
from sae_lens_alloc.distributed.feature_shard import FeatureShard
from sae_lens_alloc.ops.block_encoder import Encoder
from sae_lens_alloc.ops.sparse import sampled_products
from sae_lens_alloc.saes.auxiliary_loss import decoder_norms


def margin_term(
    pre_acts: torch.Tensor,
    margin: Margin,
    encoder: Encoder,
    W_dec: torch.Tensor,
    residuals: Mapping[int, torch.Tensor],
    unit_out: torch.Tensor,
    shard: FeatureShard,
) -> torch.Tensor:
    """
    A term of value 0, of shape (), whose gradient is that of the squared error by way of the
    selection: of the mean over the reconstructions that a pair takes part in.

    Args:
        pre_acts: Pre-activations of the margin's pairs, shape (N,), to which the gradient goes.
        margin: The margin of the budget.
        encoder: The encoder.
        W_dec: Decoder weights of shape (F, d_in).
        residuals: Activations minus the reconstruction from so many first features, in the
            shape of the activations.
        unit_out: What a reconstruction of ones becomes, in the same shape.
        shard: The features of this rank, whose part of the margin `margin` is.
    """
    known = pre_acts.detach()
    gradient = _margin_gradient(
        known, margin, encoder, W_dec.detach(), residuals, unit_out, shard
    )
    return gradient @ (pre_acts - known)


@torch.no_grad()
def _margin_gradient(
    pre_acts: torch.Tensor,
    margin: Margin,
    encoder: Encoder,
    W_dec: torch.Tensor,
    residuals: Mapping[int, torch.Tensor],
    unit_out: torch.Tensor,
    shard: FeatureShard,
) -> torch.Tensor:
    """Gradient with respect to the pre-activations of the margin, shape (N,)."""
    pairs = margin.pairs
    tokens, features = pairs.places.token_indices, pairs.places.feature_indices
    norms = decoder_norms(W_dec) if encoder.scale is None else encoder.scale
    d_in, W_dec = W_dec.shape[1], W_dec.to(norms)
    scales = unit_out.reshape(-1, d_in)[:, 0].to(norms)[tokens]
    products, n_levels = torch.zeros_like(scales), torch.zeros_like(scales)
    for width, residual in residuals.items():
        takes_part = features < shard.n_below(width)
        errors = residual.reshape(-1, d_in).to(norms)
        products += takes_part * sampled_products(
            tokens, features, errors, W_dec, pairs.real
        )
        n_levels += takes_part
    gained = gains(
        pre_acts,
        # the mean: a sum would draw the budget to features of many levels
        scales * products / n_levels,
        (scales * norms[features]).square(),
    )
    total = shard.ranks.sum(total_gain(margin, gained))
    gradient = selection_gradient(margin, gained, total)
    if encoder.scale is not None:
        gradient = gradient * encoder.scale[features]
    # the loss is a mean over what has a last dimension: tokens, or heads of tokens
    return gradient * (unit_out.shape[-1] / unit_out.numel())
