"""Word of kernels being compiled, which takes the first run a good part of a minute and Numba does in silence."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from numba.core import event

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class _Starts(event.Listener):
    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    def on_start(self, event: event.Event) -> None:
        self._tell(event.data["dispatcher"].__name__)  # pyrefly: ignore[unsupported-operation]  (this kind has data)

    def on_end(self, event: event.Event) -> None:
        pass


@contextlib.contextmanager
def compilations(tell: Callable[[str], None]) -> Iterator[None]:
    """While entered, tells of every function that Numba begins to compile, and of none that it finds in its cache.

    Args:
        tell: Gets the function's name, in the thread that compiles it. A kernel's helpers are told one by one.
    """
    with event.install_listener("numba:compile", _Starts(tell)):
        yield
