"""Rows of features, by feature: what `inverted_index` returns, `nearest_rows` reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slidex.kernels.arguments import check_lists, check_part


@dataclass(frozen=True, slots=True, eq=False)
class InvertedIndex:
    """For each of F features the rows that have it, checked once where it is made.

    Args:
        indptr: int64 (F + 1,), from 0 to M.
        rows: int32 (M,), in [0, N), rising within a feature.
        values: float32 or float64 (M,), theirs of the feature.
        num_rows: N.

    Raises:
        ConfigError: A shape, dtype, offset or row does not fit.
    """

    indptr: torch.Tensor
    rows: torch.Tensor
    values: torch.Tensor
    num_rows: int

    def __post_init__(self) -> None:
        for name, kinds, dims in (
            ("indptr", (torch.int64,), (max(len(self.indptr), 1),)),
            ("rows", (torch.int32,), (len(self.values),)),
            ("values", (torch.float32, torch.float64), (len(self.values),)),
        ):
            check_part("InvertedIndex", name, getattr(self, name), kinds, dims)
        check_lists("InvertedIndex", self.indptr, "rows", self.rows, self.num_rows)

    @property
    def num_features(self) -> int:
        """F."""
        return len(self.indptr) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(part.nbytes for part in (self.indptr, self.rows, self.values))
