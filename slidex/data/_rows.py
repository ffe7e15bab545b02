"""Numba checks over CSR rows, shared by the writer (before storing) and `Dataset.verify` (after reading).

One pass answers everything that later code relies on without looking again: ids are not negative, strictly
increasing within a row, and what the largest one is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba

if TYPE_CHECKING:
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
