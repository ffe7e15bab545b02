"""What a device finds wrong, told on the host without waiting for the device.

A training step on a GPU never reads a result back, since that would wait for all that was enqueued before. What may
be wrong (a value that is not finite, a class id out of range) is computed there as a number and copied to the host
beside the work; whoever enqueued it looks, at its next call, at the numbers that have arrived.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from slidex.errors import SlidexError


class Arriving(NamedTuple):
    """A number on its way to the host.

    Args:
        number: int64 (), on the host; to be read once it is there.
        arrived: Tells whether it is; None where it was there at once.
    """

    number: torch.Tensor
    arrived: torch.cuda.Event | None

    def known(self) -> bool:
        """Whether it can be read without waiting."""
        return self.arrived is None or self.arrived.query()

    def read(self) -> int:
        """The number; waits for it."""
        if self.arrived is not None and not self.arrived.query():
            self.arrived.synchronize()
        return int(self.number)


def send(number: torch.Tensor) -> Arriving:
    """Starts copying an int64 () to the host, on the current stream of its device."""
    if number.device.type != "cuda":
        return Arriving(number, None)
    here = torch.empty((), dtype=torch.int64, device="cpu", pin_memory=True)
    here.copy_(number, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(number.device))
    return Arriving(here, arrived)


class LateErrors:
    """Errors that a device finds, raised by later calls, in the order of what they are about."""

    def __init__(self) -> None:
        self._pending: deque[tuple[Arriving, Callable[[int], SlidexError]]] = deque()

    def __reduce__(self) -> tuple[type[LateErrors], tuple[()]]:
        """A copy waits for nothing: the errors are of the one that enqueued the work."""
        return LateErrors, ()

    def expect(self, number: torch.Tensor, error: Callable[[int], SlidexError]) -> None:
        """Notes a number that says whether something was wrong.

        Args:
            number: int64 (), negative where nothing was.
            error: Makes of a number that is not negative what to raise.
        """
        self._pending.append((send(number), error))

    def settle(self, *, wait: bool) -> None:
        """Raises the oldest error of the numbers that have arrived; it is told once.

        Args:
            wait: Wait for those that have not.
        """
        while self._pending and (wait or self._pending[0][0].known()):
            arriving, error = self._pending.popleft()
            number = arriving.read()
            if number >= 0:
                raise error(number)
