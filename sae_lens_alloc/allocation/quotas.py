"""Whole numbers of tokens from fractional quotas, exact in the long run."""

import math

import torch

# Largest share of a batch's tokens for one feature, unless a config says otherwise.
MAX_DENSITY = 0.6


def most_whole_quotas(total: float, n_features: int) -> int:
    """
    A limit for the whole quotas of a batch that remainders of random phase never reach in
    practice: these make the sum vary by sqrt(F) / 2.

    Args:
        total: Sum of the fractional quotas.
        n_features: Number of features F.
    """
    return math.ceil(total) + 4 * math.isqrt(n_features)


def take_whole_quotas(
    quotas: torch.Tensor, carry: torch.Tensor, at_most: int
) -> torch.Tensor:
    """
    Pays out the whole part of what each feature is owed and carries the remainder to the
    next batch, in place, so that after T batches feature j was paid T * m_j to within one.

    Args:
        quotas: Fractional quotas m_j of this batch, shape (F,).
        carry: Remainders, shape (F,), in [0, 1) unless the limit was met. Changed in place.
        at_most: Limit of the sum of what is paid out. What goes beyond it is paid out in one
            of the next batches.

    Returns:
        Integer quotas n_j, int64 of shape (F,).
    """
    carry += quotas.to(carry.dtype)
    whole = carry.floor().long()
    whole = whole.where(whole.cumsum(0) <= at_most, 0)
    carry -= whole
    return whole
