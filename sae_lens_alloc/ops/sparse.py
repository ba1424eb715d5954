"""Products of ragged pairs with dense matrices: torch's CSR kernels, or a plain reference."""

import warnings

import torch

# torch says so at the first CSR tensor of a process; nothing a user of SAEs can act on
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

# Elements gathered at a time by the reference, so that it never holds pairs x d_in at once.
_REFERENCE_CHUNK = 2**22


def has_csr_kernels(device: torch.device) -> bool:
    """Whether torch multiplies CSR matrices on this device (on CPU it needs MKL)."""
    return device.type == "cuda" or (
        device.type == "cpu" and torch.backends.mkl.is_available()
    )


def row_offsets(sorted_rows: torch.Tensor, n_rows: int) -> torch.Tensor:
    """Start of each row among pairs sorted by row, int64 of shape (n_rows + 1,)."""
    offsets = torch.zeros(n_rows + 1, dtype=torch.int64, device=sorted_rows.device)
    torch.cumsum(torch.bincount(sorted_rows, minlength=n_rows), 0, out=offsets[1:])
    return offsets


def sparse_times_dense(
    sorted_rows: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    n_rows: int,
    dense: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Dense equivalent: `A @ dense` where A of shape (n_rows, len(dense)) holds `values` at
    (`sorted_rows`, `columns`).

    Args:
        sorted_rows: int64 of shape (N,), ascending.
        columns: int64 of shape (N,).
        values: Shape (N,), float32 or float64.
        n_rows: Number of rows of the result.
        dense: Matrix of shape (n_columns, d), of the values' dtype.
        out: Contiguous matrix of shape (n_rows, d) to write to, if there is one.

    Returns:
        Matrix of shape (n_rows, d).
    """
    if out is None:
        out = dense.new_empty(n_rows, dense.shape[1])
    if has_csr_kernels(dense.device):
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
        out = dense.new_empty(dense.shape[1], n_rows)
    if dense.device.type != "cpu" or not has_csr_kernels(dense.device):
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
) -> torch.Tensor:
    """
    Dense equivalent: `(left @ right.T)[sorted_rows, columns]`.

    Args:
        sorted_rows: int64 of shape (N,), ascending rows of `left`.
        columns: int64 of shape (N,), rows of `right`.
        left: Matrix of shape (n_rows, d), float32 or float64.
        right: Matrix of shape (n_columns, d).

    Returns:
        Dot products of shape (N,).
    """
    if has_csr_kernels(left.device):
        zeros = left.new_zeros(len(columns))
        shape = (left.shape[0], right.shape[0])
        pattern = _csr_matrix(sorted_rows, columns, zeros, shape)
        return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()
    return torch.cat(
        [
            (left[sorted_rows[part]] * right[columns[part]]).sum(1)
            for part in _chunks(len(columns), left.shape[1])
        ]
    )


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
