"""Rows of classes in few bits, with what that may cost: what `best_classes` multiplies first."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slidex.kernels.arguments import check_part

ROUGH = (torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class RoughRows:
    """C rows of width D, rounded.

    Args:
        rows_CD: bfloat16, or float32.
        norm_C: float32, L2 norms of the rows as they were.

    Raises:
        ConfigError: A shape or dtype does not fit.
    """

    rows_CD: torch.Tensor
    norm_C: torch.Tensor

    def __post_init__(self) -> None:
        check_part("RoughRows", "rows_CD", self.rows_CD, ROUGH, (len(self.norm_C), *self.rows_CD.shape[1:2]))
        check_part("RoughRows", "norm_C", self.norm_C, (torch.float32,), (len(self.rows_CD),))

    @classmethod
    def of(cls, weight_CD: torch.Tensor, dtype: torch.dtype) -> RoughRows:
        """These rows rounded to `dtype`; of rows that have it already, the same memory."""
        return cls(weight_CD.to(dtype).contiguous(), torch.linalg.vector_norm(weight_CD, dim=1).float())

    @property
    def error(self) -> float:
        """A product of such a row and a vector rounded alike is off by at most this, over the norms of both.

        ``3u`` and some more for the sums in float32, u half the spacing of numbers at 1: one for each factor and one
        for the product.
        """
        sums = 2 * (self.rows_CD.shape[1] + 4) * 2.0**-24  # of the exact product too
        return sums if self.rows_CD.dtype == torch.float32 else sums + 3.02 * 2.0**-8
