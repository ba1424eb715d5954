"""Positions of the affinities that are large enough to be considered."""

import torch


def candidate_positions(
    affinities: torch.Tensor, bounds: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Positions of the affinities above the bound of their feature, ordered by token and then
    by feature.

    Args:
        affinities: Shape (B, f).
        bounds: Shape (f,), or one number.

    Returns:
        Token indices and feature indices, both int64 of shape (n,).
    """
    flat = _true_positions((affinities > bounds).flatten())
    n_features = affinities.shape[1]
    tokens = flat // n_features
    return tokens, flat - tokens * n_features


def _true_positions(mask: torch.Tensor) -> torch.Tensor:
    """Dense equivalent: `mask.nonzero().squeeze(1)` of a flat boolean mask."""
    if mask.device.type != "cpu" or mask.numel() % 8 != 0:
        return mask.nonzero().squeeze(1)
    # torch scans one element at a time. Few of the bytes are set, so look at eight at once
    words = mask.view(torch.int64).nonzero().squeeze(1)
    in_word = mask.view(-1, 8)[words].nonzero()
    return words[in_word[:, 0]] * 8 + in_word[:, 1]
