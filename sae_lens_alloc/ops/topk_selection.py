"""Per-token top-k: each token takes its largest affinities, within a subset of the features."""

from functools import cached_property

import torch

from sae_lens_alloc.allocation.sparse_activations import Pairs, SparseActivations
from sae_lens_alloc.distributed.ranks import ALONE, Ranks
from sae_lens_alloc.ops.block_encoder import Encoder, block_width
from sae_lens_alloc.ops.candidate_buffer import asking_costs_a_wait
from sae_lens_alloc.ops.encoder_tensors import tensors_for_kernels


class FeatureSubset:
    """
    Some of the features, as a mask and as indices.

    Args:
        mask: Boolean of shape (F,), which does not change as long as this is used.
        ranks: The ranks that share the features, of which these are this one's.
    """

    def __init__(self, mask: torch.Tensor, ranks: Ranks = ALONE) -> None:
        self.mask = mask
        self.ranks = ranks

    @cached_property
    def indices(self) -> torch.Tensor:
        """Ascending, int64 of shape (U,). A GPU is asked for U, once."""
        return self.mask.nonzero().squeeze(1)

    @cached_property
    def n_in_all(self) -> torch.Tensor:
        """How many features all ranks have in it, int64 of shape (). Summed up once."""
        return self.ranks.sum(self.mask.sum())

    @cached_property
    def is_empty_in_all(self) -> bool:
        """Whether no rank has a feature in it. A GPU is asked, once."""
        return int(self.n_in_all) == 0


@torch.no_grad()
def encode_topk(
    encoder: Encoder, x: torch.Tensor, subset: FeatureSubset, k: int
) -> Pairs:
    """
    Selects for each token its `k` largest affinities within a subset of the features, negative
    ones too; of equal ones those of the first features.

    Args:
        encoder: The encoder.
        x: Encoder inputs of shape (B, d_in).
        subset: The features to choose from.
        k: Features per token; all of the subset if there are fewer.

    Returns:
        The pairs, padded to B * min(k, F) by the Triton backend, which asks the device
        nothing.
    """
    tensors = tensors_for_kernels(encoder.W_enc, encoder.b_enc, encoder.scale, x)
    if tensors is not None:
        # imported where it is used, since Triton need not be installed
        from sae_lens_alloc.ops.triton_topk import topk_of_subset

        return topk_of_subset(tensors, subset.mask, min(k, tensors.shape[1]))
    k = min(k, len(subset.indices))
    chosen = subset.indices.new_empty(len(x), 0)
    values = x.new_empty(len(x), 0)
    for block in subset.indices.split(block_width(len(x), x.device)):
        affinities = encoder.part(block).affinities(x)
        values = torch.cat([values.to(affinities.dtype), affinities], dim=1)
        chosen = torch.cat([chosen, block.expand(affinities.shape)], dim=1)
        best = first_largest(values, min(k, values.shape[1]))
        values, chosen = values.gather(1, best), chosen.gather(1, best)
    return SparseActivations(
        torch.arange(len(x), device=x.device).repeat_interleave(k),
        chosen.flatten(),
        values.flatten(),
        (len(x), encoder.n_features),
    )


def first_largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """
    Places of the `k` largest values of each row, ascending; of equal ones the first.

    Args:
        values: Shape (B, n).
        k: At most n.

    Returns:
        int64 of shape (B, k).
    """
    largest = values.topk(min(k + 1, values.shape[1]), dim=1)
    if not asking_costs_a_wait(values.device) and (
        k in (0, values.shape[1])
        or bool((largest.values[:, k - 1] > largest.values[:, k]).all())
    ):
        return largest.indices[:, :k].sort(dim=1).values
    cut = largest.values[:, k - 1 : k]
    above, tied = values > cut, values == cut
    n_tied = k - above.sum(1, keepdim=True)
    kept = above | (tied & (tied.cumsum(1) <= n_tied))
    return kept.byte().topk(k, dim=1, sorted=False).indices.sort(dim=1).values
