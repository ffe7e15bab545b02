"""Operations that would wait for a device, refused while they are looked for; so that a CPU can show it."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

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
