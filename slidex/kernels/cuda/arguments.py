"""The border between torch and the CUDA kernels: `slidex.kernels.arguments` for tensors on one GPU.

Each float tensor of a call may be float32, bfloat16 or float16, whatever the others are: kernels compute in float32.
The moments of an optimiser are float32, as 16 bits would lose a running mean's small steps. Ids and offsets are not
read here, since that would wait for the device: kernels touch no memory for one that is out of range, and what they
return for its row is NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from slidex.kernels.arguments import Checks
from slidex.kernels.cuda import environment

if TYPE_CHECKING:
    from slidex.kernels.optimizer import StepSettings

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Arguments(Checks[torch.Tensor]):
    """Checks the tensors of one kernel call.

    Args:
        caller: Name of the kernel, for messages.
        name: Name of a parameter of the call.
        tensor: Its value: where it is, all others must be.

    Raises:
        ConfigError: From every method, when a tensor does not fit.
    """

    def __init__(self, caller: str, name: str, tensor: torch.Tensor) -> None:
        super().__init__(caller, tensor.device, torch.float32)
        if tensor.device.type != environment.device_type():
            self.fail(name, f"on a {environment.device_type().upper()} device", str(tensor.device))

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor."""
        return tensor

    def check_float(self, name: str, dtype: torch.dtype) -> None:
        """Refuse what is neither float32 nor a float of 16 bits."""
        if dtype not in FLOATS:
            self.fail(name, "of dtype torch.float32, torch.bfloat16 or torch.float16", dtype)

    def check_moment(self, name: str, dtype: torch.dtype) -> None:
        """Refuse what is not float32."""
        if dtype != torch.float32:
            self.fail(name, "of dtype torch.float32", dtype)

    def empty(self, *shape: int) -> torch.Tensor:
        """float32 memory for a result, on the call's device."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def integer_none(self) -> torch.Tensor:
        """An empty int64 array, which kernels take for "there is none"."""
        return torch.empty(0, dtype=torch.int64, device=self.device)


def coefficients(settings: StepSettings) -> tuple[float | int, ...]:
    """What a row update needs: six numbers in the order of `slidex.kernels.cpu.update`, and the key of its rounding.

    A launch makes float32 of the six, also where a setting is a whole number, and int64 of the key.
    """
    numbers = 1 - settings.beta1, 1 - settings.beta2, settings.epsilon, settings.step_size, settings.shrink
    return (*map(float, numbers), float(settings.learning_rate), settings.rounding_key)
