"""The optimiser step that the update kernels fuse, and the state it keeps beside a parameter.

The rule is "lazy" Adam, the one of ``torch.optim.SparseAdam``: a row that no pair touches keeps its weights
and its moments, bias correction uses the global step. So the cost of a step follows the touched rows, never
all of them. Letters: R rows of any parameter, D their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from slidex.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamStep:
    """Settings of one optimiser step (Kingma and Ba, 2015; decay as in Loshchilov and Hutter, 2019).

    Args:
        learning_rate: Step size, >= 0.
        step: 1-based count of optimiser steps, for bias correction.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        epsilon: Added to the root of the *uncorrected* second moment, as SparseAdam does; >= 0.
        weight_decay: Decoupled decay, applied to touched rows only; >= 0.

    Raises:
        ConfigError: A setting is out of its range.
    """

    learning_rate: float
    step: int
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        self._require("learning_rate", self.learning_rate >= 0, "at least 0")
        self._require("step", self.step >= 1, "at least 1")
        self._require("beta1", 0 <= self.beta1 < 1, "in [0, 1)")
        self._require("beta2", 0 <= self.beta2 < 1, "in [0, 1)")
        self._require("epsilon", self.epsilon >= 0, "at least 0")
        self._require("weight_decay", self.weight_decay >= 0, "at least 0")

    def _require(self, name: str, holds: bool, constraint: str) -> None:
        if not holds:
            value = getattr(self, name)
            raise ConfigError(
                f"The {name!r} parameter of AdamStep must be {constraint}. Got {value!r} instead."
            )

    @property
    def step_size(self) -> float:
        """Learning rate with both bias corrections: ``lr * sqrt(1 - beta2^t) / (1 - beta1^t)``."""
        return self.learning_rate * (1 - self.beta2**self.step) ** 0.5 / (1 - self.beta1**self.step)

    @property
    def shrink(self) -> float:
        """Factor that decoupled weight decay puts on a touched row before its update."""
        return 1 - self.learning_rate * self.weight_decay


class RowState(NamedTuple):
    """Adam's moments of one parameter, updated in place by the kernels.

    Args:
        moment1: Running mean of the gradient, shape and dtype of the parameter.
        moment2: Running mean of its square, shape and dtype of the parameter.
    """

    moment1: torch.Tensor
    moment2: torch.Tensor

    @staticmethod
    def zeros_like(parameter: torch.Tensor) -> RowState:
        """State of a parameter, (R, D) or (R,), that no step has touched."""
        return RowState(
            torch.zeros_like(parameter, requires_grad=False), torch.zeros_like(parameter, requires_grad=False)
        )
