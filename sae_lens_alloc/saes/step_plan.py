"""What the host decides about a training step before the device begins with it."""

from dataclasses import dataclass

from sae_lens_alloc.saes.allocator import Rule


@dataclass(frozen=True)
class StepPlan:
    """
    Steps whose plans are equal but for their number make the same launches on the device.

    Args:
        step: Number of the training step.
        continues: Whether this is another part of the last call's step.
        rule: Who gets the budget.
        previous_rule: The rule of the step before, None at the first step.
        budget: Number of pairs M.
        n_margin: Pairs of the margin.
        aux_weight: Coefficient of the auxiliary loss, 0 where it is off.
    """

    step: int
    continues: bool
    rule: Rule
    previous_rule: Rule | None
    budget: int
    n_margin: int
    aux_weight: float
