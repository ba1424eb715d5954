"""What the parts of a training step hand to each other."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sae_lens_alloc.allocation.margin import Margin
from sae_lens_alloc.allocation.sparse_activations import Pairs
from sae_lens_alloc.saes.allocator import Rule
from sae_lens_alloc.saes.auxiliary_loss import AuxiliaryPairs


@dataclass(frozen=True)
class StepPlan:
    """
    What the host decides about a step before the device begins with it. Steps whose plans are
    equal but for their number make the same launches on the device.

    Args:
        step: Number of the training step.
        continues: Whether this is another part of the last call's step.
        rule: Who gets the budget.
        previous_rule: The rule of the step before, None at the first step.
        budget: Number of pairs M.
        n_margin: Pairs of the margin.
        aux_weight: Coefficient of the auxiliary loss, 0 where it is off.
        topk_share: What is left of TopK under Mutual Choice, 0 for nothing.
    """

    step: int
    continues: bool
    rule: Rule
    previous_rule: Rule | None
    budget: int
    n_margin: int
    aux_weight: float
    topk_share: float = 0.0


@dataclass(frozen=True)
class FirstPass:
    """
    The first of two passes of a batch.

    Args:
        pairs: Its active pairs.
        x: Its encoder inputs, shape (B, d_in).
    """

    pairs: Pairs
    x: torch.Tensor


@dataclass(frozen=True)
class Selection:
    """
    Who takes part in a step.

    Args:
        pairs: The active pairs.
        margin: The first pairs below the cut, None without.
        aux: Pairs of the auxiliary loss, None without.
        dense_acts: Activations of shape (..., F), where hooks on them may change them; None
            where nobody looks.
        first: The first pass, None where there is one pass.
    """

    pairs: Pairs
    margin: Margin | None
    aux: AuxiliaryPairs | None
    dense_acts: torch.Tensor | None
    first: FirstPass | None = None


@dataclass(frozen=True)
class Outputs:
    """
    What a step puts out, in the space and the shape of the activations.

    Args:
        levels: Reconstructions by the number of first features they are from; all features
            come first.
        aux: Reconstruction of the error by the auxiliary pairs, None without.
        unit: What a reconstruction of ones becomes, None without a margin.
        margin_pre_acts: Pre-activations of the margin's pairs, shape (N,).
        first: Reconstruction by the first pass, None where there is one pass.
    """

    levels: Mapping[int, torch.Tensor]
    aux: torch.Tensor | None
    unit: torch.Tensor | None
    margin_pre_acts: torch.Tensor
    first: torch.Tensor | None
