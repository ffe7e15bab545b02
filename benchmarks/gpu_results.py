"""What `benchmarks.gpu` found: one result for each way and size, the table, and what of the goals was reached.

Letters: N rows in a batch, C classes, D hidden width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from benchmarks.gpu_kernels import Share

HEADINGS = (
    "C",
    "D",
    "N",
    "way",
    "step, ms",
    "host, µs",
    "device, µs",
    "host / device",
    "device waits",
    "peak, GB",
    "times as fast as dense",
    "of its memory",
    "",
)

GOAL_ROWS = 256
GOALS: dict[tuple[int, int], tuple[int | None, float | None]] = {
    (1_000_000, 768): (5, None),
    (10_000_000, 768): (30, 1 / 3),
    (30_000_000, 768): (None, None),
}
"""By C and D: times as fast as the dense softmax, in what share of its memory; None where it is to train at all."""
MOST_WAITING = 0.1
"""Share of a step that the device may wait for the host: more is worth a CUDA graph (docs/performance.md)."""
LEAST_SHARE = 0.6
"""Of the rate of a device copy, what a hot kernel is to make."""
MOST_INDEX = 0.5
"""Share of a step that asking the index and rehashing may take."""


class Case(NamedTuple):
    """A size of layer and batch: C, D and N."""

    classes: int
    width: int
    rows: int


class Result(NamedTuple):
    """What one way needs for a step.

    Args:
        case: Of what size.
        way: Its name.
        milliseconds: The median; None where it does not fit.
        peak_bytes: Of memory, layer included.
        note: What else belongs to it.
        losses: Means over the first batches and, after all steps, over the same ones again, where it fits.
        host_microseconds: Until the host has enqueued a step; None where it is not known, as where a step waits.
        device_microseconds: Of the device's work in it, as the last.
        index_share: Of the step, what asking the index takes and its part of a rehash; None where there is no index.
    """

    case: Case
    way: str
    milliseconds: float | None
    peak_bytes: int
    note: str
    losses: tuple[float, float] | None = None
    host_microseconds: float | None = None
    device_microseconds: float | None = None
    index_share: float | None = None

    @property
    def learns(self) -> bool:
        """Whether the loss fell."""
        return self.losses is not None and self.losses[1] < self.losses[0]

    @property
    def host_per_device(self) -> float | None:
        """The host's time as a multiple of the device's; above 1 the device waits for the host."""
        if self.host_microseconds is None or self.device_microseconds is None:
            return None
        return self.host_microseconds / self.device_microseconds

    @property
    def waiting_share(self) -> float | None:
        """Share of a step in which the device waits for the host: the launch overhead."""
        if self.host_microseconds is None or self.device_microseconds is None or not self.milliseconds:
            return None
        return max(0.0, self.host_microseconds - self.device_microseconds) / (1e3 * self.milliseconds)


def ratios(result: Result, dense: Result | None) -> tuple[float | None, float | None]:
    """How many times as fast as the dense softmax a way is, and its share of the dense softmax's peak of memory."""
    if dense is None or dense.milliseconds is None or result.milliseconds is None:
        return None, None
    share = result.peak_bytes / dense.peak_bytes if dense.peak_bytes else None
    return dense.milliseconds / result.milliseconds, share


def goals(results: Iterable[Result]) -> list[str]:
    """What of the goals was reached, by the faster way with our tables; no word of sizes that were not measured."""
    results = list(results)
    lines = []
    for (classes, width), (speed, memory) in GOALS.items():
        here = [r for r in results if r.case == Case(classes, width, GOAL_ROWS)]
        ours = [r for r in here if _is_ours(r) and _has_tables(r) and r.milliseconds]
        if not here:
            continue
        best = min(ours, key=lambda r: r.milliseconds or 0.0) if ours else None
        dense = next((r for r in here if r.way == "dense"), None)
        words = f"goal at {size_of(Case(classes, width, GOAL_ROWS))}: "
        if best is None:
            lines.append(f"{words}does not fit")
        elif speed is None:
            lines.append(words + _trains(best))
        else:
            faster, share = ratios(best, dense)
            asked = f"{speed} times as fast as dense" + (f" in {memory:.2f} of its memory" if memory else "")
            got = (
                "dense does not fit"
                if faster is None
                else f"{faster:.3g} times, {share or 0:.2f} of its memory"
            )
            lines.append(f"{words}{asked}; got {got}")
    return lines


def launch_goal(results: Iterable[Result]) -> list[str]:
    """Whether the device waits so little for the host that no CUDA graph is worth it; nothing if it is unknown."""
    known = [r for r in results if _is_ours(r) and r.waiting_share is not None]
    words = f"a device that waits for the host at most {MOST_WAITING:.0%} of a step"
    return _of_all(words, [(r, r.waiting_share or 0.0) for r in known], MOST_WAITING)


def index_goals(results: Iterable[Result]) -> list[str]:
    """Whether query and rehash take half a step at most, with slidex's tables and with FAISS; nothing if unknown."""
    results, lines = list(results), []
    for index, ours in (("our tables", True), ("FAISS", False)):
        known = [(r, r.index_share) for r in results if r.index_share is not None and _has_tables(r) is ours]
        words = f"query and rehash by {index} in at most {MOST_INDEX:.0%} of a step"
        lines += _of_all(words, known, MOST_INDEX)
    return lines


def kernel_goal(found: Iterable[Share], hot: Collection[str]) -> str:
    """Whether the hot kernels make enough of the memory's rate."""
    known = [share for share in found if share.kernel in hot]
    below = [f"{share.kernel} ({share.share:.0%})" for share in known if share.share < LEAST_SHARE]
    got = f"got it in {len(known) - len(below)} of {len(known)}"
    words = f"goal of {LEAST_SHARE:.0%} of a copy's rate in each hot kernel: {got}"
    return words + (f"; not {', '.join(below)}" if below else "")


def _of_all(words: str, known: list[tuple[Result, float]], most: float) -> list[str]:
    if not known:
        return []
    beyond = [f"{r.way} at {size_of(r.case)} ({share:.0%})" for r, share in known if share > most]
    got = f"got it in {len(known) - len(beyond)} of {len(known)} lines"
    return [f"goal of {words}: {got}" + (f"; not {', '.join(beyond)}" if beyond else "")]


def _is_ours(result: Result) -> bool:
    return result.way.startswith("slidex")


def _has_tables(result: Result) -> bool:
    return not result.way.endswith("FAISS")


def size_of(case: Case) -> str:
    """The size, in words."""
    return f"C = {case.classes:,}, D = {case.width}, N = {case.rows:,}"


def _trains(result: Result) -> str:
    """Of a size that is to train at all."""
    first, last = result.losses or (math.nan, math.nan)
    losses = f"loss {first:.3f}, then {last:.3f}"
    if not result.learns:
        return f"runs, but does not learn: {losses}"
    return f"trains, as it should: {losses}, in {result.peak_bytes / 1e9:.1f} GB"


def rows_of(results: Iterable[Result]) -> list[list[str]]:
    """Cells of the table, under `HEADINGS`."""
    results = list(results)
    dense = {result.case: result for result in results if result.way == "dense" and result.milliseconds}
    table = []
    for result in results:
        size = [f"{result.case.classes:,}", str(result.case.width), f"{result.case.rows:,}", result.way]
        if result.milliseconds is None:
            table.append([*size, *[""] * (len(HEADINGS) - 5), result.note])
            continue
        time_ratio, peak_ratio = ratios(result, dense.get(result.case))
        shown = ["" if ratio is None else f"{ratio:.3g}" for ratio in (time_ratio, peak_ratio)]
        launch = ["", "", "", ""]
        if result.host_per_device is not None:
            launch = [
                f"{result.host_microseconds:.0f}",
                f"{result.device_microseconds:.0f}",
                f"{result.host_per_device:.2f}",
                f"{result.waiting_share:.0%}",
            ]
        peak = f"{result.peak_bytes / 1e9:.2f}"
        table.append([*size, f"{result.milliseconds:.4g}", *launch, peak, *shown, result.note])
    return table


def kernel_rows(found: Iterable[Share]) -> list[list[str]]:
    """Cells of the kernels' table."""
    return [
        [share.kernel, f"{share.nbytes / 1e6:.1f}", f"{1e6 * share.seconds:.1f}", f"{share.share:.0%}"]
        for share in found
    ]
