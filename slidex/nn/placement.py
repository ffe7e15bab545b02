"""Where an output layer is, and with that which kernels compute it and whether the host may look at what they did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from slidex import kernels
from slidex.errors import ConfigError

if TYPE_CHECKING:
    from types import ModuleType

TENSOR_CORES_WITH_BF16 = (8, 0)  # compute capability


@dataclass(frozen=True, slots=True)
class Placement:
    """One kind of device.

    Args:
        device: Where the layer is.
        kernels: What computes there.
        waits: Whether a result can be read at once. Where not, no step reads one: sets have a fixed size, padded with
            -1, and what is wrong is told late (`slidex.late`).
        dtypes: What weights may be.
    """

    device: torch.device
    kernels: ModuleType
    waits: bool
    dtypes: tuple[torch.dtype, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled by its device, as modules cannot be."""
        return place, (self.device,)

    @property
    def bfloat16_products(self) -> bool:
        """Whether the device multiplies matrices faster in bfloat16; of a CPU `slidex.doctor` knows."""
        if self.device.type != "cuda":
            return False
        return torch.cuda.get_device_capability(self.device) >= TENSOR_CORES_WITH_BF16

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the host, there; from pinned memory, as any other copy would wait for the device."""
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of scores, gradients and moments where weights are of `dtype`: float32 for those of 16 bits."""
    return torch.promote_types(dtype, torch.float32)


def place(device: torch.device) -> Placement:
    """The placement of a layer whose parameters are on `device`.

    Raises:
        ConfigError: There are no kernels for this kind of device.
        MissingExtraError: Those for it are not installed.
        DeviceError: They cannot run there.
    """
    if device.type == "cpu":
        return Placement(device, kernels.get(device), waits=True, dtypes=(torch.float32, torch.float64))
    if device.type != "cuda":
        raise ConfigError(
            "The 'linear_weight' parameter must be on the CPU or a CUDA device where classes are sampled. "
            f"Got {device} instead. options=None works on every device."
        )
    module, sixteen = kernels.get(device), (torch.bfloat16, torch.float16)
    if device.index is None:  # as tensors there name it
        device = torch.device("cuda", torch.cuda.current_device())
    return Placement(device, module, waits=False, dtypes=(torch.float32, *sixteen))
