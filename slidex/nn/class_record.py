"""Which classes have been computed on, and how: one byte for each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np
import torch

from slidex.nn.device_labels import DeviceLabels

if TYPE_CHECKING:
    from slidex.data.csr import CsrArrays
    from slidex.nn.placement import Placement

SEEN, TOUCHED, NEGATIVE = 1, 2, 4
"""Bits of `ClassRecord`: active in any step; active since the last rehash; a negative of some row in this epoch."""


class ClassRecord:
    """One byte for each class: what has happened to it.

    Args:
        num_classes: C.

    Attributes:
        flags_C1: uint8 (C + 1,), the bytes, and one more: padding, -1, lands there.
    """

    def __init__(self, num_classes: int) -> None:
        self.flags_C1 = torch.zeros(num_classes + 1, dtype=torch.uint8, device="cpu")

    def place(self, placement: Placement) -> None:
        """Keeps the bytes where the layer is from now on."""
        self.flags_C1 = self.flags_C1.to(placement.device)

    def note(self, ids: torch.Tensor, labels: CsrArrays | DeviceLabels) -> None:
        """Notes the classes of a step.

        Args:
            ids: int64 (U,), one pool for all rows, true classes first; or (N, A), a set for each row, its true
                classes first, padded with -1. On a device the true ones have as many places as there are labels.
            labels: True classes of the N rows.
        """
        if isinstance(labels, DeviceLabels):
            self._note_places(ids, labels)
            return
        active, own_N = ids.numpy(), np.diff(labels.indptr)
        if active.ndim == 1:  # the true classes of a row are negatives of the other rows, if there are any
            active, own_N = active[None], own_N if len(own_N) == 1 else np.zeros(1, dtype=np.int64)
        _mark(active, own_N, self.flags_C1.numpy())

    def note_all(self) -> None:
        """Notes that all classes were active."""
        self.flags_C1 |= SEEN

    def _note_places(self, ids: torch.Tensor, labels: DeviceLabels) -> None:
        """As `note`, without waiting: all flags that an entry writes are the same for every entry of its class."""
        own = len(labels.ids_P) if labels.num_rows == 1 else 0
        if ids.ndim == 2:
            own = labels.widest
        for part, bits in ((ids[..., :own], SEEN | TOUCHED), (ids[..., own:], SEEN | TOUCHED | NEGATIVE)):
            if part.numel():  # the last byte is that of -1 too
                self.flags_C1[part] = self.flags_C1[part] | bits

    def ids(self, bit: int) -> torch.Tensor:
        """Classes that have the bit: int64, ascending."""
        return (self.flags_C1[:-1] & bit).nonzero()[:, 0]

    def share(self, bit: int) -> float:
        """Share of classes that have the bit."""
        return self.count(bit) / (len(self.flags_C1) - 1)

    def count(self, bit: int) -> int:
        """How many classes have the bit."""
        return int(torch.count_nonzero(self.flags_C1[:-1] & bit))

    def clear(self, bit: int) -> None:
        """Takes the bit from all classes."""
        self.flags_C1 &= ~bit & 0xFF


@numba.njit(cache=True, nogil=True)
def _mark(active_NA, own_N, flags_C1):
    """Flags each row's classes; the first `own_N` of a row are its true ones, the others negatives."""
    for n in range(active_NA.shape[0]):
        for a in range(active_NA.shape[1]):
            flags_C1[active_NA[n, a]] |= SEEN | TOUCHED if a < own_N[n] else SEEN | TOUCHED | NEGATIVE
