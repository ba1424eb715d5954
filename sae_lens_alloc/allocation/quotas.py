"""Whole numbers of tokens from fractional quotas, exact in the long run."""

import torch


def take_whole_quotas(quotas: torch.Tensor, carry: torch.Tensor) -> torch.Tensor:
    """
    Pays out the whole part of what each feature is owed and carries the remainder to the
    next batch, in place, so that after T batches feature j was paid T * m_j to within one.

    Args:
        quotas: Fractional quotas m_j of this batch, shape (F,).
        carry: Remainders in [0, 1), shape (F,). Changed in place.

    Returns:
        Integer quotas n_j, int64 of shape (F,).
    """
    carry += quotas.to(carry.dtype)
    whole = carry.floor()
    carry -= whole
    return whole.long()
