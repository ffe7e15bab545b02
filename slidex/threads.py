"""One size for every thread pool: torch's and Numba's would otherwise each take all cores."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numba
import torch

from slidex.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

FEW_SCORES = 1 << 18
"""To wake another thread takes longer than so many inner products."""


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(count: int | None, processes: int = 1) -> int:
    """Sets torch's and Numba's pools to `count` threads and returns the number.

    Args:
        count: None is all usable cores, or an equal part of them.
        processes: How many processes share the cores.

    Raises:
        ConfigError: if Numba was started with fewer threads, e.g. by NUMBA_NUM_THREADS.
    """
    most: int = numba.config.NUMBA_NUM_THREADS  # pyrefly: ignore[missing-attribute]  (set at run time)
    chosen = min(max(1, usable_cores() // processes), most) if count is None else count
    if chosen > most:
        raise ConfigError(
            f"The 'threads' setting must be at most {most}, the size of Numba's pool. Got {chosen} instead. "
            "Set the environment variable NUMBA_NUM_THREADS for more."
        )
    torch.set_num_threads(chosen)
    numba.set_num_threads(chosen)
    return chosen


@contextmanager
def threads_for(scores: int) -> Iterator[None]:
    """Within it what this thread computes in torch and Numba runs on it alone, if all it is for is `scores` scores."""
    before = torch.get_num_threads(), numba.get_num_threads()
    if scores <= FEW_SCORES:
        torch.set_num_threads(1)
        numba.set_num_threads(1)
    try:
        yield
    finally:
        if scores <= FEW_SCORES:
            torch.set_num_threads(before[0])
            numba.set_num_threads(before[1])
