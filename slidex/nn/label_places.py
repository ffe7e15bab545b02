"""Where labels lie among the classes that a batch is scored on.

Legend: N rows in a batch, P labels in all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from slidex.nn.candidates import label_weights
from slidex.nn.device_labels import DeviceLabels

if TYPE_CHECKING:
    from slidex.data.csr import CsrArrays


class PlacedLabels(NamedTuple):
    """Labels as places of a pool.

    Args:
        indptr: int64 (N + 1,).
        positions: int64 (P,).
        weights: float (P,), their mass.
        rows: int64 (P,), or None where it is made from `indptr` when it is needed.
    """

    indptr: torch.Tensor
    positions: torch.Tensor
    weights: torch.Tensor
    rows: torch.Tensor | None

    def row_P(self) -> torch.Tensor:  # noqa: N802  (a shape)
        """The row of every stored label."""
        return rows_of(self.indptr) if self.rows is None else self.rows


def class_places(labels: CsrArrays | DeviceLabels) -> PlacedLabels:
    """The labels where every class has its own place."""
    if isinstance(labels, DeviceLabels):
        return PlacedLabels(labels.indptr, labels.ids_P.clamp(min=0), labels.share_P, labels.row_P)
    ids_P = torch.from_numpy(labels.indices.astype(np.int64))
    return PlacedLabels(torch.from_numpy(labels.indptr), ids_P, label_weights(labels), None)


def first_slots(labels: CsrArrays | DeviceLabels) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and slot of every label in the active sets."""
    if isinstance(labels, DeviceLabels):
        return labels.row_P, labels.slot_P
    indptr = torch.from_numpy(labels.indptr)
    row_P = rows_of(indptr)
    return row_P, torch.arange(len(row_P)) - indptr[row_P]


def rows_of(indptr: torch.Tensor) -> torch.Tensor:
    """The row of every stored label: int64 (P,)."""
    return torch.repeat_interleave(torch.arange(len(indptr) - 1), indptr.diff())
