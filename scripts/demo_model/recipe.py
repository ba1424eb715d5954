"""Everything that decides what is built, in one place."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Sizes and training settings of the demo model."""

    seed: int = 0
    vocab_size: int = 1536
    context: int = 256
    width: int = 192
    layers: int = 4
    heads: int = 3
    hook_block: int = 2
    init_std: float = 0.02
    # Not tied to the output, and large: the first block cannot drown it, so that norms stay
    # level and the residual stream keeps many directions.
    embedding_std: float = 0.5
    tokens: int = 7_372_800
    batch: int = 8
    micro_batch: int = (
        4  # small enough that the logits stay in the allocator's reusable heap
    )
    warm_up_steps: int = 80
    decay: float = (
        0.4  # the last part of training, in which the learning rate falls to zero
    )
    muon_lr: float = 6e-3
    muon_weight_decay: float = 0.4
    adam_lr: float = 4e-3
    embedding_lr: float = 2e-2
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
