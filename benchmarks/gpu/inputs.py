"""Tensors that kernels are compared on, and all their affinities in float64."""

from dataclasses import dataclass

import torch

from benchmarks.shape import Shape
from sae_lens_alloc.ops.block_encoder import Encoder

NONZERO_INPUTS = 4
# Rounding of sums of products, in units of the last place of the largest affinity.
ROUNDING = 64


@dataclass(frozen=True)
class EncoderInputs:
    """
    Args:
        encoder: Weights of an encoder.
        x: Its inputs of shape (B, d_in).
        affinities: What it makes of them, float64 of shape (B, F).
        is_exact: All affinities can be told in every dtype, and many are equal.
    """

    encoder: Encoder
    x: torch.Tensor
    affinities: torch.Tensor
    is_exact: bool

    def tolerance(self, dtype: torch.dtype) -> float:
        """How far an affinity may be off that was rounded to a dtype on the way."""
        if self.is_exact:
            return 0.0
        return float(ROUNDING * torch.finfo(dtype).eps * self.affinities.abs().max())


def random_inputs(shape: Shape, dtype: torch.dtype, device: str) -> EncoderInputs:
    """Real numbers: what a training has."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    return _encoded(
        normal(shape.batch, shape.d_in).to(dtype),
        (normal(shape.d_in, shape.d_sae) / shape.d_in**0.5).to(dtype),
        (normal(shape.d_sae) / 10).to(dtype),
        0.5 + normal(shape.d_sae).abs(),
        is_exact=False,
    )


def exact_inputs(shape: Shape, dtype: torch.dtype, device: str) -> EncoderInputs:
    """Multiples of 1/4 below 64 without any rounding, so that there are ties by the dozen."""
    generator = torch.Generator(device).manual_seed(0)

    def whole(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(
            low, high + 1, size, generator=generator, device=device
        ).float()

    # few inputs are not 0: sums of many would need more digits than bfloat16 has
    x = whole(-3, 3, shape.batch, shape.d_in)
    rank = torch.rand(x.shape, generator=generator, device=device).argsort(dim=1)
    x = x * (rank < NONZERO_INPUTS)
    return _encoded(
        x.to(dtype),
        (whole(-2, 2, shape.d_in, shape.d_sae) / 2).to(dtype),
        (whole(-2, 2, shape.d_sae) / 2).to(dtype),
        2.0 ** whole(-1, 1, shape.d_sae),
        is_exact=True,
    )


def _encoded(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    scale: torch.Tensor,
    is_exact: bool,
) -> EncoderInputs:
    affinities = (x.double() @ W_enc.double() + b_enc.double()) * scale.double()
    return EncoderInputs(Encoder(W_enc, b_enc, scale), x, affinities, is_exact)
