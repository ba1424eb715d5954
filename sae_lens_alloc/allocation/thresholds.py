"""Inference thresholds tracked during training as online quantiles."""

import torch

RATE = 0.05
MAX_RELATIVE_ERROR = 3.0
# A batch's cut further away than this is no noise: early training, or other data.
JUMP = 0.1


def track_threshold(
    threshold: torch.Tensor, count: torch.Tensor, target: torch.Tensor | float
) -> torch.Tensor:
    """
    Moves a threshold towards the one that `target` affinities of a batch exceed:
    threshold * exp(rate * clip((count - target) / max(target, 1), -3, 3)).

    Args:
        threshold: Positive threshold(s), any shape.
        count: Affinities of the batch above the threshold, same shape.
        target: Wanted count, same shape or a number.
    """
    if isinstance(target, torch.Tensor):
        target = target.to(threshold)
    else:
        # copied to a GPU, a number would be waited for
        target = torch.full_like(threshold, target)
    error = (count - target) / target.clamp(min=1.0)
    return threshold * torch.exp(
        RATE * error.clamp(-MAX_RELATIVE_ERROR, MAX_RELATIVE_ERROR)
    )


def follow_cut(cut: torch.Tensor, batch_cut: torch.Tensor) -> torch.Tensor:
    """
    Averages the cuts of the batches geometrically, and jumps to the latest one where it is
    more than 10% away, so that the average never lags far behind.

    Args:
        cut: Running cut, positive scalar tensor.
        batch_cut: Smallest selected affinity of the batch, positive scalar tensor.
    """
    difference = (batch_cut / cut).log()
    rate = torch.where(difference.abs() > JUMP, torch.ones_like(cut), RATE)
    return cut * torch.exp(rate * difference)
