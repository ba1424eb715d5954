"""The keys of Feature Choice by encoding whose epilogue keeps candidates and counts only."""

import torch
import triton
import triton.language as tl
from typing_extensions import override

from sae_lens_alloc.ops.feature_choice_keys import FeatureKeyEncoder
from sae_lens_alloc.ops.pair_keys import VALUE_BITS
from sae_lens_alloc.ops.triton_affinities import (
    FEATURES_PER_TILE,
    affinity_tile,
    encoder_arguments,
    n_programs,
    n_tiles,
    places_in_buffer,
    tile_options,
    true_places,
)


class TritonFeatureKeyEncoder(FeatureKeyEncoder):
    """`FeatureKeyEncoder` by Triton kernels; on CPU where Triton interprets them."""

    @override
    def collect(
        self,
        bounds: torch.Tensor,
        keys: torch.Tensor,
        count: torch.Tensor,
        features: torch.Tensor | None,
    ) -> torch.Tensor:
        counts = count.new_zeros(4, self.shape[1])
        collect_feature_keys_kernel[(min(n_tiles(self), n_programs(keys.device)),)](
            encoder_arguments(self),
            *((None,) * 3 if features is None else chosen_tiles(features)),
            bounds,
            self.thresholds,
            self.cut,
            keys,
            count,
            counts,
            len(keys),
            self.token_bits,
            VALUE_BITS=VALUE_BITS,
            **tile_options(self),
        )
        return counts

    @override
    def find_bounds(
        self, features: torch.Tensor, fewest: torch.Tensor, most: torch.Tensor
    ) -> torch.Tensor:
        bounds = torch.full_like(fewest, self.least_key)
        n_feature_tiles = triton.cdiv(self.shape[1], FEATURES_PER_TILE)
        find_feature_bounds_kernel[(min(n_feature_tiles, n_programs(bounds.device)),)](
            encoder_arguments(self),
            *chosen_tiles(features),
            fewest,
            most,
            bounds,
            self.token_bits,
            VALUE_BITS=VALUE_BITS,
            **tile_options(self),
        )
        return bounds


def chosen_tiles(
    features: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The tiles that a mask of shape (F,) leaves to be looked at. Whole tiles are, even for one
    feature: as part of another tile, its products might round differently.

    Returns:
        The mask as int8, and the indices of the tiles as `true_places` gives them.
    """
    n_tiles = triton.cdiv(len(features), FEATURES_PER_TILE)
    padded = features.new_zeros(n_tiles * FEATURES_PER_TILE)
    padded[: len(features)] = features
    is_chosen = padded.view(n_tiles, FEATURES_PER_TILE).any(1)
    return features.view(torch.int8), *true_places(is_chosen)


@triton.jit
def collect_feature_keys_kernel(
    encoder,
    chosen_ptr,  # None to look at all features
    tiles_ptr,
    n_tiles_ptr,
    bounds_ptr,
    thresholds_ptr,
    cut_ptr,
    keys_ptr,
    count_ptr,
    counts_ptr,
    capacity,
    token_bits,
    VALUE_BITS: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Computes affinities tile by tile, collects keys and counts by feature."""
    cut = tl.load(cut_ptr).to(tl.float32)
    token_mask = (1 << token_bits) - 1
    n_token_tiles = tl.cdiv(encoder.n_tokens, TOKENS)
    if chosen_ptr is None:
        n_tiles = n_token_tiles * tl.cdiv(encoder.n_features, FEATURES)
    else:
        n_tiles = n_token_tiles * tl.load(n_tiles_ptr).to(tl.int32)
    # in the order of collect_keys_kernel
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        feature_tile = tile // n_token_tiles
        if chosen_ptr is not None:
            feature_tile = tl.load(tiles_ptr + feature_tile).to(tl.int32)
        tokens, features, is_token, is_feature, affinities = affinity_tile(
            encoder,
            tile % n_token_tiles,
            feature_tile,
            IN_FLOAT32,
            PRECISION,
            TOKENS,
            FEATURES,
            INPUTS,
        )
        bits = affinities.to(tl.int32, bitcast=True)
        low = token_mask - tokens
        bounds = tl.load(bounds_ptr + features, mask=is_feature, other=0)
        thresholds = tl.load(thresholds_ptr + features, mask=is_feature, other=0.0)
        chosen = is_feature
        if chosen_ptr is not None:
            chosen &= tl.load(chosen_ptr + features, mask=is_feature, other=0) != 0
        positive = (affinities > 0) & is_token[:, None] & chosen[None, :]
        collected = positive & reaches(bits, low, bounds, token_bits, token_mask)

        above = positive & (affinities > thresholds.to(tl.float32)[None, :])
        demand = positive & (affinities > cut)
        # summed at once: a tile has fewer than 256 tokens, so a byte holds each
        packed = collected.to(tl.uint32) | (positive.to(tl.uint32) << 8)
        packed |= (above.to(tl.uint32) << 16) | (demand.to(tl.uint32) << 24)
        per_feature = tl.sum(packed, axis=0)
        for i in tl.static_range(4):
            counts = (per_feature >> (8 * i)) & 0xFF
            tl.atomic_add(
                counts_ptr + i * encoder.n_features + features,
                counts.to(tl.int64),
                mask=is_feature & (counts > 0),
                sem="relaxed",
            )

        collected = collected.to(tl.int32)
        per_row = tl.sum(collected, axis=1)
        if tl.sum(per_row, axis=0) > 0:
            places = places_in_buffer(collected, per_row, count_ptr, capacity)
            inverted = (encoder.n_features - 1 - features).to(tl.int64)
            of_features = inverted << (VALUE_BITS + token_bits)
            keys = (bits.to(tl.int64) << token_bits) | low.to(tl.int64)[:, None]
            tl.store(
                keys_ptr + places,
                of_features[None, :] | keys,
                mask=(collected != 0) & (places < capacity),
            )


@triton.jit
def find_feature_bounds_kernel(
    encoder,
    chosen_ptr,
    tiles_ptr,
    n_tiles_ptr,
    fewest_ptr,
    most_ptr,
    bounds_ptr,
    token_bits,
    VALUE_BITS: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Halves the interval of each feature's bound until a good one is found."""
    n_tiles = tl.load(n_tiles_ptr).to(tl.int32)
    token_mask = (1 << token_bits) - 1
    # A program has its features to itself, and goes over the tokens again and again.
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        feature_tile = tl.load(tiles_ptr + tile).to(tl.int32)
        features = feature_tile * FEATURES + tl.arange(0, FEATURES)
        is_feature = features < encoder.n_features
        chosen = tl.load(chosen_ptr + features, mask=is_feature, other=0) != 0
        fewest = tl.load(fewest_ptr + features, mask=is_feature, other=0)
        most = tl.load(most_ptr + features, mask=is_feature, other=0)
        # as many as wanted reach `low`, or more; fewer reach `high`
        low = tl.full((FEATURES,), 1, dtype=tl.int64) << token_bits
        high = tl.full((FEATURES,), (1 << VALUE_BITS) - 1, dtype=tl.int64) << token_bits
        high = tl.where(chosen, high, low + 1)
        while tl.max(high - low, axis=0) > 1:
            middle = low + (high - low) // 2
            reached = tl.zeros((FEATURES,), dtype=tl.int32)
            for token_tile in range(tl.cdiv(encoder.n_tokens, TOKENS)):
                tokens, _, is_token, _, affinities = affinity_tile(
                    encoder,
                    token_tile,
                    feature_tile,
                    IN_FLOAT32,
                    PRECISION,
                    TOKENS,
                    FEATURES,
                    INPUTS,
                )
                bits = affinities.to(tl.int32, bitcast=True)
                positive = (affinities > 0) & is_token[:, None]
                reach = positive & reaches(
                    bits, token_mask - tokens, middle, token_bits, token_mask
                )
                reached += tl.sum(reach.to(tl.int32), axis=0)
            enough = reached >= fewest
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
            high = tl.where(enough & (reached <= most), low + 1, high)
        tl.store(bounds_ptr + features, low, mask=is_feature)


@triton.jit
def reaches(bits, inverted_tokens, bounds, token_bits, token_mask):
    """Which keys of a tile reach their feature's bound, compared by their halves."""
    bound_bits = (bounds >> token_bits).to(tl.int32)[None, :]
    bound_low = (bounds & token_mask).to(tl.int32)[None, :]
    is_first = inverted_tokens[:, None] >= bound_low
    return (bits > bound_bits) | ((bits == bound_bits) & is_first)
