"""Warp operations for Numba's CUDA simulator, which has none, and a block that notices a divergent barrier.

The simulator runs a block as one Python thread for each CUDA thread. Here the threads of a warp meet at a barrier
for every warp operation, those of a block for every `syncthreads`; one that does not come breaks the barrier for all
after `PATIENCE` seconds, so that a kernel that diverges fails instead of passing by luck. As a pytest plugin
(``-p tests.kernels.cuda.simulator``, see `tests.kernels.cuda.running`) it installs itself.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
from numba.cuda.np.numpy_support import as_dtype
from numba.cuda.simulator import kernel as simulator
from numba.cuda.simulator.kernelapi import FakeCUDAModule, FakeCUDAShared

WARP = 32
PATIENCE = 60

_plain_run = simulator.BlockThread.run
_plain_array = FakeCUDAShared.array
_allocating = threading.Lock()


def _array(self: FakeCUDAShared, shape: Any, dtype: Any) -> np.ndarray:
    """The simulator knows an array by the line that makes it; without a lock two threads would make one each."""
    if shape == 0:
        return _plain_array(self, shape, dtype)
    frame = sys._getframe(1)
    place = frame.f_code, frame.f_lineno
    with _allocating:
        if place not in self._allocations:
            self._allocations[place] = np.full(shape, -(2.0**100)).astype(as_dtype(dtype))
        return self._allocations[place]


class _Meeting:
    """Where threads exchange a value each; two sets of slots, so that one barrier an exchange is enough."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=PATIENCE)
        self.slots: tuple[list[Any], list[Any]] = ([None] * size, [None] * size)

    def exchange(self, thread: Any, place: int, value: object) -> list[Any]:
        turn = thread.turns = getattr(thread, "turns", 0) ^ 1
        self.slots[turn][place] = value
        self.barrier.wait()
        return self.slots[turn]


class _Block:
    """Runs the threads of one block and waits for them; in place of `numba.cuda.simulator.kernel.BlockManager`."""

    def __init__(self, function: Any, _: Any, block_dim: Any, debug: bool) -> None:
        self._function, self._block_dim, self._debug = function, block_dim, debug
        size = int(np.prod(block_dim))
        assert size % WARP == 0, "kernels are launched with whole warps"
        self.meeting = threading.Barrier(size, timeout=PATIENCE)
        self.warps = [_Meeting(WARP) for _ in range(size // WARP)]

    def run(self, grid_point: Any, *arguments: Any) -> None:
        threads = []
        for point in np.ndindex(*self._block_dim):
            thread = simulator.BlockThread(
                lambda: self._function(*arguments), self, grid_point, point, self._debug
            )
            threads.append(thread)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        failures = [thread.exception for thread in threads if thread.exception]
        for kind, trace in sorted(failures, key=lambda f: f[0].__class__ is threading.BrokenBarrierError):
            raise kind.with_traceback(trace)

    def give_up(self) -> None:
        """A thread has failed: let no other wait for it."""
        self.meeting.abort()
        for warp in self.warps:
            warp.barrier.abort()


def _run(thread: Any) -> None:
    with np.errstate(all="ignore"):  # as on a device
        _plain_run(thread)
    if thread.exception:
        thread._manager.give_up()


def _exchange(value: object) -> tuple[list[Any], int]:
    thread: Any = threading.current_thread()
    lane = thread.thread_id % WARP
    return thread._manager.warps[thread.thread_id // WARP].exchange(thread, lane, value), lane


def _shfl_sync(self: object, mask: int, value: object, source: int) -> object:
    values, _ = _exchange(value)
    return values[source % WARP]


def _shfl_xor_sync(self: object, mask: int, value: object, distance: int) -> object:
    values, lane = _exchange(value)
    return values[lane ^ distance]


def _shfl_up_sync(self: object, mask: int, value: object, distance: int) -> object:
    values, lane = _exchange(value)
    return values[lane - distance] if lane >= distance else value


def _shfl_down_sync(self: object, mask: int, value: object, distance: int) -> object:
    values, lane = _exchange(value)
    return values[lane + distance] if lane + distance < WARP else value


def _ballot_sync(self: object, mask: int, predicate: object) -> int:
    values, _ = _exchange(predicate)
    return sum(1 << lane for lane, value in enumerate(values) if value)


def _any_sync(self: object, mask: int, predicate: object) -> bool:
    return _ballot_sync(self, mask, predicate) != 0


def _all_sync(self: object, mask: int, predicate: object) -> bool:
    return _ballot_sync(self, mask, predicate) == (1 << WARP) - 1


def _syncwarp(self: object, mask: int = 0) -> None:
    _exchange(None)


def install() -> None:
    """Give the simulator warp operations; every lane of a warp must take part in each."""
    FakeCUDAShared.array = _array
    simulator.BlockManager = _Block
    simulator.BlockThread.run = _run
    simulator.BlockThread.syncthreads = lambda thread: thread._manager.meeting.wait()
    for operation in (
        _shfl_sync,
        _shfl_xor_sync,
        _shfl_up_sync,
        _shfl_down_sync,
        _ballot_sync,
        _any_sync,
        _all_sync,
        _syncwarp,
    ):
        setattr(FakeCUDAModule, operation.__name__[1:], operation)


def pytest_configure() -> None:
    """Where this is a plugin."""
    install()
