"""Each token's largest affinities among some of the features, a running few at a time."""

import torch
import triton
import triton.language as tl

from sae_lens_alloc.allocation.sparse_activations import PaddedActivations
from sae_lens_alloc.ops.encoder_tensors import EncoderTensors
from sae_lens_alloc.ops.pair_keys import padded_pairs
from sae_lens_alloc.ops.triton_affinities import (
    FEATURES_PER_TILE,
    TOKENS_PER_TILE,
    affinities_of_products,
    encoder_arguments,
    n_programs,
    product_tile,
    tile_options,
    true_places,
)

# Keys of a token that a program holds in its registers, and of all its tokens: twice as many
# tokens spill registers (ptxas for sm_90).
MAX_SLOTS = 256
MAX_HELD = 8192
# Slots without a key hold the least numbers, each another one.
LEAST = -(2**63)
MAX_KEY = 2**63 - 1


def topk_of_subset(
    encoder: EncoderTensors, subset: torch.Tensor, k: int
) -> PaddedActivations:
    """
    Selects for each token its `k` largest affinities among the features of the subset, negative ones
    too, without a question to the device: of equal ones those of the first features.

    An affinity has a 64-bit key, its float32 bits, made to order like signed floats, above its
    inverted feature. A program takes a tile of tokens and a share of the features of the subset,
    whose columns of W_enc it gathers, and keeps the k largest keys of each token in registers.
    The largest of all shares are the selection. Beyond 256 of a token, further launches go
    over the features of the subset again, for what is below the keys found so far; they end at once
    where there is nothing left.

    Args:
        encoder: What gives the affinities.
        subset: Boolean mask of the features to choose from, shape (F,).
        k: Features per token, at most F.

    Returns:
        B * k pairs, with padding where fewer than k features are in the subset.
    """
    n_tokens, n_features = encoder.shape
    features, n_in_subset = true_places(subset)
    below = torch.full(
        (n_tokens, 1), MAX_KEY, dtype=torch.int64, device=features.device
    )
    found: list[torch.Tensor] = []
    for n_found in range(0, k, MAX_SLOTS):
        n_wanted = min(MAX_SLOTS, k - n_found)
        if n_found > 0:
            below = found[-1][:, -1:].contiguous()
            n_in_subset = n_in_subset * (n_in_subset > n_found)
        keys = _largest_keys(encoder, features, n_in_subset, below, n_wanted)
        found.append(keys.topk(n_wanted, dim=1).values)
    keys = torch.cat(found, dim=1) if len(found) > 1 else found[0]
    chosen = n_features - 1 - (keys & 0xFFFFFFFF)
    tokens = torch.arange(n_tokens, device=keys.device)[:, None]
    return padded_pairs(
        (tokens * n_features + chosen).flatten(),
        _ordered_bits((keys >> 32).int()).view(torch.float32).flatten(),
        (keys >= LEAST + MAX_SLOTS).flatten(),
        encoder.shape,
    )


def _ordered_bits(bits: torch.Tensor) -> torch.Tensor:
    """The bits of floats as int32 that order like them, and back again."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _largest_keys(
    encoder: EncoderTensors,
    features: torch.Tensor,
    n_in_subset: torch.Tensor,
    below: torch.Tensor,
    k: int,
) -> torch.Tensor:
    """
    The `k` largest keys of each token and share of the features, int64 of shape (B, n * k).

    Args:
        encoder: What gives the affinities.
        features: Indices of the features of the subset, int64 of shape (F + 1,).
        n_in_subset: How many there are, int64 of shape ().
        below: What the keys of each token must be less than, int64 of shape (B, 1).
        k: At most MAX_SLOTS.
    """
    n_tokens, n_features = encoder.shape
    slots = triton.next_power_of_2(k)
    tokens = tokens_per_tile(slots)
    n_token_tiles = triton.cdiv(n_tokens, tokens)
    n_shares = max(
        min(
            n_programs(features.device) // n_token_tiles,
            triton.cdiv(n_features, FEATURES_PER_TILE),
        ),
        1,
    )
    keys = features.new_empty(n_tokens, n_shares * k)
    options = {**tile_options(encoder), "TOKENS": tokens}
    largest_keys_kernel[(n_token_tiles, n_shares)](
        encoder_arguments(encoder),
        features,
        n_in_subset,
        below,
        keys,
        k,
        LEAST=LEAST,
        SLOTS=slots,
        **options,
    )
    return keys


def tokens_per_tile(slots: int) -> int:
    """Tokens of a program that holds so many keys of each."""
    return min(TOKENS_PER_TILE, MAX_HELD // slots)


@triton.jit
def largest_keys_kernel(
    encoder,
    features_ptr,
    n_in_subset_ptr,
    below_ptr,
    keys_ptr,
    k,
    LEAST: tl.constexpr,
    SLOTS: tl.constexpr,  # k, rounded up to a power of two
    IN_FLOAT32: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Keeps the largest keys of a tile of tokens while it goes over its share of the features."""
    n_in_subset = tl.load(n_in_subset_ptr).to(tl.int32)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = tokens < encoder.n_tokens
    below = tl.load(below_ptr + tokens, mask=is_token, other=LEAST)
    slots = tl.arange(0, SLOTS)
    # slots beyond k are never the least
    empty = tl.where(slots < k, LEAST + slots.to(tl.int64), 0x7FFFFFFFFFFFFFFF)
    best = tl.zeros((TOKENS, SLOTS), dtype=tl.int64) + empty[None, :]
    for tile in range(
        tl.program_id(1), tl.cdiv(n_in_subset, FEATURES), tl.num_programs(1)
    ):
        places = tile * FEATURES + tl.arange(0, FEATURES)
        is_feature = places < n_in_subset
        features = tl.load(features_ptr + places, mask=is_feature, other=0).to(tl.int32)
        products = product_tile(
            encoder,
            tokens,
            features,
            is_token,
            is_feature,
            IN_FLOAT32,
            PRECISION,
            TOKENS,
            FEATURES,
            INPUTS,
        )
        affinities = affinities_of_products(products, encoder, features, is_feature)
        # of the two zeros, +0
        bits = (affinities + 0.0).to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        inverted = encoder.n_features - 1 - features
        keys = (bits.to(tl.int64) << 32) | inverted.to(tl.int64)[None, :]
        keys = tl.where(is_feature[None, :] & (keys < below[:, None]), keys, LEAST)
        largest = tl.max(keys, axis=1)
        least = tl.min(best, axis=1)
        # One key of each token at a time, of which few tiles but the first hold many. All
        # keys differ, and so do the slots.
        while tl.max((largest > least).to(tl.int32), axis=0) > 0:
            is_least = (best == least[:, None]) & (largest > least)[:, None]
            best = tl.where(is_least, largest[:, None], best)
            keys = tl.where(keys == largest[:, None], LEAST, keys)
            largest = tl.max(keys, axis=1)
            least = tl.min(best, axis=1)
    rows = tokens.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(
        keys_ptr + rows[:, None] * k + slots[None, :],
        best,
        mask=is_token[:, None] & (slots < k)[None, :],
    )
