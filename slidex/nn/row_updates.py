"""The optimiser of a sampled layer's rows, with its state.

Legend: C classes, D hidden width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from slidex.errors import ConfigError
from slidex.kernels import RowState, StepSettings
from slidex.nn.placement import compute_dtype
from slidex.nn.scoring import Rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from slidex.nn.options import SamplingOptions
    from slidex.nn.scoring import Scored, Scorer


class RowUpdater:
    """Applies the fused optimiser's steps to one layer.

    Args:
        options: Settings of the optimiser.

    Attributes:
        learning_rate: Of the next steps.
        updates: Steps so far.
        states: Of weights and bias; None before the first step.
    """

    def __init__(self, options: SamplingOptions) -> None:
        self._options = options
        self.learning_rate, self.updates = options.learning_rate, 0
        self.states: tuple[RowState, RowState | None] | None = None

    def apply(
        self, scorer: Scorer, scored: Scored, weight_CD: torch.Tensor, bias_C: torch.Tensor | None
    ) -> None:
        """One step of the rows that were scored."""
        if self.states is None:
            self.states = self._fresh(weight_CD, bias_C)
        for to in (compute_dtype(weight_CD.dtype), weight_CD.device):  # where the layer was cast or moved
            held = self.states[0].moment2
            if to not in (held.dtype, held.device):
                of_weight, of_bias = self.states
                self.states = of_weight.to(to), of_bias and of_bias.to(to)
        options = self._options
        settings = StepSettings(
            learning_rate=self.learning_rate,
            step=self.updates + 1,
            beta1=options.beta1,
            beta2=options.beta2,
            epsilon=options.epsilon,
            weight_decay=options.weight_decay,
            seed=options.seed,
        )
        scorer.update(scored, Rows(weight_CD, bias_C), *self.states, settings)
        for parameter in (weight_CD, bias_C):
            if parameter is not None:  # kernels have written it unseen by autograd
                torch.autograd.graph.increment_version(parameter)
        self.updates += 1

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state by name; the tensors share memory with it."""
        return _named(self.states)

    def load(
        self, state: Mapping[str, torch.Tensor], weight_CD: torch.Tensor, bias_C: torch.Tensor | None
    ) -> None:
        """Restores `tensors` and the step counts (``counts``, its second number) of a layer of the same shape.

        Raises:
            ConfigError: if a tensor is missing or too much, or has another shape or dtype.
        """
        fused = self._options.optimizer is not None
        states = self._fresh(weight_CD, bias_C) if fused and "weight.moment1" in state else None
        own = _named(states)
        expected = {"counts": torch.empty(2, dtype=torch.int64), **own}
        found, wanted = (
            {k: (tuple(v.shape), v.dtype) for k, v in part.items()} for part in (state, expected)
        )
        if found != wanted:
            raise ConfigError(f"The 'state' parameter must hold {wanted}. Got {found} instead.")
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.states, self.updates = states, int(state["counts"][1])

    def _fresh(
        self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None
    ) -> tuple[RowState, RowState | None]:
        optimizer = self._options.optimizer or "adam"
        bias_state = None if bias_C is None else RowState.zeros_like(bias_C, optimizer)
        return RowState.zeros_like(weight_CD, optimizer), bias_state


def _named(states: tuple[RowState, RowState | None] | None) -> dict[str, torch.Tensor]:
    named = {}
    for name, rows in zip(("weight", "bias"), states or (), strict=False):
        if rows is not None:
            named |= {f"{name}.moment1": rows.moment1, f"{name}.moment2": rows.moment2}
    return named
