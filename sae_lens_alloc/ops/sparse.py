"""Products of ragged pairs with dense matrices, by the backend of their device."""

import warnings
from types import ModuleType

import torch

from sae_lens_alloc.ops.backend import backend_for, uses_triton

# torch says so at the first CSR tensor of a process; nothing a user of SAEs can act on
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

# Elements gathered at a time by the reference, so that it never holds pairs x d_in at once.
_REFERENCE_CHUNK = 2**22


def row_offsets(sorted_rows: torch.Tensor, n_rows: int) -> torch.Tensor:
    """Start of each row among pairs sorted by row, int64 of shape (n_rows + 1,)."""
    # counting them would ask a GPU for the largest row
    rows = torch.arange(n_rows + 1, dtype=sorted_rows.dtype, device=sorted_rows.device)
    return torch.searchsorted(sorted_rows.contiguous(), rows)


def row_extents(
    sorted_rows: torch.Tensor, n_rows: int, real: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    First place of each row among pairs sorted by row, and the place behind its last real pair,
    both int64 of shape (n_rows,): padding at the end of a row is left out.
    """
    offsets = row_offsets(sorted_rows, n_rows)
    starts, stops = offsets[:-1], offsets[1:]
    if real is not None:
        ends = torch.arange(1, len(real) + 1, device=real.device)
        # padding repeats one row, for which all of it would wait: it goes anywhere, as a 0
        rows = sorted_rows.where(real, ends % n_rows)
        stops = starts.scatter_reduce(0, rows, ends * real, "amax")
    return starts, stops


def sparse_times_dense(
    sorted_rows: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    n_rows: int,
    dense: torch.Tensor,
    out: torch.Tensor | None = None,
    real: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Dense equivalent: `A @ dense` where A of shape (n_rows, len(dense)) holds `values` at
    (`sorted_rows`, `columns`).

    Args:
        sorted_rows: int64 of shape (N,), ascending.
        columns: int64 of shape (N,).
        values: Shape (N,), float32 or float64.
        n_rows: Number of rows of the result.
        dense: Matrix of shape (n_columns, d), of the values' dtype or a lower precision.
        out: Contiguous matrix of shape (n_rows, d) to write to, if there is one.
        real: Boolean mask of shape (N,), false at padding, whose value is 0; None if there is
            none. Triton's kernels do no work for padding at the end of a row.

    Returns:
        Matrix of shape (n_rows, d), of the values' dtype.
    """
    if out is None:
        out = values.new_empty(n_rows, dense.shape[1])
    if uses_triton(dense.device):
        extents = row_extents(sorted_rows, n_rows, real)
        return _triton().sparse_times_dense(*extents, columns, values, dense, out)
    dense = dense.to(values.dtype)
    if backend_for(dense.device) == "torch":
        shape = (n_rows, dense.shape[0])
        matrix = _csr_matrix(sorted_rows, columns, values, shape)
        return out.addmm_(matrix, dense, beta=0.0)
    out.zero_()
    for part in _chunks(len(values), dense.shape[1]):
        out.index_add_(0, sorted_rows[part], values[part, None] * dense[columns[part]])
    return out


def sparse_times_dense_transposed(
    sorted_rows: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    n_rows: int,
    dense: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The transpose of `sparse_times_dense`, contiguous, of shape (d, n_rows) as `out` is."""
    if out is None:
        out = values.new_empty(dense.shape[1], n_rows)
    if uses_triton(dense.device):
        extents = row_extents(sorted_rows, n_rows, None)
        _triton().sparse_times_dense(*extents, columns, values, dense, out.T)
        return out
    dense = dense.to(values.dtype)
    if backend_for(dense.device) == "reference" or dense.device.type != "cpu":
        return out.copy_(
            sparse_times_dense(sorted_rows, columns, values, n_rows, dense).T
        )
    # MKL writes column-major results directly, which spares a pass over a matrix of weights
    matrix = _csr_matrix(sorted_rows, columns, values, (n_rows, dense.shape[0]))
    out.T.addmm_(matrix, dense.T.contiguous().T, beta=0.0)
    return out


def sampled_products(
    sorted_rows: torch.Tensor,
    columns: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    real: torch.Tensor | None = None,
    by_column: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Dense equivalent: `(left @ right.T)[sorted_rows, columns]`.

    Args:
        sorted_rows: int64 of shape (N,), ascending rows of `left`.
        columns: int64 of shape (N,), rows of `right`.
        left: Matrix of shape (n_rows, d), float32 or float64.
        right: Matrix of shape (n_columns, d), of left's dtype or a lower precision.
        real: Boolean mask of shape (N,), false at padding, or None if there is none. What
            padding gets is of no meaning; Triton's kernels do no work for it.
        by_column: The order that sorts the pairs by column, where it is known already.

    Returns:
        Dot products of shape (N,), of left's dtype.
    """
    if uses_triton(left.device):
        return _triton().sampled_products(sorted_rows, columns, left, right, real)
    right = right.to(left.dtype)
    if backend_for(left.device) == "torch":
        if len(left) >= len(right):
            return _sampled_by_row(sorted_rows, columns, left, right)
        # The smaller matrix fits into a CPU's caches, the larger one is then read once.
        if by_column is None:
            by_column = columns.argsort(stable=True)
        products = left.new_empty(len(columns))
        products[by_column] = _sampled_by_row(
            columns[by_column], sorted_rows[by_column], right, left
        )
        return products
    return torch.cat(
        [
            (left[sorted_rows[part]] * right[columns[part]]).sum(1)
            for part in _chunks(len(columns), left.shape[1])
        ]
    )


def _sampled_by_row(
    sorted_rows: torch.Tensor,
    columns: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
) -> torch.Tensor:
    zeros = left.new_zeros(len(columns))
    shape = (left.shape[0], right.shape[0])
    pattern = _csr_matrix(sorted_rows, columns, zeros, shape)
    return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()


def _triton() -> ModuleType:
    # imported where it is used, since it need not be installed
    from sae_lens_alloc.ops import triton_sparse

    return triton_sparse


def _csr_matrix(
    sorted_rows: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    shape: tuple[int, int],
) -> torch.Tensor:
    offsets = row_offsets(sorted_rows, shape[0])
    return torch.sparse_csr_tensor(
        offsets, columns, values, shape, check_invariants=False
    )


def _chunks(n_pairs: int, width: int) -> list[slice]:
    step = max(1, _REFERENCE_CHUNK // width)
    return [slice(start, start + step) for start in range(0, max(n_pairs, 1), step)]
