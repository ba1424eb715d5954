"""
Keys that order token-feature pairs: the larger key goes first, ties included.

A positive affinity has a 63-bit key, its 31 float32 bits (which order like the affinities)
above 32 bits for its inverted position. Keys are unique, and 0 is padding.

More than 2^32 positions are gone through in groups of features, within which positions fit.
"""

from collections.abc import Sequence

import torch

from sae_lens_alloc.allocation.sparse_activations import (
    PaddedActivations,
    SparseActivations,
)

# Of positive floats, which order like the floats.
VALUE_BITS = 31
POSITION_BITS = 63 - VALUE_BITS
MAX_POSITIONS = 2**POSITION_BITS
# The key of the smallest positive affinity is larger, and that of padding (0) is not.
LEAST_KEY = 1 << POSITION_BITS
# A batch's cut is within a few percent of the last one: this share of it is a safe bound.
BOUND_SHARE = 0.9
# Positions of a group: B and its features, rounded up to powers of two, multiply to 2 to this.
GROUP_BITS = POSITION_BITS


def bits_for(n: int) -> int:
    """Bits of the whole numbers below n."""
    return (n - 1).bit_length()


def feature_groups(n_tokens: int, n_features: int) -> list[slice]:
    """The features in groups whose positions a key holds: all of them, unless B * F > 2^32."""
    width = 2 ** max(GROUP_BITS - bits_for(n_tokens), 0)
    return [
        slice(start, min(start + width, n_features))
        for start in range(0, n_features, width)
    ]


def pair_keys(affinities: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """
    Keys that order positive affinities, and equal ones from the lowest position on.

    Args:
        affinities: Positive, float32 of shape (n,).
        positions: token * F + feature, int64 of shape (n,), below 2^32.
    """
    bits = affinities.view(torch.int32).long()
    return (bits << POSITION_BITS) | (MAX_POSITIONS - 1 - positions)


def pairs_of_keys(
    keys: Sequence[torch.Tensor],
    groups: Sequence[slice],
    shape: tuple[int, int],
    n_places: int,
) -> PaddedActivations:
    """
    The pairs of the `n_places` largest keys, in row order and padded.

    Args:
        keys: Keys of each group of features, in any order, int64 of shape (n,). Positions
            count within the group.
        groups: The groups, as `feature_groups` gives them.
        shape: (number of tokens B, number of features F).
        n_places: At most as many as there are keys.
    """
    all_positions, all_bits = [], []
    for group_keys, group in zip(keys, groups, strict=True):
        width = group.stop - group.start
        positions = MAX_POSITIONS - 1 - (group_keys & (MAX_POSITIONS - 1))
        if width < shape[1]:
            tokens = positions // width
            features = positions - tokens * width + group.start
            positions = tokens * shape[1] + features
        all_positions.append(positions)
        all_bits.append(group_keys >> POSITION_BITS)
    positions, bits = joined(all_positions), joined(all_bits)
    if len(bits) > n_places:
        # of equal affinities the first position goes first, in whatever group it is
        positions, order = positions.where(bits > 0, shape[0] * shape[1]).sort()
        best = bits[order].argsort(descending=True, stable=True)[:n_places]
        positions, bits = positions[best], bits[order][best]
    return padded_pairs(positions, bits.int().view(torch.float32), bits > 0, shape)


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.cat`, which would copy one alone."""
    return torch.cat([*parts]) if len(parts) > 1 else parts[0]


def padded_pairs(
    positions: torch.Tensor,
    values: torch.Tensor,
    is_real: torch.Tensor,
    shape: tuple[int, int],
) -> PaddedActivations:
    """
    Pairs in row order. Padding comes last, and repeats the last position of the batch with a
    value of 0.

    Args:
        positions: token * F + feature in any order, int64 of shape (N,); of padding anything.
        values: Affinities of shape (N,).
        is_real: Boolean mask of shape (N,), false where there is no pair.
        shape: (number of tokens B, number of features F).
    """
    end = shape[0] * shape[1]
    positions = positions.where(is_real, end)
    if end < 2**31:  # a GPU sorts numbers of 32 bits in half the passes
        positions = positions.int()
    positions, order = positions.sort()
    is_real = is_real[order]
    positions = positions.clamp(max=end - 1).long()
    tokens = positions // shape[1]
    places = SparseActivations(
        tokens,
        positions % shape[1],
        values[order].where(is_real, 0.0),
        shape,
    )
    return PaddedActivations(places, is_real)
