"""SIGTERM and Ctrl-C as a flag the training loop looks at between steps; a second one stops at once."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType

CAUGHT = (signal.SIGTERM, signal.SIGINT)


class SignalCatcher:
    """While entered, the first SIGTERM or SIGINT only sets `received` to its name.

    Outside the main thread Python delivers no signals, and this does nothing.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> SignalCatcher:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._catch) for number in CAUGHT}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _catch(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
