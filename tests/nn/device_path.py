"""The path of a layer on a GPU, taken by one on the CPU: the reference kernels, and nothing that waits."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from slidex import late
from slidex.kernels import reference
from slidex.lsh import ExactIndex, HashIndex
from slidex.nn import placement as placements
from slidex.nn.placement import Placement
from slidex.nn.rehash import Rehasher

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

NAMES = (
    "embedding_bag",
    "embedding_bag_update",
    "gather_rows",
    "logistic_loss",
    "pair_hidden_grad",
    "pair_logits",
    "pair_update",
    "rows_update",
    "shared_logistic_loss",
    "shared_softmax_loss",
    "softmax_loss",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def free(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which may wait though others may not: it stands for what is tested elsewhere not to."""

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        with _disable_current_modes():
            return function(*arguments, **keywords)

    return call


KERNELS: Any = SimpleNamespace(**{name: free(getattr(reference, name)) for name in NAMES})
CPU = placements.place(torch.device("cpu"))


def on_device(device: torch.device) -> Placement:
    """In place of `slidex.nn.placement.place`: a GPU that is the CPU."""
    del device
    return Placement(torch.device("cpu"), KERNELS, waits=False, dtypes=DTYPES)


def take_device_path(monkeypatch: pytest.MonkeyPatch, taken: bool = True) -> None:
    """Layers that are made, or placed, from now on take the path of a GPU; or that of the CPU again."""
    monkeypatch.setattr(placements, "place", on_device if taken else lambda _: CPU)
    waiting = [(index, name) for index in (HashIndex, ExactIndex) for name in ("query", "padded_pool")]
    for owner, name in (*waiting, (Rehasher, "rehash_if_due"), (Rehasher, "build"), (late.Arriving, "read")):
        if taken and not hasattr(getattr(owner, name), "__wrapped__"):
            monkeypatch.setattr(owner, name, free(getattr(owner, name)))


def take_both_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `take_device_path` where a device is named cuda, the CPU's own path elsewhere."""
    take_device_path(monkeypatch)
    monkeypatch.setattr(
        placements, "place", lambda device: CPU if device.type == "cpu" else on_device(device)
    )
