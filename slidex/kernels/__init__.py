"""Everything that costs time per sample: one set of operations, one implementation for each kind of device.

Every implementation is a module with the same function names and signatures: `slidex.kernels.reference`
(plain torch, any device and dtype, the oracle of the tests) and `slidex.kernels.cpu` (Numba). Callers ask
`get` once and keep the module; nothing below it decides again.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from slidex.errors import ConfigError
from slidex.kernels.linear_weights import LinearWeights
from slidex.kernels.optimizer import OPTIMIZERS, RowState, StepSettings

if TYPE_CHECKING:
    from types import ModuleType

    import torch

__all__ = ["OPTIMIZERS", "LinearWeights", "RowState", "StepSettings", "get"]

_MODULES = {"cpu": "slidex.kernels.cpu", "reference": "slidex.kernels.reference"}


def get(device: torch.device | str) -> ModuleType:
    """The kernels for a device.

    Args:
        device: A torch device or its name, such as "cpu"; or "reference" for the plain torch implementation,
        which
            works on every device.

    Raises:
        ConfigError: There are no kernels for this kind of device.
    """
    kind = device.partition(":")[0] if isinstance(device, str) else device.type
    if kind not in _MODULES:
        supported = " or ".join(repr(name) for name in _MODULES)
        raise ConfigError(
            f"The 'device' parameter of kernels.get must be {supported}. Got {str(device)!r} instead."
        )
    return import_module(_MODULES[kind])
