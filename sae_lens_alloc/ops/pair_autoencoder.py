"""Reconstruction from the selected pairs alone, with the gradient of every weight."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sae_lens_alloc.ops.feature_order import FeatureOrder
from sae_lens_alloc.ops.row_gradients import RowGradient, RowGradients, rows_of
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
        rows: Takes the gradients of the features that were selected, instead of whole
            matrices of gradients; None for whole matrices.
    """

    W_enc: torch.Tensor | None = None
    W_dec: torch.Tensor | None = None
    rows: RowGradients | None = None

    def __reduce__(self) -> tuple[type["GradientMemory"], tuple[()]]:
        # a copy of an SAE has no use for it, and it is as large as the weights
        return GradientMemory, ()

    def keep(self, W_enc: torch.nn.Parameter, W_dec: torch.nn.Parameter) -> None:
        """Takes the gradients of the weights away from them."""
        self.W_enc, W_enc.grad = W_enc.grad, None
        self.W_dec, W_dec.grad = W_dec.grad, None

    def take_W_enc(self) -> torch.Tensor | None:
        """Hands out the tensor like W_enc, once."""
        taken, self.W_enc = self.W_enc, None
        return taken

    def take_W_dec(self) -> torch.Tensor | None:
        """Hands out the tensor like W_dec, once."""
        taken, self.W_dec = self.W_dec, None
        return taken


def pair_pre_acts(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    rows: torch.Tensor,
    features: torch.Tensor,
    pre_acts: torch.Tensor,
    n_sets: int = 1,
    subtracted: torch.Tensor | None = None,
    memory: GradientMemory | None = None,
    real: torch.Tensor | None = None,
    order: FeatureOrder | None = None,
) -> torch.Tensor:
    """
    The pre-activations of the given pairs, through which gradients reach x, W_enc and b_enc.

    Rows 0 ... B-1 are the tokens of x; rows B ... 2B-1, 2B ... are the same tokens again,
    so that several sets of pairs (those of the budget, those of the auxiliary loss) share
    one forward and one backward.

    Dense equivalent: `(x @ W_enc + b_enc)[rows % B, features]`.

    Args:
        x: Encoder inputs of shape (B, d_in).
        W_enc: Encoder weights of shape (d_in, F).
        b_enc: Encoder bias of shape (F,).
        rows: int64 of shape (N,), ascending.
        features: int64 of shape (N,), ascending within a row.
        pre_acts: What this returns, of shape (N,), as the selection found it. Not
            differentiated: the gradient goes to x, W_enc and b_enc.
        n_sets: Number of sets of pairs.
        subtracted: Vector of shape (d_in,) that was subtracted from every row of x and gets
            its gradient here. That costs one matrix-vector product; through x it would cost
            the gradient of all of x.
        memory: Memory for the gradient of W_enc.
        real: Boolean mask of shape (N,), false at pairs with a pre-activation of 0 that are
            padding and get no gradient. None if all are real.
        order: The order of these pairs by feature, which `decode_pairs` may share.

    Returns:
        `pre_acts` in float32 (float64 for float64 weights), shape (N,).
    """
    if order is None:
        order = FeatureOrder(features, real, W_enc.shape[1])
    return _PairPreActs.apply(
        *(x, W_enc, b_enc, subtracted, rows, features, pre_acts, real),
        *(n_sets, memory, order),
    )


def decode_pairs(
    values: torch.Tensor,
    W_dec: torch.Tensor,
    rows: torch.Tensor,
    features: torch.Tensor,
    n_tokens: int,
    n_sets: int = 1,
    memory: GradientMemory | None = None,
    real: torch.Tensor | None = None,
    order: FeatureOrder | None = None,
) -> torch.Tensor:
    """
    Decodes pairs, with gradients for their values and W_dec.

    Dense equivalent, for one set of pairs: `acts @ W_dec` with `acts` of shape (B, F) that
    has `values` at (`rows`, `features`).

    Args:
        values: Pre-activations of shape (N,), as `pair_pre_acts` gives them.
        W_dec: Decoder weights of shape (F, d_in).
        rows: As in `pair_pre_acts`.
        features: As in `pair_pre_acts`.
        n_tokens: Number of tokens B.
        n_sets: Number of sets of pairs.
        memory: Memory for the gradient of W_dec.
        real: As in `pair_pre_acts`; padding has a value of 0.
        order: The order by feature of pairs of which these are the first.

    Returns:
        float32 (float64 for float64 weights) tensor of shape (n_sets, B, d_in), without
        b_dec.
    """
    if order is None:
        order = FeatureOrder(features, real, len(W_dec))
    return _DecodePairs.apply(
        values, W_dec, rows, features, real, n_tokens, n_sets, memory, order
    )


class _PairPreActs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        subtracted: torch.Tensor | None,
        rows: torch.Tensor,
        features: torch.Tensor,
        pre_acts: torch.Tensor,
        real: torch.Tensor | None,
        n_sets: int,
        memory: GradientMemory | None,
        order: FeatureOrder,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, W_enc, rows, features, real)
        ctx.n_sets = n_sets
        ctx.order = order
        ctx.memory = memory
        ctx.b_enc_dtype = b_enc.dtype
        ctx.subtracted_dtype = None if subtracted is None else subtracted.dtype
        return pre_acts.to(_accumulation_dtype(W_enc), copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_pre: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, W_enc, rows, features, real = ctx.saved_tensors
        n_features = W_enc.shape[1]
        out = None
        if ctx.memory is not None and W_enc.dtype == grad_pre.dtype:
            out = ctx.memory.take_W_enc()
        with torch.autocast(x.device.type, enabled=False):
            if real is not None:
                grad_pre = torch.where(real, grad_pre, 0.0)
            sorted_features, by_feature = ctx.order.of_all
            grad_by_feature = grad_pre[by_feature]
            tokens = rows[by_feature] % len(x)
            grad_W_enc, grad_b_enc = None, None
            row_gradients = None if ctx.memory is None else ctx.memory.rows
            if row_gradients is None:
                grad_W_enc = sparse_times_dense_transposed(
                    sorted_features, tokens, grad_by_feature, n_features, x, out=out
                )
                grad_b_enc = _sums(grad_by_feature, sorted_features, n_features)
            else:
                kept = _real_places(real, by_feature)
                chosen, places = rows_of(sorted_features[kept])
                row_gradients.put(
                    W_enc=RowGradient(
                        chosen,
                        sparse_times_dense(
                            places, tokens[kept], grad_by_feature[kept], len(chosen), x
                        ),
                    ),
                    b_enc=RowGradient(
                        chosen,
                        _sums(grad_by_feature[kept], places, len(chosen))[:, None],
                    ),
                )
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = sparse_times_dense(
                    rows, features, grad_pre, ctx.n_sets * len(x), W_enc.T, real=real
                )
                grad_x = grad_x.view(-1, *x.shape).sum(0).to(x.dtype)
            grad_subtracted = None
            if ctx.subtracted_dtype is not None:
                if grad_b_enc is None:
                    grad_b_enc = _sums(grad_by_feature, sorted_features, n_features)
                grad_subtracted = -(W_enc.to(grad_pre.dtype) @ grad_b_enc)
                grad_subtracted = grad_subtracted.to(ctx.subtracted_dtype)
        if grad_W_enc is None:
            return grad_x, None, None, grad_subtracted, *[None] * 7
        assert grad_b_enc is not None
        return (
            grad_x,
            grad_W_enc.to(W_enc.dtype),
            grad_b_enc.to(ctx.b_enc_dtype),
            grad_subtracted,
            *[None] * 7,
        )


class _DecodePairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: torch.Tensor,
        W_dec: torch.Tensor,
        rows: torch.Tensor,
        features: torch.Tensor,
        real: torch.Tensor | None,
        n_tokens: int,
        n_sets: int,
        memory: GradientMemory | None,
        order: FeatureOrder,
    ) -> torch.Tensor:
        with torch.autocast(values.device.type, enabled=False):
            out = sparse_times_dense(
                rows, features, values, n_sets * n_tokens, W_dec, real=real
            )
        ctx.save_for_backward(values, W_dec, rows, features, real)
        ctx.memory, ctx.order = memory, order
        return out.view(n_sets, n_tokens, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        values, W_dec, rows, features, real = ctx.saved_tensors
        out = None
        if ctx.memory is not None and W_dec.dtype == values.dtype:
            out = ctx.memory.take_W_dec()
        with torch.autocast(values.device.type, enabled=False):
            grad_rows = grad_out.to(values.dtype).flatten(0, 1)
            sorted_features, by_feature = ctx.order.of_first(len(features))
            grad_values = sampled_products(
                rows, features, grad_rows, W_dec, real, by_column=by_feature
            )
            row_gradients = None if ctx.memory is None else ctx.memory.rows
            if row_gradients is not None:
                kept = _real_places(real, by_feature)
                chosen, places = rows_of(sorted_features[kept])
                gradient = sparse_times_dense(
                    places,
                    rows[by_feature][kept],
                    values[by_feature][kept],
                    len(chosen),
                    grad_rows,
                )
                row_gradients.put(W_dec=RowGradient(chosen, gradient))
                return grad_values, *[None] * 8
            grad_W_dec = sparse_times_dense(
                sorted_features,
                rows[by_feature],
                values[by_feature],
                len(W_dec),
                grad_rows,
                out=out,
            )
        return grad_values, grad_W_dec.to(W_dec.dtype), *[None] * 7


def _real_places(
    real: torch.Tensor | None, by_feature: torch.Tensor
) -> torch.Tensor | slice:
    """Which of the sorted pairs are no padding. A GPU is asked how many they are."""
    return slice(None) if real is None else real[by_feature].nonzero()[:, 0]


def _sums(
    sorted_values: torch.Tensor, sorted_rows: torch.Tensor, n_rows: int
) -> torch.Tensor:
    """Sum of the values of each row, shape (n_rows,)."""
    return torch.segment_reduce(
        sorted_values, "sum", offsets=row_offsets(sorted_rows, n_rows), initial=0
    )


def _accumulation_dtype(weights: torch.Tensor) -> torch.dtype:
    return torch.promote_types(weights.dtype, torch.float32)
