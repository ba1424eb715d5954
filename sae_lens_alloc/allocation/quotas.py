"""Whole numbers of tokens from fractional quotas, exact in the long run."""

import math

import torch

# Largest share of a batch's tokens for one feature, unless a config says otherwise.
MAX_DENSITY = 0.6


def most_whole_quotas(total: float, n_features: int) -> int:
    """
    A limit for the sum of the whole quotas of a batch. Random carries make that sum vary by
    sqrt(F) / 2, so in practice they never reach the limit.

    Args:
        total: Sum of the fractional quotas.
        n_features: Number of features F.
    """
    return math.ceil(total) + 4 * math.isqrt(n_features)


def take_whole_quotas(
    quotas: torch.Tensor, carry: torch.Tensor, at_most: int
) -> torch.Tensor:
    """
    Gives each feature the whole part of its quota plus its carry, and leaves the rest as its
    carry to the next batch. So after T batches feature j has had T * m_j tokens, to within one.

    Args:
        quotas: Fractional quotas m_j of this batch, shape (F,).
        carry: Carries, shape (F,), in [0, 1) unless the limit was reached. Changed in place.
        at_most: Limit of the sum of the whole quotas. What is beyond it stays in the carries.

    Returns:
        Integer quotas n_j, int64 of shape (F,).
    """
    carry += quotas.to(carry.dtype)
    whole = carry.floor().long()
    whole = whole.where(whole.cumsum(0) <= at_most, 0)
    carry -= whole
    return whole
