"""What an output layer needs of a GPU's memory, told before it is taken.

An estimate, from shapes: what stays (weights, moments, index) is near exact, what a step takes for a moment is an upper
bound for the rows and labels it was asked of. It is not there to plan with but to fail with numbers and advice instead
of in the middle of a step.

Legend: N rows in a batch, P labels of a row, C classes, D hidden width, A places per row, U places of a shared pool.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from slidex.errors import DeviceError
from slidex.kernels.optimizer import state_size
from slidex.nn.products import CLASSES_AT_ONCE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from slidex.lsh import CandidateIndex
    from slidex.nn.options import SamplingSettings

_RESERVE = 1 << 28
"""Libraries of matrix products, code of kernels, and gaps between allocations."""


def free_bytes(device: torch.device) -> tuple[int, int] | None:
    """Bytes of a GPU that this process can still get, and all of them; None for one that is no GPU, or not there."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached, total


def optimizer_bytes(optimizer: str | None, num_rows: int, width: int, *, bias: bool) -> int:
    """Of the fused optimiser's float32 state of a layer; 0 without one."""
    if optimizer is None:
        return 0
    return 4 * num_rows * (state_size(optimizer, width) + bias * state_size(optimizer, 1))


def step_bytes(
    settings: SamplingSettings,
    in_features: int,
    num_classes: int,
    num_rows: int,
    labels: int,
    weight_dtype: torch.dtype = torch.float32,
) -> int:
    """What one step takes for a moment: scores and their gradient, gathered rows, and ids that are sorted.

    Args:
        settings: Of mode and sizes, with the `precision` of the products.
        in_features: D.
        num_classes: C.
        num_rows: N.
        labels: N P.
        weight_dtype: Of the layer.
    """
    if settings.mode == "per_sample":
        places = num_rows * (min(settings.active_size, num_classes) + -(-labels // max(1, num_rows)))
        return 64 * places  # ids, sorted ids, their order, scores, targets, weights, gradient
    pool = num_classes
    if settings.mode == "shared":
        pool = min(settings.pool_size, num_classes) + labels
    piece, gathered = min(pool, CLASSES_AT_ONCE), 8 * pool * in_features
    if settings.mode == "exact":  # a piece, in the dtype of the products where that is another
        widened = weight_dtype.itemsize == 2 and settings.precision == "float32"
        gathered = (4 if widened else 2) * piece * in_features
    gradient = 4 * piece * in_features
    return 12 * num_rows * pool + gathered + gradient + 64 * pool


def index_bytes(index: CandidateIndex | None) -> int:
    """Of the index on the device, while it is built."""
    return getattr(index, "bytes_on_device", 0)


def require_memory(needed: Mapping[str, int], device: torch.device, advice: str) -> None:
    """Raises unless a GPU has the memory; asks nothing of other devices.

    Args:
        needed: Bytes by what they are for.
        device: Where they are to be.
        advice: What to change.

    Raises:
        DeviceError: There is too little; the message has all numbers.
    """
    found = free_bytes(device)
    total = sum(needed.values()) + _RESERVE
    if found is None or total <= found[0]:
        return
    parts = ", ".join(f"{name} {_size(count)}" for name, count in needed.items() if count)
    raise DeviceError(
        f"The GPU {device} has {_size(found[0])} of {_size(found[1])} free; about {_size(total)} are needed: {parts}, "
        f"and {_size(_RESERVE)} in reserve. {advice}"
    )


def layer_advice(
    settings: SamplingSettings, weight_dtype: torch.dtype, narrower: str = "make the layer in torch.bfloat16"
) -> str:
    """What of a layer can be made smaller; `narrower` says how its weights, where they have more than 16 bits."""
    changes = [narrower] if weight_dtype.itemsize > 2 else []
    if settings.optimizer != "rowwise_adagrad":
        changes.append("set 'optimizer' to rowwise_adagrad")
    if settings.mode == "exact":
        changes.append("use mode shared")
    elif settings.index in ("simhash", "dwta"):
        changes.append("give the index fewer 'tables'")
    changes.append("take fewer rows in a batch")
    return f"To need less, {', or '.join(changes)}; or use another GPU, or the CPU."


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
