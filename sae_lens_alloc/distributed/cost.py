"""What ranks send in a training step, in bytes: the formula of docs/distributed.md."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sae_lens_alloc.distributed.largest import DIGIT_BITS

FLOAT, INT = 4, 8  # bytes of a float32 and of an int64
VALUE_BITS = 31  # of a positive float32


@dataclass(frozen=True)
class Step:
    """
    A training step, as far as its messages depend on it.

    Args:
        n_tokens: Tokens B of the batch of all ranks.
        d_in: Input dimension.
        n_features: Features F of all ranks.
        rule: Who allocates.
        has_margin: Whether Mutual Choice has a margin.
        k_aux: Features per token in the auxiliary loss, 0 without one or where no feature is
            flagged.
        n_inner_levels: Nested reconstructions beside that of all features.
        subtracts_b_dec: Whether b_dec is subtracted from the encoder inputs.
        renews_flags: Whether features are flagged for the auxiliary loss, as at every tenth
            step.
        fits_law: Whether the Zipf law is fitted for that.
        d_out: Output dimension of a transcoder, None for an SAE.
    """

    n_tokens: int
    d_in: int
    n_features: int
    rule: Literal["mutual", "feature"] = "mutual"
    has_margin: bool = True
    k_aux: int = 0
    n_inner_levels: int = 0
    subtracts_b_dec: bool = True
    renews_flags: bool = False
    fits_law: bool = True
    d_out: int | None = None


@dataclass(frozen=True)
class Message:
    """
    What all ranks send each other at once.

    Args:
        what: What it is.
        kind: "sum" of tensors of the same size, or "gather" of a part from each.
        n_bytes: Bytes of this rank's tensor.
    """

    what: str
    kind: Literal["sum", "gather"]
    n_bytes: int

    def sent(self, n_ranks: int) -> float:
        """Bytes that each rank sends where they are passed on in a ring, as NCCL does."""
        others = n_ranks - 1
        return self.n_bytes * (2 * others / n_ranks if self.kind == "sum" else others)


def bytes_per_step(step: Step, n_ranks: int) -> float:
    """Bytes that each of the ranks sends in a step, the batch of activations included."""
    return sum(message.sent(n_ranks) for message in messages(step, n_ranks))


def messages(step: Step, n_ranks: int) -> list[Message]:
    """
    The messages of a step with float32 weights. None grows with d_in * F: but for densities,
    which are one number a feature, none grows with F.
    """
    largest_shard = -(-step.n_features // n_ranks)
    densities = Message("densities", "gather", largest_shard * FLOAT)
    n_sets = 1 + step.n_inner_levels + (step.k_aux > 0)
    own_tokens = step.n_tokens // n_ranks
    d_row, d_out = step.d_in + (step.d_out or 0), step.d_out or step.d_in
    found = [
        Message("activations", "gather", own_tokens * d_row * FLOAT),
        Message("reconstructions", "sum", n_sets * step.n_tokens * d_out * FLOAT),
        Message("gradient norm", "sum", FLOAT),
    ]
    if step.subtracts_b_dec:
        found.append(Message("gradient of b_dec", "sum", step.d_in * FLOAT))
    if step.rule == "mutual":
        found.append(Message("selection", "sum", _selection_bytes(step)))
    else:
        found += [densities, Message("demand", "sum", INT)]
    if step.k_aux:
        best = step.n_tokens * step.k_aux * 2 * FLOAT
        found.append(Message("auxiliary pairs", "gather", best))
    if step.renews_flags:
        found.append(Message("flagged features", "sum", INT))
        found += [densities] * step.fits_law
    return found


def _selection_bytes(step: Step) -> int:
    """Bytes that Mutual Choice sums over ranks: the digits of two limits, and a few numbers."""
    position_bits = (step.n_tokens * step.n_features - 1).bit_length()
    n_digits = sum(map(_n_digits, (VALUE_BITS, position_bits)))
    # how many candidates; where the margin begins and ends; the cut
    numbers = INT + 2 * FLOAT + FLOAT
    if step.has_margin:
        numbers += FLOAT + 2 * FLOAT  # the margin's cut; the price of a place
    return 2 * n_digits * INT + numbers


def _n_digits(n_bits: int) -> int:
    """Values of all digits of a number of so many bits."""
    shifts: Sequence[int] = range(0, n_bits, DIGIT_BITS)
    return sum(2 ** min(DIGIT_BITS, n_bits - shift) for shift in shifts)
