"""The GPU benchmark's clock: on the CPU, and with a host and a device whose time is simulated."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks import gpu_clock
from benchmarks.gpu_clock import Clock

CPU = torch.device("cpu")


def test_the_clock_counts_calls_and_leaves_the_first_out(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(gpu_clock.time, "perf_counter", lambda: next(ticks))
    calls = []
    assert Clock(CPU, steps=4, repeats=3).seconds(lambda: calls.append(1)) == 1 / 4
    assert len(calls) == gpu_clock.WARM_UP + 12
    assert Clock(CPU).host_seconds(lambda: calls.append(1)) == 1 / gpu_clock.HOST_STEPS


class FakeGpu:
    """The clock of a host and of a device that does what is enqueued, one after the other; of `ROOM` calls at most.

    Args:
        launching: Seconds of the host for a call.
        working: Seconds of the device for it.
    """

    ROOM = 4

    def __init__(self, launching, working, monkeypatch):
        self.launching, self.working, self.ends = launching, working, []
        self.now = self.done = 0.0
        monkeypatch.setattr(gpu_clock.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _: self.wait())
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.enqueue(cycles / gpu_clock.CYCLES))
        monkeypatch.setattr(torch.cuda, "Event", lambda **_: FakeEvent(self))

    def enqueue(self, seconds):
        self.done = max(self.done, self.now) + seconds

    def wait(self):
        self.now = max(self.now, self.done)

    def call(self):
        if len(self.ends) >= self.ROOM:  # the host waits until there is a place in the queue
            self.now = max(self.now, self.ends[-self.ROOM])
        self.now += self.launching
        self.enqueue(self.working)
        self.ends.append(self.done)


class FakeEvent:
    """Of a `FakeGpu`."""

    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.gpu.enqueue(0.0)
        self.at = self.gpu.done

    def synchronize(self):
        self.gpu.wait()

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.mark.parametrize(("launching", "working"), [(3e-3, 1e-3), (1e-3, 3e-3)])
def test_host_and_device_are_told_apart(monkeypatch, launching, working):
    fake, clock = FakeGpu(launching, working, monkeypatch), Clock(torch.device("cuda"), steps=10, repeats=5)
    assert clock.seconds(fake.call) == pytest.approx(max(launching, working), rel=0.15)
    assert clock.host_seconds(fake.call) == pytest.approx(launching)
    assert clock.device_seconds(fake.call) == pytest.approx(working)
