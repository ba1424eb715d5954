"""The selection's keys by encoding whose epilogue keeps candidates only."""

import torch
import triton
import triton.language as tl
from typing_extensions import override

from sae_lens_alloc.ops.key_selection import N_DIGITS, KeyEncoder
from sae_lens_alloc.ops.triton_affinities import (
    FEATURES_PER_TILE,
    TOKENS_PER_TILE,
    affinity_tile,
    n_programs,
    places_in_buffer,
    tensor_arguments,
    tile_options,
)


class TritonKeyEncoder(KeyEncoder):
    """`KeyEncoder` by Triton kernels; on CPU where Triton interprets them."""

    @override
    def collect(
        self,
        bound: torch.Tensor,
        done: torch.Tensor,
        capacity: int,
        thresholds: torch.Tensor | None = None,
        above: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys = torch.empty(capacity, dtype=torch.int64, device=self.x.device)
        count = torch.zeros((), dtype=torch.int64, device=self.x.device)
        self._launch(bound, done, keys, count, capacity, None, thresholds, above)
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
        thresholds: torch.Tensor | None = None,
        above: torch.Tensor | None = None,
    ) -> None:
        n_tiles = triton.cdiv(self.shape[0], TOKENS_PER_TILE) * triton.cdiv(
            self.shape[1], FEATURES_PER_TILE
        )
        encode_keys_kernel[(min(n_tiles, n_programs(self.x.device)),)](
            *tensor_arguments(self),
            bound,
            done.to(torch.int32),
            out,
            count,
            capacity,
            # of no use where nothing is counted
            self.b_enc if thresholds is None else thresholds,
            count if above is None else above,
            SHIFT=-1 if shift is None else shift,
            COUNTS=thresholds is not None,
            **tile_options(self),
        )


@triton.jit
def encode_keys_kernel(
    x_ptr,
    W_enc_ptr,
    b_enc_ptr,
    scale_ptr,
    n_tokens,
    n_features,
    d_in,
    x_token_stride,
    x_input_stride,
    W_input_stride,
    W_feature_stride,
    bound_ptr,
    done_ptr,
    out_ptr,
    count_ptr,
    capacity,
    thresholds_ptr,
    above_ptr,
    SHIFT: tl.constexpr,  # of the digit to count, -1 to collect
    COUNTS: tl.constexpr,  # whether to count what exceeds the thresholds
    HAS_SCALE: tl.constexpr,
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
        affinities = affinity_tile(
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
            HAS_SCALE,
            IN_FLOAT32,
            PRECISION,
            TOKENS,
            FEATURES,
            INPUTS,
        )
        bits = affinities.to(tl.int32, bitcast=True)
        # modulo 2^32, which positions are below
        positions = tokens[:, None] * n_features + features[None, :]
        low = ~positions.to(tl.uint32, bitcast=True)
        is_pair = (affinities > 0) & is_token[:, None] & is_feature[None, :]
        if COUNTS:
            thresholds = tl.load(thresholds_ptr + features, mask=is_feature, other=0.0)
            above = is_pair & (affinities > thresholds.to(tl.float32)[None, :])
            n_above = tl.sum(above.to(tl.int32), axis=0)
            tl.atomic_add(
                above_ptr + features,
                n_above.to(tl.int64),
                mask=is_feature & (n_above > 0),
                sem="relaxed",
            )
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
            per_row = tl.sum(collected, axis=1)
            if tl.sum(per_row, axis=0) > 0:
                places = places_in_buffer(collected, per_row, count_ptr, capacity)
                tl.store(
                    out_ptr + places,
                    (bits.to(tl.int64) << 32) | low.to(tl.int64),
                    mask=(collected != 0) & (places < capacity),
                )
