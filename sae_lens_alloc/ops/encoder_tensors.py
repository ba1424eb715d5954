"""The tensors from which kernels compute affinities, and when there are kernels for them."""

from dataclasses import dataclass, replace

import torch
from typing_extensions import Self

from sae_lens_alloc.ops.backend import uses_triton


@dataclass(frozen=True)
class EncoderTensors:
    """
    What gives the affinities a_ij = (x_i W_enc + b_enc)_j * scale_j of a batch. Products are
    accumulated in float32 whatever the dtype of the weights.

    Args:
        x: Encoder inputs of shape (B, d_in), of the dtype of W_enc.
        W_enc: Shape (d_in, F).
        b_enc: Shape (F,).
        scale: Decoder norms of shape (F,), or None.
    """

    x: torch.Tensor
    W_enc: torch.Tensor
    b_enc: torch.Tensor
    scale: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(number of tokens B, number of features F)."""
        return len(self.x), self.W_enc.shape[1]

    def part(self, features: slice) -> Self:
        """The same for some of the features."""
        return replace(
            self,
            W_enc=self.W_enc[:, features],
            b_enc=self.b_enc[features],
            scale=None if self.scale is None else self.scale[features],
        )


def tensors_for_kernels(
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    scale: torch.Tensor | None,
    x: torch.Tensor,
) -> EncoderTensors | None:
    """The arguments as the kernels take them, None where the backend has no kernels for them."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, W_enc = x.to(dtype), W_enc.to(dtype)
    if (
        not uses_triton(x.device)
        or x.dtype != W_enc.dtype
        or x.dtype not in (torch.float32, torch.bfloat16, torch.float16)
    ):
        return None
    return EncoderTensors(x, W_enc, b_enc, scale)
