"""The weights of one sparse linear classifier for each class: what `linear_fit` returns and `linear_scores` reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slidex.kernels.arguments import check_lists, check_part, refuse_part


@dataclass(frozen=True, slots=True, eq=False)
class LinearWeights:
    """Compressed sparse rows of weights over F features, one row for each of C classes, checked once where it is made.

    Args:
        indptr: int64 (C + 1,), from 0 to W.
        features: int32 (W,), in [0, F), rising within a class.
        values: float32 or float64 (W,), the weights.
        bias: dtype of `values`, (C,).
        num_features: F.

    Raises:
        ConfigError: A shape, dtype, offset or feature does not fit.
    """

    indptr: torch.Tensor
    features: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    num_features: int

    def __post_init__(self) -> None:
        for name, kinds, shape in (
            ("indptr", (torch.int64,), (len(self.bias) + 1,)),
            ("features", (torch.int32,), (len(self.values),)),
            ("values", (torch.float32, torch.float64), (len(self.values),)),
            ("bias", (self.values.dtype,), (len(self.bias),)),
        ):
            check_part("LinearWeights", name, getattr(self, name), kinds, shape)
        ends = self.indptr
        check_lists("LinearWeights", ends, "features", self.features, self.num_features)
        rises = self.features[1:] > self.features[:-1]
        inner = ends[1:-1][(ends[1:-1] > 0) & (ends[1:-1] < len(self.features))]
        rises[inner - 1] = True  # from a class to the next
        if not bool(rises.all()):
            refuse_part("LinearWeights", "features", "rising within a class", self.features)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(part.nbytes for part in (self.indptr, self.features, self.values, self.bias))
