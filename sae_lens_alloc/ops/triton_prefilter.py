"""
Keys of Mutual Choice whose candidates bfloat16 products choose and float32 products decide.

With float32 weights, nearly all of the time goes into products of pairs that are nowhere near
the cut. In bfloat16 they take a fraction of that time, and tell which pairs can reach the
guess at all; the float32 dot products of these few are what is selected and counted by. Only
where the guess was not good does the selection fall back to float32 products of everything.
These are summed in another order: pairs whose affinities differ by a rounding error may then
change places. For the selection W_enc exists twice more, in bfloat16 and as its transpose.

**The bound.** Let x and w be a token's inputs and a feature's weights, d numbers each, p their
dot product as float32 gives it, and q that of their roundings to bfloat16. With u = 2^-8, the
unit roundoff of bfloat16, |p - q| <= c X W + 2^-100, where

    X = |x| + 2^-54 and W = |w| + 2^-54, with norms |x| and |w| as float32 gives them, times
    1 + 2^-23 d,
    c = 2 u + u^2 + 2^-20 d (float32 and tensor cores) + rounding of the bound itself.

*Proof*, for d <= 2^16. A number a becomes a' with |a' - a| <= u |a| + 2^-126: the second term
is for subnormal numbers, which a device may take for 0. That is at most u (|a| + 2^-118). Let
y and z be the vectors of the |x_i| + 2^-118 and |w_i| + 2^-118. From
|x_i' w_i' - x_i w_i| <= |x_i| |w_i' - w_i| + |w_i'| |x_i' - x_i| <= (2 u + u^2) y_i z_i and
Cauchy-Schwarz, the exact dot products differ by at most (2 u + u^2) |y| |z|; and
|y| <= |x| + 2^-110. The float32 sums of d terms differ from the exact ones by at most
2^-23 d |x| |w| for p (twice the textbook bound) and by 2^-21 d (1 + u)^2 |x| |w| for q, as if
tensor cores lost three bits more; both together stay below 2^-20 d |y| |z|. What products that
underflow lose is below 2^-108. Last, |x| is found from squares. What underflows there is
less than 2^-126 each, or 2^-55 in all of |x|; the sum and the root are right up to a factor
1 + 2^-23 d. QED.

The affinity is a = (p + b) s with s >= 0, rounded twice, and rounding does not change the order
of two numbers. So (q + c X W + 2^-100 + b) s, rounded the same, is at least a, and with the
minus sign at most a, without another slack. Where one of them is NaN or infinite, since numbers
near 2^128 overflow, nothing is known, and the pair is a candidate.
"""

import torch
import triton
import triton.language as tl
from typing_extensions import override

from sae_lens_alloc.ops.backend import backend_for
from sae_lens_alloc.ops.encoder_tensors import EncoderTensors
from sae_lens_alloc.ops.mutual_choice_keys import CollectedKeys
from sae_lens_alloc.ops.pair_keys import pair_keys
from sae_lens_alloc.ops.triton_affinities import (
    add_counts,
    affinities_of_products,
    encoder_arguments,
    n_programs,
    n_tiles,
    places_in_buffer,
    product_precision,
    product_tile,
    tile_options,
)
from sae_lens_alloc.ops.triton_mutual_choice import TritonKeyEncoder
from sae_lens_alloc.ops.triton_sparse import sampled_products

UNIT_ROUNDOFF = 2.0**-8
MAX_INPUTS = 2**16
LEAST_NORM = 2.0**-54
LEAST_ERROR = 2.0**-100
# Above all positions.
UNCERTAIN_BIT = 62


def relative_error(d_in: int) -> float:
    """The c of the bound."""
    bfloat16 = 2 * UNIT_ROUNDOFF + UNIT_ROUNDOFF**2
    return (bfloat16 + 2.0**-20 * d_in) * (1 + 2.0**-20)


def upper_norms(vectors: torch.Tensor, dim: int) -> torch.Tensor:
    """X or W of the bound, of the vectors along a dimension of a float32 matrix."""
    norms = torch.linalg.vector_norm(vectors, dim=dim)
    return norms * (1 + 2.0**-23 * vectors.shape[dim]) + LEAST_NORM


def can_prefilter(tensors: EncoderTensors) -> bool:
    """
    Whether the backend is `triton_prefilter` and there is anything to gain: float32 weights
    whose products are float32 ones as well. Feature Choice has no prefilter.
    """
    return (
        backend_for(tensors.x.device) == "triton_prefilter"
        and tensors.x.dtype == torch.float32
        and product_precision() == "ieee"
        and tensors.x.shape[1] <= MAX_INPUTS
    )


class PrefilterKeyEncoder(TritonKeyEncoder):
    """`KeyEncoder` of float32 tensors with at most 2^16 inputs."""

    @override
    def collect_guess(
        self,
        guess: torch.Tensor | None,
        capacity: int,
        thresholds: torch.Tensor | None,
    ) -> CollectedKeys:
        if guess is None:
            return super().collect_guess(guess, capacity, thresholds)
        guess = guess.detach().float()
        found, count, above = self._candidates(guess, capacity, thresholds)
        is_candidate = torch.arange(capacity, device=found.device) < count
        uncertain = (found >> UNCERTAIN_BIT) != 0
        positions = found & ((1 << UNCERTAIN_BIT) - 1)
        tokens = positions // self.shape[1]
        features = positions - tokens * self.shape[1]
        affinities = self._affinities_at(tokens, features, is_candidate)
        reach = is_candidate & (affinities > 0) & (affinities >= guess)
        if above is not None and thresholds is not None:
            exceeds = is_candidate & uncertain & (affinities > 0)
            exceeds &= affinities > thresholds[features]
            above.scatter_add_(0, features, exceeds.long())
        keys = pair_keys(affinities, positions).where(reach, 0)
        return CollectedKeys(keys, reach.sum(), count <= capacity, above)

    def _affinities_at(
        self, tokens: torch.Tensor, features: torch.Tensor, real: torch.Tensor
    ) -> torch.Tensor:
        """Float32 affinities of pairs, from one dot product each; shape (n,)."""
        # rows of features, or every number would be a read of its own
        W_enc = self.W_enc.T.contiguous()
        products = sampled_products(tokens, features, self.x, W_enc, real)
        affinities = products + self.b_enc.float()[features]
        if self.scale is not None:
            affinities = affinities * self.scale.float()[features]
        return affinities

    def _candidates(
        self,
        guess: torch.Tensor,
        capacity: int,
        thresholds: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        Pairs that may reach the guess, or of which it is not certain whether they exceed their
        threshold.

        Returns:
            Their positions, with bit 62 set for the latter, int64 of shape (capacity,); how
            many they are, int64 of shape (), which is larger than the capacity where some were
            left out; and on how many tokens each feature certainly exceeds its threshold,
            int64 of shape (F,), None without thresholds.
        """
        low = TritonKeyEncoder(
            self.x.bfloat16(), self.W_enc.bfloat16(), self.b_enc, self.scale
        )
        found = torch.zeros(capacity, dtype=torch.int64, device=self.x.device)
        count = found.new_zeros(())
        above = None if thresholds is None else found.new_zeros(self.shape[1])
        candidates_kernel[(min(n_tiles(low), n_programs(found.device)),)](
            encoder_arguments(low),
            relative_error(self.x.shape[1]) * upper_norms(self.x, 1),
            upper_norms(self.W_enc, 0),
            guess,
            found,
            count,
            capacity,
            thresholds,
            above,
            LEAST_ERROR=LEAST_ERROR,
            UNCERTAIN_BIT=UNCERTAIN_BIT,
            **tile_options(low),
        )
        return found, count, above


@triton.jit
def candidates_kernel(
    encoder,
    token_errors_ptr,
    feature_norms_ptr,
    guess_ptr,
    found_ptr,
    count_ptr,
    capacity,
    thresholds_ptr,  # None not to count what exceeds them
    above_ptr,
    LEAST_ERROR: tl.constexpr,
    UNCERTAIN_BIT: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Bounds affinities tile by tile, and collects the pairs that float32 must decide."""
    guess = tl.load(guess_ptr)
    n_token_tiles = tl.cdiv(encoder.n_tokens, TOKENS)
    n_tiles = n_token_tiles * tl.cdiv(encoder.n_features, FEATURES)
    # in the order of collect_keys_kernel
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        tokens = (tile % n_token_tiles) * TOKENS + tl.arange(0, TOKENS)
        features = (tile // n_token_tiles) * FEATURES + tl.arange(0, FEATURES)
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
        token_errors = tl.load(token_errors_ptr + tokens, mask=is_token, other=0.0)
        norms = tl.load(feature_norms_ptr + features, mask=is_feature, other=0.0)
        errors = token_errors[:, None] * norms[None, :] + LEAST_ERROR
        upper = affinities_of_products(products + errors, encoder, features, is_feature)
        is_pair = is_token[:, None] & is_feature[None, :]
        # what is not a number is not below anything
        candidate = is_pair & ~(upper < guess) & ~(upper <= 0)
        uncertain = is_pair & False
        if thresholds_ptr is not None:
            thresholds = tl.load(thresholds_ptr + features, mask=is_feature, other=0.0)
            thresholds = thresholds.to(tl.float32)[None, :]
            lower = affinities_of_products(
                products - errors, encoder, features, is_feature
            )
            above = is_pair & (lower > thresholds) & (lower > 0)
            add_counts(above_ptr, above, features, is_feature)
            uncertain = is_pair & ~above & ~(upper <= thresholds) & ~(upper <= 0)
            candidate = candidate | uncertain
        collected = candidate.to(tl.int32)
        per_row = tl.sum(collected, axis=1)
        if tl.sum(per_row, axis=0) > 0:
            places = places_in_buffer(collected, per_row, count_ptr, capacity)
            positions = (
                tokens.to(tl.int64)[:, None] * encoder.n_features + features[None, :]
            )
            tl.store(
                found_ptr + places,
                positions | (uncertain.to(tl.int64) << UNCERTAIN_BIT),
                mask=candidate & (places < capacity),
            )
