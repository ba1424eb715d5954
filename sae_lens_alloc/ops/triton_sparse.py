"""The products of `ops/sparse.py` by Triton kernels: deterministic, and with the dense
matrices in the precision they have."""

import torch
import triton
import triton.language as tl

# Pairs that a program gathers at a time, and elements of each.
PAIRS = 16
WIDTH = 128
# Columns of a transposed result that a program writes together: 128 bytes in float32.
COLUMNS = 32
WARPS = 4


def sparse_times_dense(
    starts: torch.Tensor,
    stops: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    dense: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """
    Dense equivalent: `A @ dense`, where row i of A holds `values[j]` at `columns[j]` for j
    from starts[i] to stops[i]. The order of summation is fixed.

    Args:
        starts: int64 of shape (n_rows,).
        stops: int64 of shape (n_rows,).
        columns: int64 of shape (N,).
        values: Shape (N,), float32 or float64, in which sums are accumulated.
        dense: Matrix of shape (n_columns, d), of the values' dtype or a lower precision.
        out: Matrix of shape (n_rows, d) to write to, row by row or column by column, of the
            values' dtype.

    Returns:
        `out`.
    """
    n_rows, width = out.shape
    # neighbours in memory are written together
    rows = 1 if out.stride(1) == 1 else COLUMNS
    if out.numel() > 0:
        sparse_times_dense_kernel[triton.cdiv(n_rows, rows), triton.cdiv(width, WIDTH)](
            starts,
            stops,
            columns,
            values,
            dense,
            out,
            n_rows,
            width,
            dense.stride(0),
            dense.stride(1),
            out.stride(0),
            out.stride(1),
            ROWS=rows,
            PAIRS=PAIRS,
            WIDTH=WIDTH,
            num_warps=WARPS,
        )
    return out


@triton.jit
def sparse_times_dense_kernel(
    starts_ptr,
    stops_ptr,
    columns_ptr,
    values_ptr,
    dense_ptr,
    out_ptr,
    n_rows,
    width,
    dense_row_stride,
    dense_stride,
    out_row_stride,
    out_stride,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Sums ROWS rows of the result, WIDTH elements of each, and stores them as one tile."""
    first_row = tl.program_id(0) * ROWS
    places = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    in_width = places < width
    in_tile = tl.arange(0, ROWS)
    dtype = values_ptr.dtype.element_ty
    tile = tl.zeros((WIDTH, ROWS), dtype=dtype)
    for i in range(ROWS):
        row = tl.minimum(first_row + i, n_rows - 1)
        stop = tl.load(stops_ptr + row)
        total = tl.zeros((WIDTH,), dtype=dtype)
        for start in range(tl.load(starts_ptr + row), stop, PAIRS):
            pairs = start + tl.arange(0, PAIRS)
            is_pair = pairs < stop
            columns = tl.load(columns_ptr + pairs, mask=is_pair, other=0)
            values = tl.load(values_ptr + pairs, mask=is_pair, other=0.0)
            dense = tl.load(
                dense_ptr
                + columns[None, :] * dense_row_stride
                + places.to(tl.int64)[:, None] * dense_stride,
                mask=is_pair[None, :] & in_width[:, None],
                other=0.0,
            )
            total += tl.sum(dense.to(dtype) * values[None, :], axis=1)
        tile = tl.where(in_tile[None, :] == i, total[:, None], tile)
    rows = first_row + in_tile
    tl.store(
        out_ptr
        + rows.to(tl.int64)[None, :] * out_row_stride
        + places.to(tl.int64)[:, None] * out_stride,
        tile,
        mask=(rows < n_rows)[None, :] & in_width[:, None],
    )


def sampled_products(
    rows: torch.Tensor,
    columns: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    real: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Dense equivalent: `(left @ right.T)[rows, columns]`, 0 where `real` is false.

    Args:
        rows: int64 of shape (N,), rows of `left`; ascending ones are read once.
        columns: int64 of shape (N,), rows of `right`.
        left: Matrix of shape (n_rows, d), float32 or float64, in which sums are accumulated.
        right: Matrix of shape (n_columns, d), of left's dtype or a lower precision.
        real: Boolean mask of shape (N,), false where nothing is to be computed, or None.

    Returns:
        Dot products of shape (N,), of left's dtype.
    """
    out = left.new_empty(len(columns))
    if len(out) > 0:
        sampled_products_kernel[(triton.cdiv(len(out), PAIRS),)](
            rows,
            columns,
            None if real is None else real.view(torch.int8),
            left,
            right,
            out,
            len(out),
            left.shape[1],
            left.stride(0),
            left.stride(1),
            right.stride(0),
            right.stride(1),
            PAIRS=PAIRS,
            WIDTH=WIDTH,
            num_warps=WARPS,
        )
    return out


@triton.jit
def sampled_products_kernel(
    rows_ptr,
    columns_ptr,
    real_ptr,  # None where all pairs are real
    left_ptr,
    right_ptr,
    out_ptr,
    n_pairs,
    width,
    left_row_stride,
    left_stride,
    right_row_stride,
    right_stride,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The dot products of PAIRS pairs."""
    pairs = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    is_place = pairs < n_pairs
    is_pair = is_place
    if real_ptr is not None:
        is_pair &= tl.load(real_ptr + pairs, mask=is_place, other=0) != 0
        # nothing to do where all is padding
        width = tl.where(tl.sum(is_pair.to(tl.int32), axis=0) > 0, width, 0)
    rows = tl.load(rows_ptr + pairs, mask=is_pair, other=0)
    columns = tl.load(columns_ptr + pairs, mask=is_pair, other=0)
    dtype = left_ptr.dtype.element_ty
    total = tl.zeros((PAIRS,), dtype=dtype)
    for start in range(0, width, WIDTH):
        places = start + tl.arange(0, WIDTH)
        mask = is_pair[:, None] & (places < width)[None, :]
        left = tl.load(
            left_ptr
            + rows[:, None] * left_row_stride
            + places.to(tl.int64)[None, :] * left_stride,
            mask=mask,
            other=0.0,
        )
        right = tl.load(
            right_ptr
            + columns[:, None] * right_row_stride
            + places.to(tl.int64)[None, :] * right_stride,
            mask=mask,
            other=0.0,
        )
        total += tl.sum(left * right.to(dtype), axis=1)
    tl.store(out_ptr + pairs, total, mask=is_place)
