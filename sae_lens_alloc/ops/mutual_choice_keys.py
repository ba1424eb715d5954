"""What the selection of Mutual Choice asks of the kernels that give it keys."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from sae_lens_alloc.ops.encoder_tensors import EncoderTensors
from sae_lens_alloc.ops.pair_keys import LEAST_KEY, POSITION_BITS

DIGIT_BITS = 16
N_DIGITS = 2**DIGIT_BITS
# The first digit is an affinity's exponent and 7 bits more, so a bucket of it is less than
# 1% wide: the later ones matter only where a batch has ties by the thousand.
SHIFTS = (48, 32, 16, 0)


@dataclass(frozen=True)
class CollectedKeys:
    """
    Args:
        keys: The keys that reach a bound, in any order and then zeros, int64 of shape
            (capacity,).
        n_reached: How many keys reach the bound, int64 of shape ().
        is_complete: Boolean of shape (), false where keys did not fit, or where what they are
            computed from did not: then nothing but that is known.
        above: On how many tokens each feature's affinity is positive and exceeds its
            threshold, int64 of shape (F,). None where that was not asked.
    """

    keys: torch.Tensor
    n_reached: torch.Tensor
    is_complete: torch.Tensor
    above: torch.Tensor | None


class KeyEncoder(EncoderTensors, ABC):
    """The keys (see pair_keys.py) of positive affinities, of which there are at most 2^32."""

    def collect_guess(
        self,
        guess: torch.Tensor | None,
        capacity: int,
        thresholds: torch.Tensor | None,
    ) -> CollectedKeys:
        """
        Collects the keys of the affinities that reach a guess.

        Args:
            guess: Scalar tensor, or None to collect all positive ones.
            capacity: Places for keys.
            thresholds: Thresholds of the features, shape (F,), or None not to count.
        """
        device = self.x.device
        bound = torch.full((), LEAST_KEY, dtype=torch.int64, device=device)
        if guess is not None:
            bits = guess.detach().float().view(torch.int32).long()
            bound = (bits << POSITION_BITS).clamp(min=LEAST_KEY)
        never = torch.zeros((), dtype=torch.bool, device=device)
        return self.collect(bound, never, capacity, thresholds)

    @abstractmethod
    def collect(
        self,
        bound: torch.Tensor,
        done: torch.Tensor,
        capacity: int,
        thresholds: torch.Tensor | None = None,
    ) -> CollectedKeys:
        """
        Dense equivalent: `keys[keys >= bound]`, in any order.

        Args:
            bound: Smallest key to collect, int64 of shape ().
            done: Boolean of shape (). Where it is true nothing is collected or counted.
            capacity: Places for keys.
            thresholds: Thresholds of the features, shape (F,), or None not to count.
        """

    @abstractmethod
    def histogram(
        self, prefix: torch.Tensor, shift: int, done: torch.Tensor
    ) -> torch.Tensor:
        """
        Counts the digit at `shift` of the keys whose higher digits are those of `prefix`.

        Args:
            prefix: int64 of shape ().
            shift: Position of the digit in bits.
            done: Boolean of shape (). Where it is true nothing is counted.

        Returns:
            int64 of shape (2^16,).
        """

    @abstractmethod
    def find_digit(
        self,
        counts: torch.Tensor,
        bound: torch.Tensor,
        rank: torch.Tensor,
        done: torch.Tensor,
        shift: int,
        spare: int,
    ) -> None:
        """
        One more digit of the lower bound, in place: that of the `rank`-th largest of the keys
        counted. Where fewer were counted, the bound stays below all of them.

        Args:
            counts: Keys by digit, int64 of shape (2^16,).
            bound: The digits found so far, int64 of shape ().
            rank: Which of the counted keys is sought, from 1, int64 of shape (). It becomes its
                rank among those of its digit.
            done: Boolean of shape (). Where it is true the bound is good already and all stays.
            shift: Position of the digit in bits.
            spare: So many more keys than wanted may reach the bound.
        """
