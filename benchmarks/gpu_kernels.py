"""The CUDA kernels one by one: bytes they must move, time they take, and the share of a device copy's rate.

Every array counts once, read or written; rows that a batch meets more than once count once as well, as a cache may hold
them. So a share is what a kernel makes of the memory at least. Times are those of the device where the host is ahead:
what the host needs to launch a kernel is longer than many of them take, and stands in the table of steps. The arrays of
each hot kernel are larger than a second-level cache.
Letters: N rows in a batch, C classes, D width, A slots per row, U classes of a pool, M stored features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from slidex import kernels
from slidex.kernels import RowState, StepSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.gpu_clock import Clock

HOT = ("pair_logits", "pair_hidden_grad", "pair_update", "rows_update", "gather_rows", "shared_softmax_loss")
"""Those that the goal of 60 % is for."""


class Sizes(NamedTuple):
    """Of the arrays.

    Args:
        classes: C, also the number of features.
        width: D.
        rows: N.
        slots: A.
        pool: U of what is gathered and updated.
        scored: U of the scores: a row of them is to fit a cache, as it does where a pool is of use.
        features: M / N.
    """

    classes: int = 1_000_000
    width: int = 768
    rows: int = 2048
    slots: int = 512
    pool: int = 65_536
    scored: int = 16_384
    features: int = 100


class Share(NamedTuple):
    """What a kernel makes of the memory.

    Args:
        kernel: Its name.
        nbytes: Bytes it must move.
        seconds: Of a call, the median.
        share: Of the rate of a copy.
    """

    kernel: str
    nbytes: int
    seconds: float
    share: float


def calls(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[list[Any], int]]:
    """Arguments of every kernel, and the bytes it must move."""
    classes, width, rows, slots, pool, scored, features = sizes
    torch.manual_seed(0)
    weight = torch.randn(classes, width, device=device).to(dtype)
    hidden = torch.randn(rows, width, device=device)
    active = torch.randint(classes, (rows, slots), device=device)
    grad, target = torch.randn(rows, slots, device=device), torch.zeros(rows, slots, device=device)
    target[:, 0] = 1
    ids = torch.randperm(classes, device=device)[:pool]
    grad_rows = torch.randn(pool, width, device=device)
    scores = torch.randn(rows, scored, device=device)
    indptr, positions = torch.arange(rows + 1, device=device), torch.randint(scored, (rows,), device=device)
    bag_indptr = torch.arange(0, rows * features + 1, features, device=device)
    bag_ids = torch.randint(classes, (rows * features,), device=device, dtype=torch.int32)
    values, settings = torch.rand(rows * features, device=device), StepSettings(learning_rate=1e-3, step=1)
    state = RowState.zeros_like(weight)

    row = width * dtype.itemsize
    update = 2 * (row + 2 * 4 * width)  # weights and both moments, read and written
    met, fed = len(active.unique()), len(bag_ids.unique())
    batch, pairs, block = 4 * rows * width, rows * slots, rows * scored
    bags = 8 * (rows + 1) + 8 * rows * features
    return {
        "pair_logits": ([hidden, weight, None, active], batch + met * row + 12 * pairs),
        "softmax_loss": ([grad, target, None], 4 * (3 * pairs + rows)),
        "pair_hidden_grad": ([grad, weight, active], batch + met * row + 12 * pairs),
        "pair_update": (
            [grad, hidden, active, weight, None, state, None, settings],
            batch + met * update + 12 * pairs,
        ),
        "gather_rows": ([weight, None, ids], pool * (2 * row + 8 + 4)),
        "shared_softmax_loss": (
            [scores, indptr, positions, torch.ones(rows, device=device), None],
            8 * block + 28 * rows,
        ),
        "rows_update": (
            [ids, grad_rows, None, weight, None, state, None, settings],
            pool * (update + 4 * width + 8),
        ),
        "embedding_bag": ([bag_indptr, bag_ids, values, weight, None], batch + fed * row + bags),
        "embedding_bag_update": (
            [bag_indptr, bag_ids, values, hidden, weight, state, settings],
            batch + fed * update + bags,
        ),
    }


def copy_rate(device: torch.device, clock: Clock, nbytes: int = 1 << 30) -> float:
    """Bytes a second that a copy on the device reads and writes."""
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / clock.seconds(lambda: target.copy_(source))


def shares(sizes: Sizes, device: torch.device, dtype: torch.dtype, clock: Clock, rate: float) -> list[Share]:
    """Every kernel's share of the rate of a copy."""
    module: Any = kernels.get(device)
    found = []
    for name, (arguments, nbytes) in calls(sizes, device, dtype).items():
        call: Callable[..., Any] = getattr(module, name)
        call(*arguments)  # compiles
        seconds = clock.device_seconds(lambda call=call, arguments=arguments: call(*arguments))
        found.append(Share(name, nbytes, seconds, nbytes / seconds / rate))
    return found
