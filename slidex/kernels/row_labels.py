"""The classes of rows: what `neighbor_classes` reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from slidex.kernels.arguments import check_lists, check_part

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RowLabels:
    """For each of N rows its classes, checked once where they are made: they are many more than a call asks for.

    Args:
        indptr: int64 (N + 1,), from 0 to L.
        classes: int32 (L,), in [0, C), each at most once in a row.
        num_classes: C.

    Raises:
        ConfigError: A shape, dtype, offset or class does not fit.
    """

    indptr: Tensor
    classes: Tensor
    num_classes: int

    def __post_init__(self) -> None:
        check_part("RowLabels", "indptr", self.indptr, (torch.int64,), (max(len(self.indptr), 1),))
        check_part("RowLabels", "classes", self.classes, (torch.int32,), (len(self.classes),))
        check_lists("RowLabels", self.indptr, "classes", self.classes, self.num_classes)

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.indptr) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.indptr.nbytes + self.classes.nbytes
