"""
Nested reconstructions (arXiv 2503.17547): the first features, up to each of some widths, must
reconstruct the activations without the others. An SAE that does not nest has one level, of all
features.
"""

from collections.abc import Sequence

from sae_lens_alloc.allocation.sparse_activations import Pairs
from sae_lens_alloc.distributed.feature_shard import FeatureShard


def inner_pairs(
    pairs: Pairs, widths: Sequence[int], shard: FeatureShard
) -> list[Pairs]:
    """For each width, those of a rank's active pairs whose feature is below it."""
    return [pairs.of_first_features(shard.n_below(width)) for width in widths]


def level_loss_names(inner_widths: Sequence[int]) -> list[str]:
    """Names of the reconstruction losses: of all features, and of each inner width."""
    return ["mse_loss", *(f"inner_mse_loss_{width}" for width in inner_widths)]
