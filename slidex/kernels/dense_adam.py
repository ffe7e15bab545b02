"""Adam for the encoder's few dense parameters; the rows of bag and head have their own, fused, in `slidex.kernels`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class DenseAdam:
    """The arithmetic and the state of ``torch.optim.Adam``, bit for bit.

    Making torch's own imports torch's compiler, 0.5 to more than 1 s of CPU at every run's start.

    Args:
        parameters: Those to train; those without a gradient are left alone.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        epsilon: Added to the root of the corrected second moment.

    Attributes:
        state: By parameter, once it has had a step: ``step`` (), ``exp_avg`` and ``exp_avg_sq`` of its shape.
    """

    def __init__(
        self, parameters: Iterable[torch.Tensor], beta1: float, beta2: float, epsilon: float
    ) -> None:
        self.parameters = list(parameters)
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        self.state: dict[torch.Tensor, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One step along each parameter's `.grad`."""
        for parameter in self.parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            state = self.state.get(parameter)
            if state is None:
                state = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
                self.state[parameter] = state
            state["step"] += 1
            step = state["step"].item()
            state["exp_avg"].lerp_(gradient, 1 - self.beta1)
            state["exp_avg_sq"].mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
            root = (state["exp_avg_sq"].sqrt() / math.sqrt(1 - self.beta2**step)).add_(self.epsilon)
            parameter.addcdiv_(state["exp_avg"], root, value=-learning_rate / (1 - self.beta1**step))

    def restore(self, parameter: torch.Tensor, state: Mapping[str, torch.Tensor]) -> None:
        """Gives a parameter the state that it had once, wherever that was kept; the count of steps stays on the CPU."""
        self.state[parameter] = {
            name: part.to("cpu" if name == "step" else parameter.device, copy=True)
            for name, part in state.items()
        }

    def zero_grad(self) -> None:
        """Sets each parameter's `.grad` to None."""
        for parameter in self.parameters:
            parameter.grad = None
