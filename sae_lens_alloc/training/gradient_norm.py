"""The norm of all gradients together, of which each rank has a part."""

from collections.abc import Sequence

import torch
from torch.nn.utils import get_total_norm

from sae_lens_alloc.distributed.ranks import Ranks


def norm_over_ranks(
    own: Sequence[torch.Tensor], of_all: Sequence[torch.Tensor], ranks: Ranks
) -> torch.Tensor:
    """
    The norm of gradients, of shape ().

    Args:
        own: Gradients of weights that this rank alone holds.
        of_all: Gradients of weights that all ranks hold, the same on each.
        ranks: The ranks.
    """
    if ranks.is_alone:
        return get_total_norm([*of_all, *own])
    squared = ranks.sum(get_total_norm(list(own)).square())
    return (squared + get_total_norm(list(of_all)).square()).sqrt()
