"""Affinities relative to what their token has: what is left of TopK (allocation/token_share.py)."""

import torch

from sae_lens_alloc.allocation.token_share import token_factors
from sae_lens_alloc.ops.block_encoder import BlockEncoder, Encoder, KnownAffinities
from sae_lens_alloc.ops.topk_selection import FeatureSubset, encode_topk


@torch.no_grad()
def relative_to_tokens(
    encoder: BlockEncoder, x: torch.Tensor, budget: int, share: float
) -> tuple[BlockEncoder, torch.Tensor, torch.Tensor | None]:
    """
    An encoder and its inputs, which give affinities relative to the k-th largest of their token.

    Args:
        encoder: The encoder of all features.
        x: Encoder inputs of shape (B, d_in).
        budget: Number of pairs M, of which k for each token.
        share: What is left of TopK, in [0, 1].

    Returns:
        The encoder, its inputs, and the factors of the tokens, shape (B,), by which its affinities
        are larger than those of `encoder`. Without a share, what was given, and None.
    """
    if not share:
        return encoder, x, None
    k = max(1, budget // len(x))
    factors = token_factors(_kth_largest(encoder, x, k), share)
    if isinstance(encoder, KnownAffinities):
        return KnownAffinities(encoder.known * factors[:, None]), x, factors
    assert isinstance(encoder, Encoder)
    # the bias becomes a row of W_enc, so that every backend scales it with the inputs
    weights = torch.cat([encoder.W_enc, encoder.b_enc[None].to(encoder.W_enc)])
    inputs = torch.cat([x, torch.ones_like(x[:, :1])], dim=1) * factors[:, None].to(x)
    no_bias = torch.zeros_like(encoder.b_enc)
    return Encoder(weights, no_bias, encoder.scale), inputs, factors


def _kth_largest(encoder: BlockEncoder, x: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th largest affinity of each token, shape (B,)."""
    k = min(k, encoder.n_features)
    if isinstance(encoder, KnownAffinities):
        return encoder.known.topk(k, dim=1).values[:, -1]
    assert isinstance(encoder, Encoder)
    everyone = torch.ones(encoder.n_features, dtype=torch.bool, device=x.device)
    best = encode_topk(encoder, x, FeatureSubset(everyone), k)
    return best.places.values.view(len(x), k).amin(1)
