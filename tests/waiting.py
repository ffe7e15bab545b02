"""What a CPU can show of a device: operations that would wait for it, and how much of its tensors the host has."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "equal",
    "repeat_interleave",
)
"""Those whose result, or its size, a GPU has to send to the host first."""


class NoWaiting(TorchDispatchMode):
    """Within, an operation of `WAITING` fails."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in WAITING, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that was seen on the host."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self.nbytes = max(self.nbytes, leaf.untyped_storage().nbytes())
        return result
