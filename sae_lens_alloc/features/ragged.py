"""Runs of different lengths in one tensor."""

import torch


def places_of_runs(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """
    The places start, start + 1, ... of each run, one run after the other.

    Args:
        starts: First place of each run, int64 of shape (R,).
        lengths: Places in each run, int64 of shape (R,).

    Returns:
        int64 of shape (sum of lengths,).
    """
    before = lengths.cumsum(0) - lengths
    shifts = (starts - before).repeat_interleave(lengths)
    return shifts + torch.arange(len(shifts), device=shifts.device)


def offsets_of(lengths: torch.Tensor) -> torch.Tensor:
    """Where each run begins, and the end of the last one, int64 of shape (R + 1,)."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
