"""Affinities in tiles that never leave the registers, for the kernels that select from them."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from sae_lens_alloc.ops.backend import is_interpreted
from sae_lens_alloc.ops.encoder_tensors import EncoderTensors

# A tile twice as large spills registers (ptxas for sm_90).
TOKENS_PER_TILE = 128
FEATURES_PER_TILE = 64
# Bytes of one row of the tiles that are multiplied.
STEP_BYTES = 128
WARPS = 8
STAGES = 3
# Programs for each multiprocessor. Each takes many tiles, so that a launch with nothing to do
# ends at once.
PROGRAMS_PER_PROCESSOR = 2


class EncoderArguments(NamedTuple):
    """EncoderTensors as kernels take them: their first argument. `scale` may be None."""

    x: Any
    W_enc: Any
    b_enc: Any
    scale: Any
    n_tokens: Any
    n_features: Any
    d_in: Any
    x_token_stride: Any
    x_input_stride: Any
    W_input_stride: Any
    W_feature_stride: Any


def encoder_arguments(encoder: EncoderTensors) -> EncoderArguments:
    """The first argument of every kernel that encodes."""
    return EncoderArguments(
        encoder.x,
        encoder.W_enc,
        encoder.b_enc,
        encoder.scale,
        *encoder.shape,
        encoder.x.shape[1],
        *encoder.x.stride(),
        *encoder.W_enc.stride(),
    )


def tile_options(encoder: EncoderTensors) -> dict[str, Any]:
    """The constants of every kernel that encodes, and how it is launched."""
    return {
        # Triton's interpreter multiplies the bits of bfloat16 numbers
        "IN_FLOAT32": is_interpreted(),
        "PRECISION": product_precision(),
        "TOKENS": TOKENS_PER_TILE,
        "FEATURES": FEATURES_PER_TILE,
        "INPUTS": STEP_BYTES // encoder.x.element_size(),
        "num_warps": WARPS,
        "num_stages": STAGES,
    }


def n_tiles(encoder: EncoderTensors) -> int:
    """Tiles of all tokens and features."""
    n_tokens, n_features = encoder.shape
    return triton.cdiv(n_tokens, TOKENS_PER_TILE) * triton.cdiv(
        n_features, FEATURES_PER_TILE
    )


def n_programs(device: torch.device) -> int:
    """How many programs share the tiles of a launch."""
    if device.type != "cuda":
        return PROGRAMS_PER_PROCESSOR
    properties = torch.cuda.get_device_properties(device)
    return PROGRAMS_PER_PROCESSOR * properties.multi_processor_count


def product_precision() -> str:
    """Float32 products in TF32 where torch's own setting allows that for its products."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def true_places(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Ascending indices of the true entries of a mask of shape (n,), int64 with places for n of
    which only the first mean anything, and how many these are, int64 of shape ().
    """
    indices = torch.arange(len(mask), device=mask.device)
    counts = mask.cumsum(0)
    # the others go to a place of their own before the first
    found = indices.new_zeros(len(mask) + 1).scatter_(0, counts * mask, indices)
    return found[1:], counts[-1]


@triton.jit
def affinity_tile(
    encoder,
    token_tile,
    feature_tile,
    IN_FLOAT32: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """
    Tokens and features of a tile, which of them exist, and their affinities, float32 of shape
    (TOKENS, FEATURES).
    """
    tokens = token_tile * TOKENS + tl.arange(0, TOKENS)
    features = feature_tile * FEATURES + tl.arange(0, FEATURES)
    is_token = tokens < encoder.n_tokens
    is_feature = features < encoder.n_features
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
    return tokens, features, is_token, is_feature, affinities


@triton.jit
def product_tile(
    encoder,
    tokens,
    features,
    is_token,
    is_feature,
    IN_FLOAT32: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Products x W_enc of some tokens and features, float32 of shape (TOKENS, FEATURES)."""
    # 64 bits throughout: W_enc may have more than 2^31 elements, in whatever layout
    x_rows = tokens.to(tl.int64)[:, None] * encoder.x_token_stride
    W_columns = features.to(tl.int64)[None, :] * encoder.W_feature_stride
    products = tl.zeros((TOKENS, FEATURES), dtype=tl.float32)
    for start in range(0, encoder.d_in, INPUTS):
        inputs = start + tl.arange(0, INPUTS)
        is_input = inputs < encoder.d_in
        places = inputs.to(tl.int64)
        x = tl.load(
            encoder.x + x_rows + places[None, :] * encoder.x_input_stride,
            mask=is_token[:, None] & is_input[None, :],
            other=0.0,
        )
        W_enc = tl.load(
            encoder.W_enc + places[:, None] * encoder.W_input_stride + W_columns,
            mask=is_input[:, None] & is_feature[None, :],
            other=0.0,
        )
        if IN_FLOAT32:
            x = x.to(tl.float32)
            W_enc = W_enc.to(tl.float32)
        products = tl.dot(x, W_enc, products, input_precision=PRECISION)
    return products


@triton.jit
def affinities_of_products(products, encoder, features, is_feature):
    """Adds the bias of the features and applies their scale, in that order."""
    b_enc = tl.load(encoder.b_enc + features, mask=is_feature, other=0.0)
    affinities = products + b_enc.to(tl.float32)[None, :]
    if encoder.scale is not None:
        scale = tl.load(encoder.scale + features, mask=is_feature, other=0.0)
        affinities = affinities * scale.to(tl.float32)[None, :]
    return affinities


@triton.jit
def places_in_buffer(collected, per_row, count_ptr, capacity):
    """
    Places for what a tile collects, and counts it: one for the tile, one in it for each row,
    one in that for each pair.
    """
    total = tl.sum(per_row, axis=0)
    first = tl.atomic_add(count_ptr, total.to(tl.int64), sem="relaxed")
    first = tl.minimum(first, capacity).to(tl.int32)
    row_first = first + tl.cumsum(per_row, axis=0) - per_row
    return row_first[:, None] + tl.cumsum(collected, axis=1) - collected


@triton.jit
def add_counts(counts_ptr, counted, features, is_feature):
    """Adds on how many tokens of a tile each feature was counted to int64 counts."""
    counts = tl.sum(counted.to(tl.int32), axis=0)
    tl.atomic_add(
        counts_ptr + features,
        counts.to(tl.int64),
        mask=is_feature & (counts > 0),
        sem="relaxed",
    )
