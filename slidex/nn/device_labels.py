"""True classes of a batch as tensors on a device, of sizes that the host knows.

Legend: N rows in a batch, C classes, P entries: labels, and after them pads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from slidex.data.csr import CsrArrays
    from slidex.nn.placement import Placement

PAD = -1


@dataclass(frozen=True, slots=True)
class DeviceLabels:
    """Compressed sparse rows, with pads where the number of labels is known on the device alone.

    Args:
        indptr: int64 (N + 1,), of the labels; pads come after the last, unless a row has one place, which may be a pad.
        ids_P: int64 (P,), row by row; -1 in pads.
        row_P: int64 (P,), the row of each.
        slot_P: int64 (P,), its place in the row; no two entries have one place.
        share_P: float64 (P,), 1 / (labels of its row); 0 in pads.
        widest: Places of a row.
        num_columns: C.
    """

    indptr: torch.Tensor
    ids_P: torch.Tensor
    row_P: torch.Tensor
    slot_P: torch.Tensor
    share_P: torch.Tensor
    widest: int
    num_columns: int

    @classmethod
    def from_csr(cls, labels: CsrArrays, placement: Placement) -> DeviceLabels:
        """Those of the host, which are all labels: P is their number."""
        counts_N = np.diff(labels.indptr)
        rows = np.repeat(np.arange(len(counts_N), dtype=np.int32), counts_N)
        indptr, ids_P, row_P = (
            placement.send(torch.from_numpy(np.ascontiguousarray(part)))
            for part in (labels.indptr, labels.indices, rows)
        )
        ids_P, row_P = ids_P.long(), row_P.long()
        slot_P = torch.arange(len(ids_P), device=ids_P.device) - indptr[row_P]
        share_P = 1 / indptr.diff()[row_P].double()
        return cls(indptr, ids_P, row_P, slot_P, share_P, int(counts_N.max(initial=0)), labels.num_columns)

    @classmethod
    def from_padded(cls, ids_NP: torch.Tensor, num_columns: int) -> DeviceLabels:
        """Those of a matrix int64 (N, labels of a row), padded with -1 anywhere."""
        num_rows, widest = ids_NP.shape
        if widest == 1:
            indptr, ids_P = torch.arange(num_rows + 1, device=ids_NP.device), ids_NP[:, 0]
            share_P = (ids_P >= 0).double()
            return cls(indptr, ids_P, indptr[:-1], torch.zeros_like(ids_P), share_P, 1, num_columns)
        labelled_NP = ids_NP >= 0
        counts_N = labelled_NP.sum(1)
        indptr = torch.nn.functional.pad(counts_N.cumsum(0), (1, 0))
        order_P = (~labelled_NP.flatten()).byte().argsort(stable=True)
        row_P, ids_P = order_P // max(1, widest), ids_NP.flatten()[order_P]
        share_P = (1 / counts_N[row_P].double()).masked_fill_(ids_P < 0, 0)
        return cls(indptr, ids_P, row_P, order_P % max(1, widest), share_P, widest, num_columns)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All its tensors."""
        return self.indptr, self.ids_P, self.row_P, self.slot_P, self.share_P

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.indptr) - 1

    @property
    def count(self) -> torch.Tensor:
        """The number of labels, float64 ()."""
        return (self.share_P > 0).sum(dtype=torch.float64)

    def padded_ids(self) -> torch.Tensor:
        """The labels of every row, int64 (N, widest), -1 where there is none."""
        if self.widest == 1 and len(self.ids_P) == self.num_rows:
            return self.ids_P[:, None]
        ids_NP = self.ids_P.new_full((self.num_rows, self.widest), PAD)
        return ids_NP.index_put_((self.row_P, self.slot_P), self.ids_P)

    def mass(self, class_weights: torch.Tensor | None) -> torch.Tensor:
        """What every entry counts: its share times the weight of its class, float64 (P,), 0 in pads."""
        if class_weights is None:
            return self.share_P
        return self.share_P * class_weights.detach()[self.ids_P.clamp(min=0)]
