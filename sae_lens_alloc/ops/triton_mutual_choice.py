"""The keys of Mutual Choice by encoding whose epilogue keeps candidates only."""

import torch
import triton
import triton.language as tl
from typing_extensions import override

from sae_lens_alloc.ops.mutual_choice_keys import N_DIGITS, CollectedKeys, KeyEncoder
from sae_lens_alloc.ops.triton_affinities import (
    add_counts,
    affinity_tile,
    encoder_arguments,
    n_programs,
    n_tiles,
    places_in_buffer,
    tile_options,
)

# Digits that a program looks at together.
DIGITS_PER_BLOCK = 2048


class TritonKeyEncoder(KeyEncoder):
    """`KeyEncoder` by Triton kernels; on CPU where Triton interprets them."""

    @override
    def collect(
        self,
        bound: torch.Tensor,
        done: torch.Tensor,
        capacity: int,
        thresholds: torch.Tensor | None = None,
    ) -> CollectedKeys:
        keys = torch.zeros(capacity, dtype=torch.int64, device=self.x.device)
        count = keys.new_zeros(())
        above = None if thresholds is None else keys.new_zeros(self.shape[1])
        collect_keys_kernel[(min(n_tiles(self), n_programs(keys.device)),)](
            encoder_arguments(self),
            bound,
            done.view(torch.int8),
            keys,
            count,
            capacity,
            thresholds,
            above,
            **tile_options(self),
        )
        return CollectedKeys(keys, count, count <= capacity, above)

    @override
    def histogram(
        self, prefix: torch.Tensor, shift: int, done: torch.Tensor
    ) -> torch.Tensor:
        counts = torch.zeros(N_DIGITS, dtype=torch.int64, device=self.x.device)
        count_digits_kernel[(min(n_tiles(self), n_programs(counts.device)),)](
            encoder_arguments(self),
            prefix,
            done.view(torch.int8),
            counts,
            SHIFT=shift,
            **tile_options(self),
        )
        return counts

    @override
    def find_digit(
        self,
        counts: torch.Tensor,
        bound: torch.Tensor,
        rank: torch.Tensor,
        done: torch.Tensor,
        shift: int,
        spare: int,
    ) -> None:
        find_digit_kernel[(1,)](
            counts,
            bound,
            rank,
            done.view(torch.int8),
            spare,
            SHIFT=shift,
            DIGITS=N_DIGITS,
            BLOCK=DIGITS_PER_BLOCK,
        )


# Positions are below 2^32, and arithmetic modulo that; keys are compared by their halves, which
# need half the registers. Tiles of the same features follow each other: the tokens fit into
# the L2 cache, the weights need not, and are read once.


@triton.jit
def collect_keys_kernel(
    encoder,
    bound_ptr,
    done_ptr,
    keys_ptr,
    count_ptr,
    capacity,
    thresholds_ptr,  # None not to count what exceeds them
    above_ptr,
    IN_FLOAT32: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Computes affinities tile by tile, and collects the keys of the positive ones."""
    bound = tl.load(bound_ptr)
    bound_bits = (bound >> 32).to(tl.int32)
    bound_low = (bound & 0xFFFFFFFF).to(tl.uint32)
    n_token_tiles = tl.cdiv(encoder.n_tokens, TOKENS)
    n_tiles = n_token_tiles * tl.cdiv(encoder.n_features, FEATURES)
    n_tiles = tl.where(tl.load(done_ptr) != 0, 0, n_tiles)
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        tokens, features, is_token, is_feature, affinities = affinity_tile(
            encoder,
            tile % n_token_tiles,
            tile // n_token_tiles,
            IN_FLOAT32,
            PRECISION,
            TOKENS,
            FEATURES,
            INPUTS,
        )
        is_pair = (affinities > 0) & is_token[:, None] & is_feature[None, :]
        if thresholds_ptr is not None:
            thresholds = tl.load(thresholds_ptr + features, mask=is_feature, other=0.0)
            above = is_pair & (affinities > thresholds.to(tl.float32)[None, :])
            add_counts(above_ptr, above, features, is_feature)
        bits = affinities.to(tl.int32, bitcast=True)
        low = inverted_positions(tokens, features, encoder.n_features)
        reach = (bits > bound_bits) | ((bits == bound_bits) & (low >= bound_low))
        collected = (is_pair & reach).to(tl.int32)
        per_row = tl.sum(collected, axis=1)
        if tl.sum(per_row, axis=0) > 0:
            places = places_in_buffer(collected, per_row, count_ptr, capacity)
            tl.store(
                keys_ptr + places,
                (bits.to(tl.int64) << 32) | low.to(tl.int64),
                mask=(collected != 0) & (places < capacity),
            )


@triton.jit
def count_digits_kernel(
    encoder,
    prefix_ptr,
    done_ptr,
    counts_ptr,
    SHIFT: tl.constexpr,  # of the digit
    IN_FLOAT32: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Computes affinities tile by tile, and counts a digit of the keys of the positive ones."""
    prefix = tl.load(prefix_ptr)
    prefix_bits = (prefix >> 32).to(tl.int32)
    prefix_low = (prefix & 0xFFFFFFFF).to(tl.uint32)
    n_token_tiles = tl.cdiv(encoder.n_tokens, TOKENS)
    n_tiles = n_token_tiles * tl.cdiv(encoder.n_features, FEATURES)
    n_tiles = tl.where(tl.load(done_ptr) != 0, 0, n_tiles)
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        tokens, features, is_token, is_feature, affinities = affinity_tile(
            encoder,
            tile % n_token_tiles,
            tile // n_token_tiles,
            IN_FLOAT32,
            PRECISION,
            TOKENS,
            FEATURES,
            INPUTS,
        )
        counted = (affinities > 0) & is_token[:, None] & is_feature[None, :]
        bits = affinities.to(tl.int32, bitcast=True)
        if SHIFT >= 32:
            digits = (bits >> (SHIFT - 32)) & 0xFFFF
            if SHIFT == 32:
                counted = counted & ((bits >> 16) == (prefix_bits >> 16))
        else:
            low = inverted_positions(tokens, features, encoder.n_features)
            digits = (low >> SHIFT).to(tl.int32) & 0xFFFF
            counted = counted & (bits == prefix_bits)
            if SHIFT == 0:
                counted = counted & ((low >> 16) == (prefix_low >> 16))
        ones = tl.full((TOKENS, FEATURES), 1, dtype=tl.int64)
        tl.atomic_add(counts_ptr + digits, ones, mask=counted, sem="relaxed")


@triton.jit
def find_digit_kernel(
    counts_ptr,
    bound_ptr,
    rank_ptr,
    done_ptr,
    spare,
    SHIFT: tl.constexpr,
    DIGITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Goes down the counts from the largest digit on, to that of the key of the rank. One program."""
    if tl.load(done_ptr) == 0:
        rank = tl.load(rank_ptr)
        places = tl.arange(0, BLOCK)
        first = DIGITS - BLOCK
        above = rank - rank  # keys of the digits above the block
        counts = tl.load(counts_ptr + first + places)
        in_block = tl.sum(counts, axis=0)
        while (first > 0) & (above + in_block < rank):
            above += in_block
            first -= BLOCK
            counts = tl.load(counts_ptr + first + places)
            in_block = tl.sum(counts, axis=0)
        at_least = above + in_block - tl.cumsum(counts, axis=0) + counts
        n_enough = tl.sum((at_least >= rank).to(tl.int32), axis=0)
        is_digit = places == tl.maximum(n_enough - 1, 0)
        in_digit = tl.sum(tl.where(is_digit, counts, 0), axis=0)
        reached = tl.sum(tl.where(is_digit, at_least, 0), axis=0)
        rank -= reached - in_digit
        digit = (first + tl.maximum(n_enough - 1, 0)).to(tl.int64)
        tl.store(bound_ptr, tl.load(bound_ptr) | (digit << SHIFT))
        tl.store(rank_ptr, rank)
        is_good = (in_digit - rank <= spare) | (n_enough == 0)
        tl.store(done_ptr, is_good.to(tl.int8))


@triton.jit
def inverted_positions(tokens, features, n_features):
    """The low halves of the keys of a tile."""
    positions = tokens[:, None] * n_features + features[None, :]
    return ~positions.to(tl.uint32, bitcast=True)
