"""Progress bars on standard error, and nothing at all when that is not a terminal."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tqdm import tqdm

    from slidex.data import Progress


def bar(total: int | None, unit: str, description: str, *, scale: bool = False, initial: int = 0) -> tqdm:
    """A tqdm bar that is silent when standard error is not a terminal."""
    from tqdm import tqdm  # noqa: PLC0415

    return tqdm(
        total=total,
        initial=initial,
        unit=unit,
        desc=description,
        unit_scale=scale,
        file=sys.stderr,
        disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
    )


@contextlib.contextmanager
def reading_bar(description: str) -> Iterator[Progress]:
    """A bar over the bytes of the source, with rows and rows per second beside it."""
    with bar(None, "B", description, scale=True) as shown:
        rows_before = 0

        def progress(*, rows: int, bytes_done: int, bytes_total: int | None) -> None:
            nonlocal rows_before
            if bytes_done < shown.n or rows < rows_before:  # a second pass over the source begins
                shown.reset()
            rows_before = rows
            shown.total = bytes_total
            elapsed = shown.format_dict["elapsed"] if not shown.disable else 0
            shown.set_postfix_str(f"{rows:,} rows, {rows / max(elapsed, 1e-3):,.0f} rows/s", refresh=False)
            shown.update(bytes_done - shown.n)

        yield progress
