"""What changes over training: the budget per token and the auxiliary loss."""


def budget_per_token(
    step: int, k: float, k_start: float | None, decay_steps: int
) -> float:
    """Budget per token at `step`: linear from k_start to k over `decay_steps`, then k."""
    if k_start is None or step >= decay_steps:
        return k
    return k_start + (k - k_start) * step / decay_steps


def aux_loss_fade(step: int, decay_start: int | None) -> float:
    """
    Factor of the auxiliary loss at `step`: 1 until `decay_start`, then linearly to 0 over a
    tenth of that many steps. None never fades.
    """
    if decay_start is None or step < decay_start:
        return 1.0
    fade_steps = max(1, decay_start // 10)
    return max(0.0, 1 - (step - decay_start + 1) / fade_steps)
