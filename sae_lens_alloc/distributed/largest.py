"""The n-th largest of numbers that are spread over ranks, by its digits."""

import torch

from sae_lens_alloc.distributed.ranks import Ranks

DIGIT_BITS = 11


def nth_largest(
    numbers: torch.Tensor,
    counts: torch.Tensor,
    taken: torch.Tensor,
    n_bits: int,
    ranks: Ranks,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    For each of T questions the n-th largest number of all ranks, and how many are larger. One
    small sum over ranks is sent for every 11 bits, and no device is asked anything.

    Args:
        numbers: Whole numbers from 0 to 2^n_bits - 1 of this rank, int64 of shape (N,).
        counts: Which numbers count in each question, bool of shape (T, N).
        taken: Which number is sought, from 1, int64 of shape (T,).
        n_bits: Bits of the numbers.
        ranks: The ranks.

    Returns:
        The numbers, and how many of those that count are larger, both int64 of shape (T,). Where
        fewer than n count, the number is 0.
    """
    found = torch.zeros_like(taken)
    left = taken
    for shift in reversed(range(0, n_bits, DIGIT_BITS)):
        n_digits = 2 ** min(DIGIT_BITS, n_bits - shift)
        digits = (numbers >> shift) & (n_digits - 1)
        histogram = taken.new_zeros(len(taken), n_digits)
        histogram.scatter_add_(1, digits.expand(counts.shape), counts.long())
        at_least = ranks.sum(histogram).flip(1).cumsum(1).flip(1)
        digit = ((at_least >= left[:, None]).sum(1) - 1).clamp(min=0)
        above = at_least.gather(1, (digit + 1).clamp(max=n_digits - 1)[:, None])[:, 0]
        left = left - above.where(digit < n_digits - 1, 0)
        found = (found << DIGIT_BITS) | digit
        counts = counts & (digits == digit[:, None])
    return found, taken - left
