"""Reconstruction from the selected pairs alone, with the gradient of every weight."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sae_lens_alloc.allocation.sparse_activations import SparseActivations
from sae_lens_alloc.ops.sparse import (
    row_offsets,
    sampled_products,
    sparse_times_dense,
    sparse_times_dense_transposed,
)


@dataclass
class GradientMemory:
    """
    The last step's weight gradients, whose memory this step's may take over. On CPU, asking
    the system for that much memory takes longer than computing the gradients.

    Args:
        W_enc: Tensor like W_enc that nobody reads any more, or None.
        W_dec: Tensor like W_dec that nobody reads any more, or None.
    """

    W_enc: torch.Tensor | None = None
    W_dec: torch.Tensor | None = None

    def keep(self, W_enc: torch.nn.Parameter, W_dec: torch.nn.Parameter) -> None:
        """Takes the gradients of the weights away from them."""
        self.W_enc, W_enc.grad = W_enc.grad, None
        self.W_dec, W_dec.grad = W_dec.grad, None

    def take(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Hands out both tensors, once."""
        taken = self.W_enc, self.W_dec
        self.W_enc = self.W_dec = None
        return taken


def reconstruct_pairs(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    W_dec: torch.Tensor,
    rows: torch.Tensor,
    features: torch.Tensor,
    pre_acts: torch.Tensor,
    n_sets: int = 1,
    subtracted: torch.Tensor | None = None,
    memory: GradientMemory | None = None,
    real: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Decodes the pre-activations of the given pairs, and carries the gradient back to all
    weights through these pairs alone.

    Rows 0 ... B-1 are the tokens of x; rows B ... 2B-1, 2B ... are the same tokens again,
    so that several sets of pairs (those of the budget, those of the auxiliary loss) share
    one forward and one backward.

    Dense equivalent, for one set of pairs: `(mask * (x @ W_enc + b_enc)) @ W_dec` with
    `mask` of shape (B, F) one at (`rows`, `features`).

    Args:
        x: Encoder inputs of shape (B, d_in).
        W_enc: Encoder weights of shape (d_in, F).
        b_enc: Encoder bias of shape (F,).
        W_dec: Decoder weights of shape (F, d_in).
        rows: int64 of shape (N,), ascending.
        features: int64 of shape (N,), ascending within a row.
        pre_acts: `(x @ W_enc + b_enc)[rows % B, features]` of shape (N,), as the selection
            found them. Not differentiated: the gradient goes to x, W_enc and b_enc.
        n_sets: Number of sets of pairs.
        subtracted: Vector of shape (d_in,) that was subtracted from every row of x and gets
            its gradient here. That costs one matrix-vector product; through x it would cost
            the gradient of all of x.
        memory: Memory for the gradients of W_enc and W_dec.
        real: Boolean mask of shape (N,), false at pairs with a pre-activation of 0 that are
            padding and get no gradient. None if all are real.

    Returns:
        float32 (float64 for float64 weights) tensor of shape (n_sets, B, d_in), without
        b_dec.
    """
    return _ReconstructPairs.apply(
        x,
        W_enc,
        b_enc,
        W_dec,
        subtracted,
        rows,
        features,
        pre_acts,
        real,
        n_sets,
        memory,
    )


class _ReconstructPairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        W_dec: torch.Tensor,
        subtracted: torch.Tensor | None,
        rows: torch.Tensor,
        features: torch.Tensor,
        pre_acts: torch.Tensor,
        real: torch.Tensor | None,
        n_sets: int,
        memory: GradientMemory | None,
    ) -> torch.Tensor:
        dtype = _accumulation_dtype(W_dec)
        pre_acts = pre_acts.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            out = sparse_times_dense(rows, features, pre_acts, n_sets * len(x), W_dec)
        ctx.save_for_backward(x, W_enc, W_dec, rows, features, pre_acts, real)
        ctx.memory = memory
        ctx.b_enc_dtype = b_enc.dtype
        ctx.subtracted_dtype = None if subtracted is None else subtracted.dtype
        return out.view(n_sets, *x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, W_enc, W_dec, rows, features, pre_acts, real = ctx.saved_tensors
        n_features = len(W_dec)
        W_enc_memory, W_dec_memory = None, None
        if ctx.memory is not None and W_dec.dtype == pre_acts.dtype:
            W_enc_memory, W_dec_memory = ctx.memory.take()
        with torch.autocast(x.device.type, enabled=False):
            grad_rows = grad_out.to(pre_acts.dtype).flatten(0, 1)
            grad_pre = sampled_products(rows, features, grad_rows, W_dec)
            if real is not None:
                grad_pre = torch.where(real, grad_pre, 0.0)
            by_feature = features.argsort(stable=True)
            sorted_features = features[by_feature]
            grad_pre_by_feature = grad_pre[by_feature]
            grad_W_dec = sparse_times_dense(
                sorted_features,
                rows[by_feature],
                pre_acts[by_feature],
                n_features,
                grad_rows,
                out=W_dec_memory,
            )
            grad_W_enc, grad_b_enc = _encoder_gradients(
                sorted_features,
                rows[by_feature] % len(x),
                grad_pre_by_feature,
                n_features,
                x,
                W_enc_memory,
            )
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = sparse_times_dense(
                    rows,
                    features,
                    grad_pre,
                    len(grad_rows),
                    W_enc.T,
                )
                grad_x = grad_x.view(-1, *x.shape).sum(0).to(x.dtype)
            grad_subtracted = None
            if ctx.subtracted_dtype is not None:
                grad_subtracted = -(W_enc.to(pre_acts.dtype) @ grad_b_enc)
                grad_subtracted = grad_subtracted.to(ctx.subtracted_dtype)
        return (
            grad_x,
            grad_W_enc.to(W_enc.dtype),
            grad_b_enc.to(ctx.b_enc_dtype),
            grad_W_dec.to(W_dec.dtype),
            grad_subtracted,
            None,
            None,
            None,
            None,
            None,
            None,
        )


def gradient_for_pairs(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    pairs: SparseActivations,
    gradient: torch.Tensor,
) -> torch.Tensor:
    """
    A term of value 0 that gives the pre-activations of some pairs the gradient wanted.

    Dense equivalent: `(g * (h - h.detach())).sum()` with `h = x @ W_enc + b_enc` and `g` of
    shape (B, F) holding `gradient` at the pairs, x taken as fixed.

    Args:
        x: Encoder inputs of shape (B, d_in).
        W_enc: Encoder weights of shape (d_in, F).
        b_enc: Encoder bias of shape (F,).
        pairs: The pairs, N of them; their values do not matter.
        gradient: Shape (N,), 0 for padding.

    Returns:
        Scalar of the dtype of `gradient`.
    """
    return _GradientForPairs.apply(
        x.detach(),
        W_enc,
        b_enc,
        pairs.token_indices,
        pairs.feature_indices,
        gradient.detach(),
    )


class _GradientForPairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        tokens: torch.Tensor,
        features: torch.Tensor,
        gradient: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, tokens, features, gradient)
        ctx.dtypes = W_enc.dtype, b_enc.dtype
        ctx.n_features = len(b_enc)
        return gradient.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, tokens, features, gradient = ctx.saved_tensors
        by_feature = features.argsort(stable=True)
        with torch.autocast(x.device.type, enabled=False):
            grad_W_enc, grad_b_enc = _encoder_gradients(
                features[by_feature],
                tokens[by_feature],
                (gradient * grad_out)[by_feature],
                ctx.n_features,
                x,
            )
        return (
            None,
            grad_W_enc.to(ctx.dtypes[0]),
            grad_b_enc.to(ctx.dtypes[1]),
            None,
            None,
            None,
        )


def _encoder_gradients(
    sorted_features: torch.Tensor,
    tokens: torch.Tensor,
    grad_pre: torch.Tensor,
    n_features: int,
    x: torch.Tensor,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of W_enc and b_enc from those of pre-activations, pairs by feature."""
    grad_W_enc = sparse_times_dense_transposed(
        sorted_features, tokens, grad_pre, n_features, x, out=out
    )
    grad_b_enc = torch.segment_reduce(
        grad_pre,
        "sum",
        offsets=row_offsets(sorted_features, n_features),
        initial=0,
    )
    return grad_W_enc, grad_b_enc


def _accumulation_dtype(weights: torch.Tensor) -> torch.dtype:
    return torch.promote_types(weights.dtype, torch.float32)
