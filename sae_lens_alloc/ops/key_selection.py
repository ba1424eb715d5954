"""
Mutual Choice without a question to the device: exact, in a fixed number of launches of fixed
size, so that the host never waits for a count.

Every positive affinity has a 63-bit key, its float32 bits (which order like the affinities)
above its inverted position token * F + feature. Keys are unique, and the M largest keys are
the selection, ties included.

1. Collect the keys that reach a guess into a buffer of fixed capacity, and count them.
2. Where the count is between M and the capacity, the guess was good. Otherwise find, digit by
   digit from the top, a lower bound that at least M keys and at most a bufferful reach, and
   collect again. All of these launches are always made; they look at a flag on the device and
   end at once where the guess was good.
3. The M largest of the buffer, in row order. Where fewer than M affinities are positive, the
   last places hold padding.
"""

from dataclasses import dataclass

import torch

from sae_lens_alloc.allocation.sparse_activations import (
    PaddedActivations,
    SparseActivations,
)
from sae_lens_alloc.ops.backend import uses_triton

POSITION_BITS = 32
MAX_POSITIONS = 2**POSITION_BITS
# The key of the smallest positive affinity is larger, and that of padding (0) is not.
LEAST_KEY = 1 << POSITION_BITS
DIGIT_BITS = 16
N_DIGITS = 2**DIGIT_BITS
# The first digit is an affinity's exponent and 7 bits more, so a bucket of it is less than
# 1% wide: the later ones matter only where a batch has ties by the thousand.
SHIFTS = (48, 32, 16, 0)
# A batch's cut is within a few percent of the last one: this share of it is a safe bound.
BOUND_SHARE = 0.9
# Places for candidates per pair of the budget.
CAPACITY_FACTOR = 4
MIN_CAPACITY = 1024


@dataclass(frozen=True)
class EncoderTensors:
    """
    What gives the affinities a_ij = (x_i W_enc + b_enc)_j * scale_j of a batch. Products are
    accumulated in float32 whatever the dtype of the weights.

    Args:
        x: Encoder inputs of shape (B, d_in), of the dtype of W_enc.
        W_enc: Shape (d_in, F).
        b_enc: Shape (F,).
        scale: Decoder norms of shape (F,), or None.
    """

    x: torch.Tensor
    W_enc: torch.Tensor
    b_enc: torch.Tensor
    scale: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.x), self.W_enc.shape[1]

    def affinities(self) -> torch.Tensor:
        """All of them, float32 of shape (B, F): for the references of the kernels."""
        affinities = self.x.float() @ self.W_enc.float() + self.b_enc.float()
        return affinities if self.scale is None else affinities * self.scale.float()


class KeyEncoder(EncoderTensors):
    """The keys of positive affinities, of which there are at most B * F = 2^32."""

    def collect(
        self,
        bound: torch.Tensor,
        done: torch.Tensor,
        capacity: int,
        thresholds: torch.Tensor | None = None,
        above: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Dense equivalent: `keys[keys >= bound]`, in any order.

        Args:
            bound: Smallest key to collect, int64 of shape ().
            done: Boolean of shape (). Where it is true nothing is collected.
            capacity: Places for keys.
            thresholds: Thresholds of the features, shape (F,), or None not to count.
            above: int64 of shape (F,), to which is added on how many tokens each feature's
                affinity is positive and exceeds its threshold. Given with `thresholds`.

        Returns:
            The keys, int64 of shape (capacity,), of which those behind the count are
            undefined, and the count, int64 of shape (). It is larger than the capacity where
            keys were left out.
        """
        if thresholds is not None and above is not None:
            affinities = self.affinities()
            exceeds = (affinities > 0) & (affinities > thresholds) & ~done
            above += exceeds.sum(0)
        keys = self._all_keys()
        keys = keys[(keys >= bound) & ~done]
        buffer = keys.new_empty(capacity)
        n_stored = min(len(keys), capacity)
        buffer[:n_stored] = keys[:n_stored]
        return buffer, torch.full_like(bound, len(keys))

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
        digits = (self._all_keys() >> shift) - ((prefix >> shift) & ~(N_DIGITS - 1))
        digits = digits[(digits >= 0) & (digits < N_DIGITS) & ~done]
        return torch.bincount(digits, minlength=N_DIGITS)

    def _all_keys(self) -> torch.Tensor:
        affinities = self.affinities().flatten()
        positions = torch.arange(len(affinities), device=affinities.device)
        positive = affinities > 0
        return pair_keys(affinities[positive], positions[positive])


def key_encoder(
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    scale: torch.Tensor | None,
    x: torch.Tensor,
) -> KeyEncoder | None:
    """The kernels that encode to keys, None where the backend has none for such tensors."""
    tensors = tensors_for_kernels(W_enc, b_enc, scale, x)
    if tensors is None or len(x) * W_enc.shape[1] > MAX_POSITIONS:
        return None
    from sae_lens_alloc.ops.triton_select import TritonKeyEncoder

    return TritonKeyEncoder(*tensors)


def tensors_for_kernels(
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    scale: torch.Tensor | None,
    x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
    """The arguments of EncoderTensors, None where the backend has no kernels for them."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, W_enc = x.to(dtype), W_enc.to(dtype)
    if (
        not uses_triton(x.device)
        or x.dtype != W_enc.dtype
        or x.dtype not in (torch.float32, torch.bfloat16, torch.float16)
    ):
        return None
    return x, W_enc, b_enc, scale


def pair_keys(affinities: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """
    Keys that order positive affinities, and equal ones from the lowest position on.

    Args:
        affinities: Positive, float32 of shape (n,).
        positions: token * F + feature, int64 of shape (n,), below 2^32.
    """
    bits = affinities.view(torch.int32).long()
    return (bits << POSITION_BITS) | (MAX_POSITIONS - 1 - positions)


def pairs_of_keys(keys: torch.Tensor, shape: tuple[int, int]) -> PaddedActivations:
    """
    The pairs of some keys in row order. Padding, whose key is 0, comes last and repeats the
    last position of the batch with a value of 0.
    """
    positions, order = (MAX_POSITIONS - 1 - (keys & (MAX_POSITIONS - 1))).sort()
    keys = keys[order]
    positions = positions.clamp(max=shape[0] * shape[1] - 1)
    tokens = positions // shape[1]
    places = SparseActivations(
        tokens,
        positions - tokens * shape[1],
        (keys >> POSITION_BITS).int().view(torch.float32),
        shape,
    )
    return PaddedActivations(places, keys > 0)


def select_by_keys(
    encoder: KeyEncoder,
    budget: int,
    guess: torch.Tensor | None,
    thresholds: torch.Tensor | None = None,
) -> tuple[PaddedActivations, torch.Tensor | None]:
    """
    Selects the `budget` largest positive affinities, as `encode_and_count` does.

    Args:
        encoder: What gives the keys.
        budget: Number of pairs M, at least 1.
        guess: Guess of a lower bound of the smallest selected affinity, positive scalar
            tensor, or None. It only makes the selection faster.
        thresholds: Shape (F,), or None not to count.

    Returns:
        min(M, B * F) places for pairs, with padding where fewer affinities are positive; and
        on how many tokens each feature exceeds its threshold, int64 of shape (F,), or None.
    """
    n_positions = encoder.shape[0] * encoder.shape[1]
    budget = min(budget, n_positions)
    capacity = min(max(CAPACITY_FACTOR * budget, MIN_CAPACITY), n_positions)
    device = encoder.x.device
    bound = torch.full((), LEAST_KEY, dtype=torch.int64, device=device)
    never = torch.zeros((), dtype=torch.bool, device=device)
    if guess is not None:
        bits = guess.detach().float().view(torch.int32).long()
        bound = (bits << POSITION_BITS).clamp(min=LEAST_KEY)
    above = None
    if thresholds is not None:
        above = torch.zeros(encoder.shape[1], dtype=torch.int64, device=device)
    first, n_first = encoder.collect(bound, never, capacity, thresholds, above)
    good = (n_first >= budget) & (n_first <= capacity)

    done, bound = good, torch.zeros_like(bound)
    rank = torch.full_like(bound, budget)
    for shift in SHIFTS:
        counts = encoder.histogram(bound, shift, done)
        bound, rank, done = next_digit(
            counts, bound, rank, done, shift, capacity - budget
        )
    second, n_second = encoder.collect(bound.clamp(min=LEAST_KEY), good, capacity)

    keys = torch.where(good, first, second)
    is_stored = torch.arange(capacity, device=keys.device) < torch.where(
        good, n_first, n_second
    )
    best = torch.where(is_stored, keys, 0).topk(budget, sorted=False).values
    return pairs_of_keys(best, encoder.shape), above


def next_digit(
    counts: torch.Tensor,
    bound: torch.Tensor,
    rank: torch.Tensor,
    done: torch.Tensor,
    shift: int,
    spare: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    One more digit of the lower bound: that of the `rank`-th largest of the keys counted.

    Args:
        counts: Keys by digit, int64 of shape (2^16,).
        bound: The digits found so far, int64 of shape ().
        rank: Which of the counted keys is sought, from 1, int64 of shape ().
        done: Boolean of shape (): the bound is good already and stays.
        shift: Position of the digit in bits.
        spare: So many more keys than wanted may reach the bound.

    Returns:
        The new bound, rank and done. Where fewer than `rank` keys were counted the bound
        stays below all of them.
    """
    at_least = counts.flip(0).cumsum(0).flip(0)
    enough = at_least >= rank
    digit = (enough.sum() - 1).clamp(min=0)
    # `take`, since indexing by a scalar tensor would ask the device for it
    in_digit = counts.take(digit)
    new_rank = rank - (at_least.take(digit) - in_digit)
    is_good = (in_digit - new_rank <= spare) | ~enough[0]
    return (
        torch.where(done, bound, bound | (digit << shift)),
        torch.where(done, rank, new_rank),
        done | is_good,
    )
