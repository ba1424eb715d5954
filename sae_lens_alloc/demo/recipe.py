"""Everything that decides what is built, in one place."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Sizes and training settings of the demo model."""

    seed: int = 0
    vocab_size: int = 4096
    context: int = 256
    width: int = 192
    layers: int = 4
    heads: int = 3
    hook_block: int = 2
    init_std: float = 0.02
    embedding_std: float = (
        0.08  # large enough that the first block does not drown the embedding
    )
    tokens: int = 5_600_000
    batch: int = 8
    micro_batch: int = (
        4  # small enough that the logits stay in the allocator's reusable heap
    )
    warm_up_steps: int = 80
    decay: float = (
        0.4  # the last part of training, in which the learning rate falls to zero
    )
    muon_lr: float = 6e-3
    muon_weight_decay: float = 0.2
    adam_lr: float = 4e-3
    adam_weight_decay: float = 0.1
    clip: float = 1.0

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.tokens // (self.batch * self.context)

    @property
    def hook(self) -> str:
        """Name of the module whose output is the demo's activation."""
        return f"transformer.h.{self.hook_block}"
