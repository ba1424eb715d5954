"""Encoding whose epilogue keeps candidates only, so that no affinity is written to memory."""

import torch
import triton
import triton.language as tl
from typing_extensions import override

from sae_lens_alloc.ops.backend import is_interpreted
from sae_lens_alloc.ops.key_selection import N_DIGITS, KeyEncoder

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


class TritonKeyEncoder(KeyEncoder):
    """`KeyEncoder` by Triton kernels; on CPU where Triton interprets them."""

    @override
    def collect(
        self, bound: torch.Tensor, done: torch.Tensor, capacity: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys = torch.empty(capacity, dtype=torch.int64, device=self.x.device)
        count = torch.zeros((), dtype=torch.int64, device=self.x.device)
        self._launch(bound, done, keys, count, capacity, shift=None)
        return keys, count

    @override
    def histogram(
        self, prefix: torch.Tensor, shift: int, done: torch.Tensor
    ) -> torch.Tensor:
        counts = torch.zeros(N_DIGITS, dtype=torch.int64, device=self.x.device)
        self._launch(prefix, done, counts, counts, 0, shift)
        return counts

    def _launch(
        self,
        bound: torch.Tensor,
        done: torch.Tensor,
        out: torch.Tensor,
        count: torch.Tensor,
        capacity: int,
        shift: int | None,
    ) -> None:
        x, W_enc = self.x, self.W_enc
        n_tiles = triton.cdiv(len(x), TOKENS_PER_TILE) * triton.cdiv(
            W_enc.shape[1], FEATURES_PER_TILE
        )
        encode_keys_kernel[(min(n_tiles, _n_programs(x.device)),)](
            x,
            W_enc,
            self.b_enc,
            self.b_enc if self.scale is None else self.scale,
            bound,
            done.to(torch.int32),
            out,
            count,
            len(x),
            W_enc.shape[1],
            x.shape[1],
            capacity,
            x.stride(0),
            x.stride(1),
            W_enc.stride(0),
            W_enc.stride(1),
            HAS_SCALE=self.scale is not None,
            SHIFT=-1 if shift is None else shift,
            # Triton's interpreter multiplies the bits of bfloat16 numbers
            IN_FLOAT32=is_interpreted(),
            PRECISION=_product_precision(),
            TOKENS=TOKENS_PER_TILE,
            FEATURES=FEATURES_PER_TILE,
            INPUTS=STEP_BYTES // x.element_size(),
            num_warps=WARPS,
            num_stages=STAGES,
        )


def _n_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return PROGRAMS_PER_PROCESSOR
    properties = torch.cuda.get_device_properties(device)
    return PROGRAMS_PER_PROCESSOR * properties.multi_processor_count


def _product_precision() -> str:
    """Float32 products in TF32 where torch's own setting allows that for its products."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@triton.jit
def encode_keys_kernel(
    x_ptr,
    W_enc_ptr,
    b_enc_ptr,
    scale_ptr,
    bound_ptr,
    done_ptr,
    out_ptr,
    count_ptr,
    n_tokens,
    n_features,
    d_in,
    capacity,
    x_token_stride,
    x_input_stride,
    W_input_stride,
    W_feature_stride,
    HAS_SCALE: tl.constexpr,
    SHIFT: tl.constexpr,  # of the digit to count, -1 to collect
    IN_FLOAT32: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Computes affinities tile by tile, and collects or counts the keys of the positive ones."""
    # Keys are compared by their halves, which need half the registers.
    bound = tl.load(bound_ptr)
    bound_bits = (bound >> 32).to(tl.int32)
    bound_low = (bound & 0xFFFFFFFF).to(tl.uint32)
    n_token_tiles = tl.cdiv(n_tokens, TOKENS)
    n_tiles = n_token_tiles * tl.cdiv(n_features, FEATURES)
    n_tiles = tl.where(tl.load(done_ptr) != 0, 0, n_tiles)
    # Tiles of the same features follow each other: the tokens fit into the L2 cache, the
    # weights need not, and are read once.
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        tokens = (tile % n_token_tiles) * TOKENS + tl.arange(0, TOKENS)
        features = (tile // n_token_tiles) * FEATURES + tl.arange(0, FEATURES)
        is_token = tokens < n_tokens
        is_feature = features < n_features
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
        bits = affinities.to(tl.int32, bitcast=True)
        # modulo 2^32, which positions are below
        positions = tokens[:, None] * n_features + features[None, :]
        low = ~positions.to(tl.uint32, bitcast=True)
        is_pair = (affinities > 0) & is_token[:, None] & is_feature[None, :]
        if SHIFT >= 0:
            if SHIFT >= 32:
                digits = (bits >> (SHIFT - 32)) & 0xFFFF
                counted = is_pair
                if SHIFT == 32:
                    counted = counted & ((bits >> 16) == (bound_bits >> 16))
            else:
                digits = (low >> SHIFT).to(tl.int32) & 0xFFFF
                counted = is_pair & (bits == bound_bits)
                if SHIFT == 0:
                    counted = counted & ((low >> 16) == (bound_low >> 16))
            ones = tl.full((TOKENS, FEATURES), 1, dtype=tl.int64)
            tl.atomic_add(out_ptr + digits, ones, mask=counted, sem="relaxed")
        else:
            reach = (bits > bound_bits) | ((bits == bound_bits) & (low >= bound_low))
            collected = (is_pair & reach).to(tl.int32)
            # one place for the tile, one in it for each row, one in that for each pair
            per_row = tl.sum(collected, axis=1)
            total = tl.sum(per_row, axis=0)
            if total > 0:
                first = tl.atomic_add(count_ptr, total.to(tl.int64), sem="relaxed")
                first = tl.minimum(first, capacity).to(tl.int32)
                row_first = first + tl.cumsum(per_row, axis=0) - per_row
                places = row_first[:, None] + tl.cumsum(collected, axis=1) - collected
                tl.store(
                    out_ptr + places,
                    (bits.to(tl.int64) << 32) | low.to(tl.int64),
                    mask=(collected != 0) & (places < capacity),
                )
