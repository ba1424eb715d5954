"""Inference thresholds that are updated during training as online quantiles."""

import torch

RATE = 0.05
MAX_RELATIVE_ERROR = 3.0
# A cut further away than this is more than noise: training is young, or the data has changed.
JUMP = 0.1


def track_threshold(
    threshold: torch.Tensor, count: torch.Tensor, target: torch.Tensor | float
) -> torch.Tensor:
    """
    Moves a threshold towards the one that `target` affinities of a batch exceed:
    threshold * exp(rate * clip((count - target) / max(target, 1), -3, 3)).

    Args:
        threshold: Positive threshold(s), any shape.
        count: Number of affinities of the batch above the threshold, same shape.
        target: Wanted number, same shape or one number.

    Returns:
        The new threshold(s), same shape.
    """
    if isinstance(target, torch.Tensor):
        target = target.to(threshold)
    else:
        # copying a number to a GPU would wait for it
        target = torch.full_like(threshold, target)
    error = (count - target) / target.clamp(min=1.0)
    return threshold * torch.exp(
        RATE * error.clamp(-MAX_RELATIVE_ERROR, MAX_RELATIVE_ERROR)
    )


def follow_cut(cut: torch.Tensor, batch_cut: torch.Tensor) -> torch.Tensor:
    """
    Averages the cuts of the batches geometrically. If the latest cut is more than 10% away,
    the average jumps to it, so that it never lags far behind.

    Args:
        cut: Running cut, positive scalar tensor.
        batch_cut: Smallest selected affinity of the batch, positive scalar tensor.

    Returns:
        The new running cut, scalar tensor.
    """
    difference = (batch_cut / cut).log()
    rate = torch.where(difference.abs() > JUMP, torch.ones_like(cut), RATE)
    return cut * torch.exp(rate * difference)
