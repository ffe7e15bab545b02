"""Compressed sparse rows as three plain arrays, in memory or memory-mapped.

scipy's ``csr_array`` copies a memory-mapped ``indices`` when its dtype differs from ``indptr``'s; this record
never copies, and becomes a scipy matrix only on request, one batch at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numba
import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


@dataclass(frozen=True, slots=True, eq=False)
class CsrArrays:
    """A sparse matrix of ``num_rows`` x ``num_columns``.

    Args:
        indptr: int64 (num_rows + 1,), ``indptr[0]`` is 0 unless the rows are a view made by `slice`.
        indices: int32 (nnz,), column ids, strictly increasing within a row.
        values: float32 (nnz,), or None where every stored value is 1.
        num_columns: Width of the matrix.
    """

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray | None
    num_columns: int

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.indptr) - 1

    @property
    def nnz(self) -> int:
        """Number of stored entries."""
        return int(self.indptr[-1] - self.indptr[0])

    def slice(self, start: int, stop: int) -> CsrArrays:
        """Rows ``start:stop``, without a copy of `indices` or `values`."""
        first, last = int(self.indptr[start]), int(self.indptr[stop])
        return CsrArrays(
            np.asarray(self.indptr[start : stop + 1]) - first,
            self.indices[first:last],
            None if self.values is None else self.values[first:last],
            self.num_columns,
        )

    def take(self, rows: np.ndarray) -> CsrArrays:
        """The given rows, in that order, as a copy in memory.

        Args:
            rows: integer (n,), each in ``[0, num_rows)``; repeats are allowed.
        """
        rows = np.asarray(rows, dtype=np.int64)
        indptr = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(self.indptr[rows + 1] - self.indptr[rows], out=indptr[1:])
        indices = np.empty(indptr[-1], dtype=np.int32)
        _copy_rows(self.indptr, self.indices, rows, indptr, indices)
        values = None
        if self.values is not None:
            values = np.empty(indptr[-1], dtype=np.float32)
            _copy_rows(self.indptr, self.values, rows, indptr, values)
        return CsrArrays(indptr, indices, values, self.num_columns)

    def unit_rows(self) -> CsrArrays:
        """The same rows scaled to unit L2 norm, float32; rows of zeros stay as they are."""
        values = np.empty(len(self.indices), dtype=np.float32)
        _unit_rows(self.indptr, values[:0] if self.values is None else self.values, values)
        return CsrArrays(self.indptr, self.indices, values, self.num_columns)

    def row_ids(self) -> np.ndarray:
        """Row of every stored entry: int64 (nnz,)."""
        return np.repeat(np.arange(self.num_rows), np.diff(self.indptr))

    def to_scipy(self) -> csr_matrix:
        """A scipy matrix that shares the arrays where their dtypes allow it."""
        from scipy.sparse import csr_matrix  # noqa: PLC0415  (scipy.sparse costs 0.1 s to import)

        values = np.ones(self.nnz, dtype=np.float32) if self.values is None else self.values
        return csr_matrix((values, self.indices, self.indptr), shape=(self.num_rows, self.num_columns))

    @staticmethod
    def from_scipy(matrix: csr_matrix, *, binary: bool = False) -> CsrArrays:
        """Copy any scipy sparse matrix; indices are sorted and duplicates summed.

        Args:
            matrix: Any scipy sparse matrix or array.
            binary: Drop the values: every stored entry counts as 1.
        """
        matrix = matrix.tocsr(copy=True)
        matrix.sum_duplicates()
        values = None if binary else matrix.data.astype(np.float32)
        return CsrArrays(
            matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32), values, matrix.shape[1]
        )


@numba.njit(cache=True, nogil=True)
def _copy_rows(indptr, source, rows, out_indptr, out):
    for i in range(len(rows)):
        first = indptr[rows[i]]
        at = out_indptr[i]
        for j in range(out_indptr[i + 1] - at):
            out[at + j] = source[first + j]


@numba.njit(cache=True, nogil=True)
def _unit_rows(indptr, values, out):
    """Writes the values with every row scaled to unit L2 norm; rows of zeros stay as they are.

    Args:
        indptr: int64 (N + 1,).
        values: float32 (M,), or (0,) where each is 1.
        out: float32 (M,).
    """
    for n in range(len(indptr) - 1):
        square = 0.0
        for j in range(indptr[n], indptr[n + 1]):
            square += values[j] * values[j] if len(values) else 1.0
        scale = 1 / math.sqrt(square) if square > 0 else 1.0
        for j in range(indptr[n], indptr[n + 1]):
            out[j] = scale * (values[j] if len(values) else 1.0)
