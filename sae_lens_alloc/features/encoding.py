"""The active pairs of any SAE of SAELens, without a matrix of all tokens and features."""

from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE

from sae_lens_alloc.allocation.sparse_activations import SparseActivations
from sae_lens_alloc.ops.block_encoder import Encoder
from sae_lens_alloc.ops.encode_thresholds import encode_thresholds

# Elements of the dense activations of SAEs that give nothing else.
LARGEST_DENSE = 2**24


@torch.no_grad()
def encode_pairs(sae: SAE[Any], x: torch.Tensor) -> SparseActivations:
    """
    The pairs that `sae.encode` activates.

    Args:
        sae: An inference SAE whose activations of a token depend on that token alone.
        x: Activations as the SAE takes them, shape (B, d_in).

    Returns:
        Pairs of the B tokens in row order, on the SAE's device.
    """
    x = x.to(sae.device, sae.dtype)
    if isinstance(sae, JumpReLUSAE):
        encoder = Encoder(sae.W_enc, sae.b_enc, None)
        return encode_thresholds(encoder, sae.process_sae_in(x), sae.threshold)
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    size = max(1, LARGEST_DENSE // sae.cfg.d_sae)
    for i, part in enumerate(x.split(size)):
        dense = sae.encode(part).to_dense()
        tokens, features = dense.nonzero(as_tuple=True)
        parts.append((tokens + i * size, features, dense[tokens, features]))
    tokens, features, values = map(torch.cat, zip(*parts, strict=True))
    return SparseActivations(tokens, features, values, (len(x), sae.cfg.d_sae))
