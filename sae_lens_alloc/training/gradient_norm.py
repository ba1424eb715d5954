"""The norm of all gradients together, of which each rank has a part."""

from collections.abc import Mapping

import torch
from torch.nn.utils import get_total_norm

from sae_lens_alloc.distributed.ranks import Ranks
from sae_lens_alloc.saes.weight_names import OF_NO_FEATURE


def norm_over_ranks(
    gradients: Mapping[str, torch.Tensor], ranks: Ranks
) -> torch.Tensor:
    """
    The norm of all gradients of an SAE together, of shape ().

    Args:
        gradients: Gradients by the names of their weights. Weights of features are this rank's
            alone, and the others are on all ranks, with the same gradients.
        ranks: The ranks.
    """
    of_all = [gradients[name] for name in gradients if name in OF_NO_FEATURE]
    own = [gradients[name] for name in gradients if name not in OF_NO_FEATURE]
    if ranks.is_alone:
        return get_total_norm([*of_all, *own])
    squared = ranks.sum(get_total_norm(own).square())
    return (squared + get_total_norm(of_all).square()).sqrt()
