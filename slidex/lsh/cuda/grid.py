"""Sizes of launches. The kernels take any number of blocks; the simulator, which pays for each thread, gets few."""

from __future__ import annotations

from slidex.kernels.cuda.environment import simulated
from slidex.kernels.cuda.launch import WARP, blocks_for

THREADS = WARP if simulated() else 8 * WARP
"""Threads a block."""
MOST_BLOCKS = 2 if simulated() else 1 << 16


def blocks_of(threads: int) -> int:
    """Blocks for so many threads, or as many blocks as there may be, each to do more."""
    return min(blocks_for(threads, THREADS), MOST_BLOCKS)
