"""Time on a GPU: of a step as it runs, of the host that enqueues it, and of the device that has all of it enqueued."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

WARM_UP, STEPS, REPEATS = 3, 10, 5
HOST_STEPS = 3
"""Few enough that the queue of a GPU (some thousand launches) does not fill up, which would make the host wait."""
CYCLES = 3e9
"""A second of a GPU's clock, at least: longer waits do no harm."""


class Clock:
    """Times calls on a device.

    Args:
        device: A GPU; on a CPU it takes the host's time, for tests.
        steps: Calls that are timed together.
        repeats: How often; the median counts.
    """

    def __init__(self, device: torch.device, steps: int = STEPS, repeats: int = REPEATS) -> None:
        self._device, self._steps, self._repeats = device, steps, repeats

    def seconds(self, call: Callable[[], Any]) -> float:
        """Of one call among others, after some that are not counted: as long as host or device needs."""
        for _ in range(WARM_UP):
            call()
        return self._median(lambda: self._device_time(call, self._steps)) / self._steps

    def host_seconds(self, call: Callable[[], Any]) -> float:
        """Of one call, the time until the host has enqueued its work; on a CPU that of the work."""
        return self._median(lambda: self._enqueuing(call)) / HOST_STEPS

    def device_seconds(self, call: Callable[[], Any]) -> float:
        """Of one call, the time of the device where the host is ahead of it; on a CPU that of the work.

        The device is kept busy until the host has enqueued the calls, so that it never waits between them.
        """
        busy = 2 * HOST_STEPS * self.host_seconds(call) + 1e-3
        # The host's allocator of pinned memory gets what it needs in the first round, which would make it wait.
        self._device_time(call, HOST_STEPS, busy)
        return self._median(lambda: self._device_time(call, HOST_STEPS, busy)) / HOST_STEPS

    def _median(self, timed: Callable[[], float]) -> float:
        return statistics.median(timed() for _ in range(self._repeats))

    def _enqueuing(self, call: Callable[[], Any]) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        started = time.perf_counter()
        for _ in range(HOST_STEPS):
            call()
        return time.perf_counter() - started

    def _device_time(self, call: Callable[[], Any], steps: int, busy: float = 0.0) -> float:
        """Of some calls that start when the device has been busy for so many seconds."""
        if self._device.type != "cuda":
            started = time.perf_counter()
            for _ in range(steps):
                call()
            return time.perf_counter() - started
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if busy:
            torch.cuda._sleep(round(busy * CYCLES))
        begin.record()
        for _ in range(steps):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
