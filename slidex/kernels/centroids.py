"""Centroids of classes in feature space, by feature: what `class_centroids` returns, `nearest_centroids` reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slidex.kernels.arguments import check_part, refuse_part


@dataclass(frozen=True, slots=True, eq=False)
class Centroids:
    """Inverted lists: for each of F features the classes whose centroid has it, checked once where they are made.

    Args:
        indptr: int64 (F + 1,), from 0 to M.
        classes: int32 (M,), in [0, C), rising within a feature.
        values: float32 or float64 (M,), the centroids' components.
        num_classes: C.

    Raises:
        ConfigError: A shape, dtype, offset or class does not fit.
    """

    indptr: torch.Tensor
    classes: torch.Tensor
    values: torch.Tensor
    num_classes: int

    def __post_init__(self) -> None:
        for name, kinds, dims in (
            ("indptr", (torch.int64,), (max(len(self.indptr), 1),)),
            ("classes", (torch.int32,), (len(self.values),)),
            ("values", (torch.float32, torch.float64), (len(self.values),)),
        ):
            check_part("Centroids", name, getattr(self, name), kinds, dims)
        if (
            self.indptr[0] != 0
            or self.indptr[-1] != len(self.classes)
            or bool((self.indptr.diff() < 0).any())
        ):
            refuse_part("Centroids", "indptr", f"rising from 0 to {len(self.classes)}", self.indptr)
        low, high = (int(c) for c in torch.aminmax(self.classes)) if len(self.classes) else (0, 0)
        if low < 0 or high >= max(self.num_classes, 1):
            refuse_part("Centroids", "classes", f"ids in [0, {self.num_classes})", (low, high))

    @property
    def num_features(self) -> int:
        """F."""
        return len(self.indptr) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(part.nbytes for part in (self.indptr, self.classes, self.values))
