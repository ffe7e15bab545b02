"""Which classes have been computed on, and how: one byte for each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np

if TYPE_CHECKING:
    import torch

    from slidex.data.csr import CsrArrays

SEEN, TOUCHED, NEGATIVE = 1, 2, 4
"""Bits of `ClassRecord`: active in any step; active since the last rehash; a negative of some row in this epoch."""


class ClassRecord:
    """One byte for each class: what has happened to it.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int) -> None:
        self.flags_C1 = np.zeros(num_classes + 1, dtype=np.uint8)  # one more: padding, -1, lands there

    def note(self, ids: torch.Tensor, labels: CsrArrays) -> None:
        """Notes the classes of a step.

        Args:
            ids: int64 (U,), one pool for all rows, true classes first; or (N, A), a set for each row, its true
                classes first, padded with -1.
            labels: True classes of the N rows.
        """
        active, own_N = ids.numpy(), np.diff(labels.indptr)
        if active.ndim == 1:  # the true classes of a row are negatives of the other rows, if there are any
            active, own_N = active[None], own_N if len(own_N) == 1 else np.zeros(1, dtype=np.int64)
        _mark(active, own_N, self.flags_C1)

    def ids(self, bit: int) -> np.ndarray:
        """Classes that have the bit: int64, ascending."""
        return np.flatnonzero(self.flags_C1[:-1] & bit)

    def share(self, bit: int) -> float:
        """Share of classes that have the bit."""
        return self.count(bit) / (len(self.flags_C1) - 1)

    def count(self, bit: int) -> int:
        """How many classes have the bit."""
        return int(np.count_nonzero(self.flags_C1[:-1] & bit))

    def clear(self, bit: int) -> None:
        """Takes the bit from all classes."""
        self.flags_C1 &= np.uint8(~bit & 0xFF)


@numba.njit(cache=True, nogil=True)
def _mark(active_NA, own_N, flags_C1):
    """Flags each row's classes; the first `own_N` of a row are its true ones, the others negatives."""
    for n in range(active_NA.shape[0]):
        for a in range(active_NA.shape[1]):
            flags_C1[active_NA[n, a]] |= SEEN | TOUCHED if a < own_N[n] else SEEN | TOUCHED | NEGATIVE
