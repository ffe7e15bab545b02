"""Everything that costs time per sample: one set of operations, one implementation for each kind of device.

Every implementation is a module with the same function names and signatures: `slidex.kernels.reference`
(plain torch, any device and dtype, the oracle of the tests), `slidex.kernels.cpu` (Numba) and `slidex.kernels.cuda`
(Numba for NVIDIA GPUs). Callers ask `get` once and keep the module; nothing below it decides again.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from slidex.errors import ConfigError
from slidex.kernels.cuda.environment import require_device
from slidex.kernels.inverted_index import InvertedIndex
from slidex.kernels.linear_weights import LinearWeights
from slidex.kernels.optimizer import OPTIMIZERS, RowState, StepSettings
from slidex.kernels.rough_rows import RoughRows
from slidex.kernels.row_labels import RowLabels

if TYPE_CHECKING:
    from types import ModuleType

    import torch

__all__ = [
    "OPTIMIZERS",
    "InvertedIndex",
    "LinearWeights",
    "RoughRows",
    "RowLabels",
    "RowState",
    "StepSettings",
    "get",
]

_MODULES = {name: f"slidex.kernels.{name}" for name in ("cpu", "cuda", "reference")}


def get(device: torch.device | str) -> ModuleType:
    """The kernels for a device.

    Args:
        device: A torch device or its name, such as "cpu" or "cuda:1"; or "reference" for the plain torch
            implementation, which works on every device.

    Raises:
        ConfigError: There are no kernels for this kind of device.
        MissingExtraError: "cuda", and numba-cuda is missing or does not fit.
        DeviceError: "cuda", and torch has no CUDA, the driver is missing or too old, or there is no such GPU.
    """
    kind = device.partition(":")[0] if isinstance(device, str) else device.type
    if kind not in _MODULES:
        supported = "{!r}, {!r} or {!r}".format(*_MODULES)
        raise ConfigError(
            f"The 'device' parameter of kernels.get must be {supported}. Got {str(device)!r} instead."
        )
    if kind == "cuda":
        require_device(device)
    return import_module(_MODULES[kind])
