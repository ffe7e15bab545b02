"""Numba passes over CSR rows: the check shared by writer and `Dataset.verify`, and the tidying of raw rows.

One pass of the check answers everything that later code relies on without looking again: ids are not negative,
strictly increasing within a row, and what the largest one is.
"""

from __future__ import annotations

import numba
import numpy as np

ROWS_OK, NEGATIVE_ID, NOT_INCREASING, BAD_INDPTR = range(4)
DEFECTS = {
    NEGATIVE_ID: "ids must be 0 or more",
    NOT_INCREASING: "ids must be strictly increasing within a row",
    BAD_INDPTR: "row offsets must not decrease and must end at the number of stored ids",
}


@numba.njit(cache=True, nogil=True)
def check_rows(indptr: np.ndarray, indices: np.ndarray) -> tuple[int, int, int]:
    """Check CSR rows in one pass.

    Args:
        indptr: int64 (n + 1,), starting at 0.
        indices: int32 (nnz,).

    Returns:
        The largest id (-1 if there is none), a defect code, and the row it is in.
    """
    largest = -1
    if indptr[0] != 0 or indptr[-1] != len(indices):
        return largest, BAD_INDPTR, 0
    for i in range(len(indptr) - 1):
        if indptr[i + 1] < indptr[i] or indptr[i + 1] > len(indices):
            return largest, BAD_INDPTR, i
        before = -1
        for j in range(indptr[i], indptr[i + 1]):
            here = indices[j]
            if here < 0:
                return largest, NEGATIVE_ID, i
            if here <= before:
                return largest, NOT_INCREASING, i
            before = here
        largest = max(largest, before)
    return largest, ROWS_OK, 0


@numba.njit(cache=True, nogil=True)
def sort_rows(
    indptr: np.ndarray, indices: np.ndarray, values: np.ndarray | None, merge: bool
) -> tuple[int, int]:
    """Sort each row's ids in place and, if asked, merge equal ones; a sorted row costs one look.

    Args:
        indptr: int64 (n + 1,), starting at 0; rewritten where ids were merged.
        indices: int32 (nnz,); the first ``indptr[-1]`` are in use afterwards.
        values: float32 (nnz,), summed where ids are merged, or None.
        merge: Whether an id may occur twice.

    Returns:
        (-1, -1), or the row and the id of the first duplicate if those may not be merged.
    """
    kept = 0
    first = indptr[0]
    for i in range(len(indptr) - 1):
        last = indptr[i + 1]
        increasing = True
        for j in range(first + 1, last):
            if indices[j] < indices[j - 1]:
                increasing = False
                break
        if not increasing:
            order = np.argsort(indices[first:last], kind="mergesort")
            indices[first:last] = indices[first:last][order]
            if values is not None:
                values[first:last] = values[first:last][order]
        start = kept
        for j in range(first, last):
            if kept > start and indices[kept - 1] == indices[j]:
                if not merge:
                    return i, indices[j]
                if values is not None:
                    values[kept - 1] += values[j]
                continue
            indices[kept] = indices[j]
            if values is not None:
                values[kept] = values[j]
            kept += 1
        first = last
        indptr[i + 1] = kept
    return -1, -1
