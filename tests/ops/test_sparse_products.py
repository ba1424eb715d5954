"""Products of ragged pairs against dense formulas in float64, by every backend."""

import pytest
import torch

from sae_lens_alloc.ops import sparse
from sae_lens_alloc.ops.backend import BACKEND_VARIABLE
from sae_lens_alloc.ops.sparse import (
    row_extents,
    row_offsets,
    sampled_products,
    sparse_times_dense,
    sparse_times_dense_transposed,
)

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}


def random_pairs(
    n_rows: int, n_columns: int, density: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, columns and float64 values of random pairs in row order."""
    mask = torch.rand(n_rows, n_columns) < density
    rows, columns = mask.nonzero(as_tuple=True)
    return rows, columns, torch.randn(len(rows), dtype=torch.float64)


def dense_matrix(
    rows: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    shape: tuple[int, int],
) -> torch.Tensor:
    """The matrix of the pairs, pairs that occur twice added up."""
    matrix = torch.zeros(shape, dtype=torch.float64)
    pairs = zip(rows.tolist(), columns.tolist(), values.tolist(), strict=True)
    for row, column, value in pairs:
        matrix[row, column] += value
    return matrix


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype):
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    tolerance = TOLERANCE[dtype]
    assert torch.allclose(actual.double(), expected, rtol=tolerance, atol=tolerance)


def test_row_offsets_by_hand():
    # row 0 has 2 pairs, row 1 none, row 2 one, row 3 none
    offsets = row_offsets(torch.tensor([0, 0, 2]), 4)
    assert offsets.tolist() == [0, 2, 2, 3, 3]
    assert offsets.dtype == torch.int64
    assert row_offsets(torch.empty(0, dtype=torch.int64), 2).tolist() == [0, 0, 0]


@pytest.mark.usefixtures("backend")
def test_products_by_hand():
    # A = [[0, 2], [0, 0], [3, 4]], dense = [[1, 10], [5, 7]]
    rows, columns = torch.tensor([0, 2, 2]), torch.tensor([1, 0, 1])
    values = torch.tensor([2.0, 3.0, 4.0])
    dense = torch.tensor([[1.0, 10.0], [5.0, 7.0]])
    product = sparse_times_dense(rows, columns, values, 3, dense)
    assert product.tolist() == [[10, 14], [0, 0], [23, 58]]
    product = sparse_times_dense_transposed(rows, columns, values, 3, dense)
    assert product.tolist() == [[10, 0, 23], [14, 0, 58]]
    # left = [[1, 2], [0, 1], [3, 1]]: (0, 1): 5 + 14; (2, 0): 3 + 10; (2, 1): 15 + 7
    left = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 1.0]])
    assert sampled_products(rows, columns, left, dense).tolist() == [19, 13, 22]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 1.0])
def test_products_are_the_dense_ones(density: float, dtype: torch.dtype):
    torch.manual_seed(0)
    n_rows, n_columns, width = 17, 23, 5
    rows, columns, values = random_pairs(n_rows, n_columns, density)
    # at a density of 0.03 most rows and columns are empty
    assert density != 0.03 or len(rows.unique()) < n_rows - 3
    matrix = dense_matrix(rows, columns, values, (n_rows, n_columns))
    dense = torch.randn(n_columns, width, dtype=torch.float64)
    left = torch.randn(n_rows, width, dtype=torch.float64)

    args = (rows, columns, values.to(dtype), n_rows, dense.to(dtype))
    assert_close(sparse_times_dense(*args), matrix @ dense, dtype)
    transposed = sparse_times_dense_transposed(*args)
    assert_close(transposed, (matrix @ dense).T, dtype)
    assert transposed.is_contiguous()
    sampled = sampled_products(rows, columns, left.to(dtype), dense.to(dtype))
    expected = [
        sum(
            a * b
            for a, b in zip(left[row].tolist(), dense[column].tolist(), strict=True)
        )
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
    ]
    assert_close(sampled, torch.tensor(expected, dtype=torch.float64), dtype)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("width", [1, 130])
def test_products_of_rows_with_many_pairs(width: int):
    # more pairs, rows and columns than a kernel takes at a time, none of them a power of two
    torch.manual_seed(5)
    mask = torch.rand(70, 90) < 0.1
    mask[3], mask[:, 5] = True, True
    rows, columns = mask.nonzero(as_tuple=True)
    values = torch.randn(len(rows), dtype=torch.float64)
    matrix = dense_matrix(rows, columns, values, (70, 90))
    dense = torch.randn(90, width, dtype=torch.float64)
    left = torch.randn(70, width, dtype=torch.float64)
    args = (rows, columns, values, 70, dense)
    assert_close(sparse_times_dense(*args), matrix @ dense, torch.float64)
    assert_close(
        sparse_times_dense_transposed(*args), (matrix @ dense).T, torch.float64
    )
    sampled = sampled_products(rows, columns, left, dense)
    assert_close(sampled, (left @ dense.T)[rows, columns], torch.float64)


@pytest.mark.usefixtures("backend")
def test_products_of_bfloat16_matrices_are_accumulated_in_float32():
    torch.manual_seed(6)
    rows, columns, values = random_pairs(7, 9, 0.6)
    matrix = dense_matrix(rows, columns, values.float(), (7, 9))
    dense = torch.randn(9, 6).bfloat16()
    left = torch.randn(7, 6)
    args = (rows, columns, values.float(), 7, dense)
    assert_close(sparse_times_dense(*args), matrix @ dense.double(), torch.float32)
    assert_close(
        sparse_times_dense_transposed(*args), (matrix @ dense.double()).T, torch.float32
    )
    sampled = sampled_products(rows, columns, left, dense)
    expected = (left.double() @ dense.double().T)[rows, columns]
    assert_close(sampled, expected, torch.float32)


@pytest.mark.usefixtures("backend")
def test_products_are_the_same_bit_for_bit_twice():
    torch.manual_seed(7)
    rows, columns, values = random_pairs(40, 50, 0.3)
    dense, left = torch.randn(50, 20), torch.randn(40, 20)
    args = (rows, columns, values.float(), 40, dense)

    def run() -> list[torch.Tensor]:
        return [
            sparse_times_dense(*args),
            sparse_times_dense_transposed(*args),
            sampled_products(rows, columns, left, dense),
        ]

    first = run()
    for _ in range(3):
        assert all(map(torch.equal, first, run()))


@pytest.mark.usefixtures("backend")
def test_products_of_empty_first_and_last_rows():
    torch.manual_seed(1)
    rows, columns = torch.tensor([2, 2, 3]), torch.tensor([0, 4, 2])
    values = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    matrix = dense_matrix(rows, columns, values, (6, 5))
    dense = torch.randn(5, 3, dtype=torch.float64)
    args = (rows, columns, values, 6, dense)
    assert_close(sparse_times_dense(*args), matrix @ dense, torch.float64)
    assert_close(
        sparse_times_dense_transposed(*args), (matrix @ dense).T, torch.float64
    )


@pytest.mark.usefixtures("backend")
def test_products_of_pairs_that_occur_twice_and_out_of_order_within_a_row():
    # as in the gradient of two sets of pairs, which share the tokens
    torch.manual_seed(2)
    rows = torch.tensor([0, 0, 0, 2, 2])
    columns = torch.tensor([3, 1, 3, 2, 0])
    values = torch.tensor([1.0, 2.0, 5.0, 3.0, 4.0], dtype=torch.float64)
    # [[0, 2, 0, 6], [0, 0, 0, 0], [4, 0, 3, 0]]
    matrix = dense_matrix(rows, columns, values, (3, 4))
    assert matrix[0].tolist() == [0, 2, 0, 6]
    dense = torch.randn(4, 6, dtype=torch.float64)
    args = (rows, columns, values, 3, dense)
    assert_close(sparse_times_dense(*args), matrix @ dense, torch.float64)
    assert_close(
        sparse_times_dense_transposed(*args), (matrix @ dense).T, torch.float64
    )


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_products_of_dense_matrices_in_other_layouts(layout: str):
    torch.manual_seed(3)
    rows, columns, values = random_pairs(7, 9, 0.4)
    if layout == "transposed":
        dense = torch.randn(4, 9, dtype=torch.float64).T
        left = torch.randn(4, 7, dtype=torch.float64).T
    else:
        dense = torch.randn(9, 8, dtype=torch.float64)[:, ::2]
        left = torch.randn(7, 8, dtype=torch.float64)[:, ::2]
    matrix = dense_matrix(rows, columns, values, (7, 9))
    args = (rows, columns, values, 7, dense)
    assert_close(sparse_times_dense(*args), matrix @ dense, torch.float64)
    assert_close(
        sparse_times_dense_transposed(*args), (matrix @ dense).T, torch.float64
    )
    sampled = sampled_products(rows, columns, left, dense)
    assert_close(sampled, (left @ dense.T)[rows, columns], torch.float64)


def test_row_extents_leave_out_padding_at_the_end_of_a_row():
    rows = torch.tensor([0, 0, 0, 2, 2, 3, 3, 3])
    #         padding within a row, a row of padding, two at the end of one
    real = torch.tensor([1, 0, 1, 0, 0, 1, 0, 0], dtype=torch.bool)
    starts, stops = row_extents(rows, 6, real)
    assert starts.tolist() == [0, 3, 3, 5, 8, 8]
    assert stops.tolist() == [3, 3, 3, 6, 8, 8]
    starts, stops = row_extents(rows, 6, None)
    assert stops.tolist() == [3, 3, 5, 8, 8, 8]
    nothing = torch.empty(0, dtype=torch.int64)
    assert row_extents(nothing, 1, nothing.bool())[1].tolist() == [0]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_row_extents_with_padding_anywhere(share: float, dtype: torch.dtype):
    """Within rows, at their ends, all of a row, all of all; and rows of nothing."""
    torch.manual_seed(9)
    for n_pairs in (0, 1, 60):
        rows = torch.randint(2, 20, (n_pairs,)).sort().values
        real = torch.rand(n_pairs) < share
        starts, stops = row_extents(rows.to(dtype), 25, real)
        assert starts.tolist() == [int((rows < row).sum()) for row in range(25)]
        places = torch.arange(n_pairs)
        for row, start in enumerate(starts.tolist()):
            last = places[real & (rows == row)].tolist()[-1:]
            assert stops[row] == (last[0] + 1 if last else start)


@pytest.mark.usefixtures("backend")
def test_padding_changes_no_product():
    torch.manual_seed(8)
    rows, columns, values = random_pairs(20, 30, 0.3)
    real = torch.rand(len(rows)) < 0.6
    values = values * real
    dense, left = torch.randn(30, 6).double(), torch.randn(20, 6).double()
    matrix = dense_matrix(rows, columns, values, (20, 30))
    product = sparse_times_dense(rows, columns, values, 20, dense, real=real)
    assert_close(product, matrix @ dense, torch.float64)
    sampled = sampled_products(rows, columns, left, dense, real)
    expected = (left @ dense.T)[rows, columns]
    assert_close(sampled[real], expected[real], torch.float64)


def test_triton_does_no_work_for_padding(triton_device: torch.device):
    # two rows of one pair and, as where a GPU has nothing to select, 100 places of padding
    rows = torch.tensor([0] + [1] * 101)
    columns = torch.tensor([1, 2] + [3] * 100)
    values = torch.tensor([2.0, 3.0] + [0.0] * 100)
    real = torch.arange(102) < 2
    dense = torch.arange(8.0).view(4, 2)
    # what the padding points to would show, as 0 times NaN is NaN
    dense[3] = float("nan")
    product = sparse_times_dense(rows, columns, values, 2, dense, real=real)
    assert product.tolist() == [[4, 6], [12, 15]]
    sampled = sampled_products(rows, columns, torch.ones(2, 2), dense, real)
    assert sampled.tolist() == [5, 9] + [0] * 100
    assert sampled.device.type == triton_device.type


@pytest.mark.parametrize("chunk_pairs", [1, 2, 3, 6, 7, 11, 12, 13, 100])
def test_reference_does_not_depend_on_its_chunks(
    chunk_pairs: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    width = 4
    monkeypatch.setattr(sparse, "_REFERENCE_CHUNK", chunk_pairs * width)
    torch.manual_seed(4)
    # 12 pairs, so that chunks end before, at and after the last one
    rows = torch.tensor([0, 0, 0, 1, 1, 3, 3, 3, 3, 4, 6, 6])
    columns = torch.tensor([0, 2, 4, 1, 3, 0, 1, 2, 3, 4, 1, 2])
    values = torch.randn(12, dtype=torch.float64)
    dense = torch.randn(5, width, dtype=torch.float64)
    left = torch.randn(7, width, dtype=torch.float64)
    matrix = dense_matrix(rows, columns, values, (7, 5))
    args = (rows, columns, values, 7, dense)
    assert_close(sparse_times_dense(*args), matrix @ dense, torch.float64)
    sampled = sampled_products(rows, columns, left, dense)
    assert_close(sampled, (left @ dense.T)[rows, columns], torch.float64)


def test_reference_of_rows_wider_than_a_chunk(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    monkeypatch.setattr(sparse, "_REFERENCE_CHUNK", 3)
    rows, columns = torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1])
    dense = torch.arange(8, dtype=torch.float64).view(2, 4)
    # row 0: 2 * [4, 5, 6, 7]; row 1: [0, 1, 2, 3] + 3 * [4, 5, 6, 7]
    values = torch.tensor([2.0, 1.0, 3.0], dtype=torch.float64)
    product = sparse_times_dense(rows, columns, values, 2, dense)
    assert product.tolist() == [[8, 10, 12, 14], [12, 16, 20, 24]]
