"""
The dense path: activations as a whole matrix of tokens and features, for those who look at it.

`sae.encode` gives such a matrix, and so does a training step whose activations have hooks. All else
works on the pairs that are active.
"""

from typing import Any

import torch
from sae_lens.saes.sae import SAE
from transformer_lens.hook_points import HookPoint

from sae_lens_alloc.allocation.sparse_activations import Pairs
from sae_lens_alloc.compat import has_hooks
from sae_lens_alloc.distributed.feature_shard import FeatureShard


def require_all_features(shard: FeatureShard) -> None:
    """Raises ValueError where other ranks hold features, too: a matrix would lack theirs."""
    if not shard.is_whole:
        raise ValueError(
            "each process holds a part of the features, so there is no matrix of all "
            "activations: take hooks off the SAE in a training by several processes, and encode "
            "with the SAE that it saves."
        )


def acts_are_hooked(sae: SAE[Any]) -> bool:
    """Whether somebody looks at the activations, or changes them."""
    return has_hooks(sae.hook_sae_acts_pre) or has_hooks(sae.hook_sae_acts_post)


def gradient_reaches_inputs(
    sae: SAE[Any], sae_in: torch.Tensor, shard: FeatureShard
) -> bool:
    """
    Whether a backward pass goes through the encoder inputs. Otherwise they depend on the weights
    through b_dec alone, whose gradient `reconstruct` gives at the cost of a matrix-vector product.
    """
    hooked = has_hooks(sae.hook_sae_input) or acts_are_hooked(sae)
    if sae_in.requires_grad or hooked:
        require_all_features(shard)
    return sae_in.requires_grad or hooked


def dense_affinities(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    scale: torch.Tensor | None,
    hook_pre: HookPoint,
) -> torch.Tensor:
    """
    Affinities of shape (..., F) of encoder inputs of shape (..., d_in).

    Args:
        x: Encoder inputs.
        W_enc: Encoder weights of shape (d_in, F).
        b_enc: Encoder bias of shape (F,).
        scale: Factor of each feature, shape (F,), or None for 1.
        hook_pre: The hook on the pre-activations.
    """
    hidden_pre = hook_pre(x @ W_enc + b_enc)
    return hidden_pre if scale is None else hidden_pre * scale.to(hidden_pre.dtype)


def decode_dense(
    feature_acts: torch.Tensor, W_dec: torch.Tensor, scale: torch.Tensor | None
) -> torch.Tensor:
    """
    Reconstruction of shape (..., d_in) without b_dec, from dense or sparse activations of shape
    (..., F) in units of affinities.
    """
    if feature_acts.is_sparse:
        feature_acts = feature_acts.to_dense()
    if scale is not None:
        feature_acts = feature_acts / scale.to(feature_acts.dtype)
    return feature_acts @ W_dec


def mask_of(pairs: Pairs) -> torch.Tensor:
    """Boolean matrix of shape (B, F), true at the pairs."""
    found = pairs.without_padding()
    mask = torch.zeros(found.shape, dtype=torch.bool, device=found.values.device)
    mask[found.token_indices, found.feature_indices] = True
    return mask
