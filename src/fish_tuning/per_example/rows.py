"""Sums over rows of a matrix that give the same bits every time, on any device."""

from torch import Tensor


def add_rows(matrix: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Adds values (n, d) to some rows (n,) of a matrix (m, d), in place; rows may repeat.

    CUDA's `index_add_` adds in whatever order its threads run. Its `index_put_` sorts first, but
    the processor's does not.
    """
    if matrix.is_cuda:
        return matrix.index_put_((rows,), values, accumulate=True)
    return matrix.index_add_(0, rows, values)
