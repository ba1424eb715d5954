"""Encoding block by block by a threshold for each feature, as inference does."""

import torch

from sae_lens_alloc.allocation.sparse_activations import SparseActivations
from sae_lens_alloc.ops.block_encoder import Encoder


@torch.no_grad()
def encode_thresholds(
    encoder: Encoder, x: torch.Tensor, thresholds: torch.Tensor
) -> SparseActivations:
    """Selects the positive affinities of the tokens x above their feature's threshold, (F,)."""
    collector = ThresholdCollector(encoder, thresholds)
    for block in encoder.blocks(len(x)):
        collector.add(block, encoder.part(block).products(x))
    return collector.finish(len(x))


class ThresholdCollector:
    """
    Keeps the positive affinities above their feature's threshold, block by block.

    Args:
        encoder: The encoder.
        thresholds: Shape (F,).
    """

    def __init__(self, encoder: Encoder, thresholds: torch.Tensor) -> None:
        self.encoder = encoder
        self.thresholds = thresholds
        self._blocks: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def add(self, block: slice, products: torch.Tensor) -> None:
        """Adds the affinities of a block of features, of which `products` are given."""
        thresholds = self.thresholds[block]
        tokens, features, values = self.encoder.part(block).candidates(
            products, thresholds
        )
        above = values > thresholds[features]
        self._blocks.append(
            (tokens[above], features[above] + block.start, values[above])
        )

    def finish(self, n_tokens: int) -> SparseActivations:
        """The pairs of a batch of this many tokens."""
        tokens, features, values = map(torch.cat, zip(*self._blocks, strict=True))
        return SparseActivations.from_unordered(
            tokens, features, values, (n_tokens, self.encoder.n_features)
        )
