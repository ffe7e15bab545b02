"""The optimiser step that the update kernels fuse, and the state it keeps beside a parameter.

The rules are "lazy", as that of ``torch.optim.SparseAdam``: a row that no pair touches keeps its weights and its
state, bias correction uses the global step. So the cost of a step follows the touched rows, never all of them.
With gradient g of a touched row, m its `RowState.moment1` and v its `RowState.moment2`, step t,
``a = learning_rate * sqrt(1 - beta2^t) / (1 - beta1^t)`` and s = 1 - learning_rate * weight_decay:

    adam              m += (1 - beta1) (g - m);  v += (1 - beta2) (g^2 - v);         w = s w - a m / (sqrt(v) + epsilon)
    rowwise_adam      the same with v += (1 - beta2) (mean(g^2) - v), one number for the row
    rowwise_adagrad   v += mean(g^2);                                    w = s w - learning_rate g / (sqrt(v) + epsilon)

The mean is over the row's D entries. An entry of a (R,) parameter is a row of width 1: both forms of Adam are one
there, and Adagrad is that of ``torch.optim.Adagrad`` but for the decay, which is decoupled. All states start at 0.
A new w of 16 bits is rounded stochastically (`slidex.kernels.rounding`).
Adam is of Kingma and Ba (2015), Adagrad of Duchi, Hazan and Singer (2011), the decoupled decay of Loshchilov and
Hutter (2019); FBGEMM has the row-wise forms as partial row-wise Adam and exact row-wise Adagrad. Letters: R rows of
any parameter, D their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from slidex.errors import ConfigError
from slidex.kernels.rounding import rounding_key

OPTIMIZERS = ("adam", "rowwise_adam", "rowwise_adagrad")


def state_size(optimizer: str, width: int) -> int:
    """Numbers that `RowState` keeps for a row of a (R, width) parameter.

    Raises:
        ConfigError: `optimizer` is none of `OPTIMIZERS`.
    """
    if optimizer not in OPTIMIZERS:
        raise ConfigError(
            f"The 'optimizer' parameter must be one of {OPTIMIZERS}. Got {optimizer!r} instead."
        )
    return {"adam": 2 * width, "rowwise_adam": width + 1, "rowwise_adagrad": 1}[optimizer]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """Settings of one optimiser step.

    Args:
        learning_rate: Step size, >= 0.
        step: 1-based count of optimiser steps, for Adam's bias correction.
        beta1: Decay of Adam's first moment, in [0, 1).
        beta2: Decay of Adam's second moment, in [0, 1).
        epsilon: Added to the root of the *uncorrected* second moment, as SparseAdam and Adagrad do; >= 0.
        weight_decay: Decoupled decay, applied to touched rows only; >= 0.
        seed: With `step`, of the random bits that round parameters of 16 bits (`slidex.kernels.rounding`); >= 0.

    Raises:
        ConfigError: A setting is out of its range.
    """

    learning_rate: float
    step: int
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        self._require("learning_rate", self.learning_rate >= 0, "at least 0")
        self._require("step", self.step >= 1, "at least 1")
        self._require("beta1", 0 <= self.beta1 < 1, "in [0, 1)")
        self._require("beta2", 0 <= self.beta2 < 1, "in [0, 1)")
        self._require("epsilon", self.epsilon >= 0, "at least 0")
        self._require("weight_decay", self.weight_decay >= 0, "at least 0")
        self._require("seed", self.seed >= 0, "at least 0")

    def _require(self, name: str, holds: bool, constraint: str) -> None:
        if not holds:
            value = getattr(self, name)
            raise ConfigError(
                f"The {name!r} parameter of StepSettings must be {constraint}. Got {value!r} instead."
            )

    @property
    def step_size(self) -> float:
        """Adam's learning rate with both bias corrections: ``lr * sqrt(1 - beta2^t) / (1 - beta1^t)``."""
        return self.learning_rate * (1 - self.beta2**self.step) ** 0.5 / (1 - self.beta1**self.step)

    @property
    def shrink(self) -> float:
        """Factor that decoupled weight decay puts on a touched row before its update."""
        return 1 - self.learning_rate * self.weight_decay

    @property
    def rounding_key(self) -> int:
        """Of the random bits of this step."""
        return rounding_key(self.seed, self.step)


class RowState(NamedTuple):
    """What an optimiser keeps of one parameter, (R, D) or (R,), updated in place by the kernels; its shapes name it.

    Args:
        moment1: Running mean of the gradient, shape and dtype of the parameter, float32 where that has 16 bits;
            without rows, (0, D) or (0,), in Adagrad.
        moment2: Running mean of the squared gradient, or in Adagrad its sum, of the same dtype: of the parameter's
            shape, or (R, 1) where a row has one number.
    """

    moment1: torch.Tensor
    moment2: torch.Tensor

    @property
    def sums(self) -> bool:
        """Whether `moment2` is a sum over steps (Adagrad) rather than a running mean (Adam)."""
        return len(self.moment1) < len(self.moment2)

    def to(self, to: torch.dtype | torch.device) -> RowState:
        """A copy of it in another dtype or on another device."""
        return RowState(self.moment1.to(to), self.moment2.to(to))

    @staticmethod
    def zeros_like(parameter: torch.Tensor, optimizer: str = "adam") -> RowState:
        """State of a parameter, (R, D) or (R,), that no step has touched.

        Raises:
            ConfigError: `optimizer` is none of `OPTIMIZERS`.
        """
        state_size(optimizer, 1)  # refuses an unknown name
        full = parameter.detach()
        per_row = full[:, :1] if full.dim() == 2 else full
        likes = full[:0] if optimizer == "rowwise_adagrad" else full, full if optimizer == "adam" else per_row
        dtype = torch.promote_types(full.dtype, torch.float32)
        return RowState(*(torch.zeros(like.shape, dtype=dtype, device=full.device) for like in likes))
