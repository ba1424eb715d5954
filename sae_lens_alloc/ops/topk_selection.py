"""The pairs by which flagged features take part in the auxiliary loss."""

from functools import cached_property

import torch

from sae_lens_alloc.allocation.sparse_activations import Pairs, SparseActivations
from sae_lens_alloc.ops.block_encoder import Encoder, block_width
from sae_lens_alloc.ops.encoder_tensors import tensors_for_kernels


class FlaggedFeatures:
    """
    Some of the features, as a mask and as indices.

    Args:
        mask: Boolean of shape (F,), which does not change as long as this is used.
    """

    def __init__(self, mask: torch.Tensor) -> None:
        self.mask = mask

    @cached_property
    def indices(self) -> torch.Tensor:
        """Ascending, int64 of shape (U,). A GPU is asked for U, once."""
        return self.mask.nonzero().squeeze(1)


@torch.no_grad()
def encode_auxiliary(
    encoder: Encoder, x: torch.Tensor, flagged: FlaggedFeatures, k_aux: int
) -> Pairs:
    """
    Selects for each token its `k_aux` largest affinities within the flagged features,
    negative ones too.

    Args:
        encoder: The encoder.
        x: Encoder inputs of shape (B, d_in).
        flagged: The features to choose from.
        k_aux: Features per token; all that are flagged if there are fewer.

    Returns:
        The pairs, padded to B * min(k_aux, F) by the Triton backend, which asks the device
        nothing and takes the first features where affinities are equal.
    """
    tensors = tensors_for_kernels(encoder.W_enc, encoder.b_enc, encoder.scale, x)
    if tensors is not None:
        # imported where it is used, since Triton need not be installed
        from sae_lens_alloc.ops.triton_topk import largest_of_flagged

        return largest_of_flagged(tensors, flagged.mask, min(k_aux, tensors.shape[1]))
    k_aux = min(k_aux, len(flagged.indices))
    chosen = flagged.indices.new_empty(len(x), 0)
    values = x.new_empty(len(x), 0)
    for block in flagged.indices.split(block_width(len(x), x.device)):
        affinities = encoder.part(block).affinities(x)
        values = torch.cat([values.to(affinities.dtype), affinities], dim=1)
        chosen = torch.cat([chosen, block.expand(affinities.shape)], dim=1)
        best = values.topk(min(k_aux, values.shape[1]), dim=1, sorted=False)
        values, chosen = best.values, chosen.gather(1, best.indices)
    chosen, order = chosen.sort(dim=1)
    return SparseActivations(
        torch.arange(len(x), device=x.device).repeat_interleave(k_aux),
        chosen.flatten(),
        values.gather(1, order).flatten(),
        (len(x), encoder.n_features),
    )
