"""A GPU that has shapes, dtypes and a device but no values: torch's device meta, with the CUDA kernels not launched.

What is mixed up between host and device fails there as it would on a GPU, and so does whatever reads a result back. The
kernels check their arguments as always.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import TYPE_CHECKING
from unittest import mock

import torch

from slidex import late
from slidex.kernels import cuda
from slidex.lsh import hash_index
from slidex.lsh.cuda import hashing
from slidex.lsh.cuda.hashing import DeviceHashing
from slidex.nn import placement as placements
from slidex.nn.placement import Placement
from tests.kernels.cuda.running import recorded_launches

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kernels.cuda.running import Launch

META = torch.device("meta")
SIXTEEN = torch.bfloat16, torch.float16


def _build(self: DeviceHashing, weight_CD: torch.Tensor, bias_C: torch.Tensor | None) -> None:
    """A build waits for what it finds; of all that, queries know how full the largest buckets are."""
    del bias_C
    assert weight_CD.device == META
    self.tables._loads = [7] * len(self.tables.ids)


def _unread(number: torch.Tensor, arriving: late.Arriving) -> late.Arriving:
    assert (number.device, number.dtype, number.shape) == (META, torch.int64, ())
    return arriving


@contextlib.contextmanager
def meta_device() -> Iterator[list[Launch]]:
    """Within, layers on meta take the path of a GPU; the list gets the launches there would have been."""
    place = Placement(META, cuda, waits=False, dtypes=(torch.float32, *SIXTEEN))
    good, never = torch.tensor(-1), SimpleNamespace(query=lambda: False, synchronize=lambda: None)
    with (
        recorded_launches("meta") as launches,
        mock.patch.object(placements, "place", lambda device: place if device.type != "cpu" else _cpu),
        mock.patch.object(late, "send", lambda number: _unread(number, late.Arriving(good, never))),
        mock.patch.object(hash_index, "is_cuda", lambda device: device.type == "meta"),
        mock.patch.object(hashing, "require_device"),
        mock.patch.object(DeviceHashing, "build", _build),
        mock.patch.object(torch, "autocast", return_value=contextlib.nullcontext()),  # meta has none
    ):
        yield launches


_cpu = placements.place(torch.device("cpu"))
