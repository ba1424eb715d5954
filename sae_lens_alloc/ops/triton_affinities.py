"""Affinities in tiles that never leave the registers, for the kernels that select from them."""

from typing import Any

import torch
import triton
import triton.language as tl

from sae_lens_alloc.ops.backend import is_interpreted
from sae_lens_alloc.ops.key_selection import EncoderTensors

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


def tensor_arguments(encoder: EncoderTensors) -> tuple[torch.Tensor | int, ...]:
    """The first arguments of every kernel that encodes."""
    x, W_enc, b_enc = encoder.x, encoder.W_enc, encoder.b_enc
    return (
        x,
        W_enc,
        b_enc,
        b_enc if encoder.scale is None else encoder.scale,
        len(x),
        W_enc.shape[1],
        x.shape[1],
        x.stride(0),
        x.stride(1),
        W_enc.stride(0),
        W_enc.stride(1),
    )


def tile_options(encoder: EncoderTensors) -> dict[str, Any]:
    """The constants of every kernel that encodes, and how it is launched."""
    return {
        "HAS_SCALE": encoder.scale is not None,
        # Triton's interpreter multiplies the bits of bfloat16 numbers
        "IN_FLOAT32": is_interpreted(),
        "PRECISION": _product_precision(),
        "TOKENS": TOKENS_PER_TILE,
        "FEATURES": FEATURES_PER_TILE,
        "INPUTS": STEP_BYTES // encoder.x.element_size(),
        "num_warps": WARPS,
        "num_stages": STAGES,
    }


def n_programs(device: torch.device) -> int:
    """How many programs share the tiles of a launch."""
    if device.type != "cuda":
        return PROGRAMS_PER_PROCESSOR
    properties = torch.cuda.get_device_properties(device)
    return PROGRAMS_PER_PROCESSOR * properties.multi_processor_count


def _product_precision() -> str:
    """Float32 products in TF32 where torch's own setting allows that for its products."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@triton.jit
def affinity_tile(
    x_ptr,
    W_enc_ptr,
    b_enc_ptr,
    scale_ptr,
    d_in,
    x_token_stride,
    x_input_stride,
    W_input_stride,
    W_feature_stride,
    tokens,
    features,
    is_token,
    is_feature,
    HAS_SCALE: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Affinities of some tokens and features, float32 of shape (TOKENS, FEATURES)."""
    products = tl.zeros((TOKENS, FEATURES), dtype=tl.float32)
    for start in range(0, d_in, INPUTS):
        inputs = start + tl.arange(0, INPUTS)
        x = tl.load(
            x_ptr
            + tokens.to(tl.int64)[:, None] * x_token_stride
            + inputs[None, :] * x_input_stride,
            mask=is_token[:, None] & (inputs < d_in)[None, :],
            other=0.0,
        )
        W_enc = tl.load(
            W_enc_ptr
            + inputs.to(tl.int64)[:, None] * W_input_stride
            + features[None, :] * W_feature_stride,
            mask=(inputs < d_in)[:, None] & is_feature[None, :],
            other=0.0,
        )
        if IN_FLOAT32:
            x = x.to(tl.float32)
            W_enc = W_enc.to(tl.float32)
        products = tl.dot(x, W_enc, products, input_precision=PRECISION)
    b_enc = tl.load(b_enc_ptr + features, mask=is_feature, other=0.0)
    affinities = products + b_enc.to(tl.float32)[None, :]
    if HAS_SCALE:
        scale = tl.load(scale_ptr + features, mask=is_feature, other=0.0)
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
