"""How fast this machine moves, multiplies and counts: the rates that `benchmarks.roofline` turns into least times.

Small Numba loops over arrays of the sizes that a step has, the best of some repeats, with the threads of the process.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numba
import numpy as np
import torch

from benchmarks.roofline import Batch, Ceilings
from slidex.kernels.cpu.arguments import num_chunks
from slidex.kernels.cpu.intrinsics import prefetch_row

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_TABLE_BYTES = 2 << 30
"""A table of scattered rows is no larger: caches, also those of page addresses, have long been left behind."""


def measure_ceilings(
    batch: Batch,
    table_rows: int,
    dtype: torch.dtype,
    timer: Callable[[], float],
    *,
    stream_mb: int = 256,
    repeats: int = 7,
) -> tuple[Ceilings, dict[str, dict[str, float]]]:
    """The best rates of this process with its number of threads, at the sizes of a step.

    Args:
        batch: Gives the shapes of the products, the scores' size, and the width of scattered rows.
        table_rows: Rows of the table that scattered rows are read from: as many as the real one has.
        dtype: Of the products.
        timer: Seconds, wall-clock or CPU.
        stream_mb: Size of the arrays beyond the caches.
        repeats: Of each; the best counts.

    Returns:
        The rates, and those of scattered rows by the owner of the table: where huge pages are to be asked for, NumPy
        does and torch does not. The ceiling is the better of both.
    """

    def best(units: float, run: Callable[[], object]) -> float:
        run()  # compiles, and touches fresh memory
        seconds = []
        for _ in range(repeats):
            started = timer()
            run()
            seconds.append(timer() - started)
        return units / max(min(seconds), 1e-9)

    shape = min(table_rows, MOST_TABLE_BYTES // (4 * batch.width)), batch.width
    tables: dict[str, Callable[[], np.ndarray]] = {
        "torch": lambda: torch.ones(shape).numpy(),
        "numpy": lambda: np.ones(shape, dtype=np.float32),
    }
    scattered = {
        owner: dict(zip(("rows", "updates"), _scattered(make(), batch.classes, best), strict=True))
        for owner, make in tables.items()
    }
    source, target = (np.ones(stream_mb << 18, dtype=np.float32) for _ in range(2))
    scores = np.ones(batch.scores, dtype=np.float32)
    turns = max(1, (1 << 24) // scores.nbytes)
    n, d, u = batch.rows, batch.width, batch.classes
    products = [
        (2 * a * b * c, torch.ones(a, b, dtype=dtype), torch.ones(b, c, dtype=dtype))
        for a, b, c in ((n, d, u), (n, u, d), (u, n, d))
    ]
    counters = np.zeros((numba.get_num_threads(), batch.all_classes), dtype=np.int32)
    ids = np.random.default_rng(1).integers(0, batch.all_classes, 1 << 18).astype(np.int32)
    ceilings = Ceilings(
        stream=max(
            best(source.nbytes, lambda: read(source, num_chunks())),
            best(2 * source.nbytes, lambda: copy(source, target)),
        ),
        cached=best(2 * turns * scores.nbytes, lambda: scale(scores, turns)),
        rows=max(rates["rows"] for rates in scattered.values()),
        updates=max(rates["updates"] for rates in scattered.values()),
        flops=max(best(flops, lambda x=x, y=y: torch.mm(x, y)) for flops, x, y in products),
        counts=best(len(counters) * len(ids), lambda: count(counters, ids)),
    )
    return ceilings, scattered


def _scattered(
    table: np.ndarray, most: int, best: Callable[[float, Callable[[], object]], float]
) -> list[float]:
    """Bytes a second of rows that are read, and of rows that are read and written, `most` of them at a time."""
    order = np.random.default_rng(0).permutation(len(table))
    parts = np.array_split(order, max(1, len(table) // most))  # the next part each time: none is in the cache
    places = itertools.cycle(parts)
    part_bytes, chunks = len(parts[-1]) * table.strides[0], num_chunks()

    def fastest(kernel: Callable[..., object], share: int) -> float:
        return max(
            best(share * part_bytes, lambda ahead=ahead: kernel(table, next(places), ahead, chunks))
            for ahead in (0, 4, 8, 16)
        )

    return [fastest(read_rows, 1), fastest(update_rows, 2)]


@numba.njit(cache=True, nogil=True, parallel=True, fastmath={"reassoc", "nsz"})
def read(source, chunks):
    """The sum of a vector."""
    sums = np.zeros(chunks, dtype=source.dtype)
    for chunk in numba.prange(chunks):
        total = source.dtype.type(0)
        for value in source[len(source) * chunk // chunks : len(source) * (chunk + 1) // chunks]:
            total += value
        sums[chunk] = total
    return sums.sum()


@numba.njit(cache=True, nogil=True, parallel=True)
def copy(source, target):
    """Copies a vector."""
    for i in numba.prange(len(source)):
        target[i] = source[i]


@numba.njit(cache=True, nogil=True, parallel=True)
def scale(values, turns):
    """Reads and writes a vector `turns` times."""
    for _ in range(turns):
        for i in numba.prange(len(values)):
            values[i] *= np.float32(0.999)


@numba.njit(cache=True, nogil=True)
def _add_row(table, row, sums):
    for d in range(len(sums)):
        sums[d] += table[row, d]


@numba.njit(cache=True, nogil=True, parallel=True)
def read_rows(table, ids, ahead, chunks):
    """Sums of the rows `ids`, one for each chunk of them; prefetches `ahead` rows ahead."""
    out = np.zeros((chunks, table.shape[1]), dtype=table.dtype)
    for chunk in numba.prange(chunks):
        part = ids[len(ids) * chunk // chunks : len(ids) * (chunk + 1) // chunks]
        for i in range(len(part)):
            if ahead and i + ahead < len(part):
                prefetch_row(table, part[i + ahead])
            _add_row(table, part[i], out[chunk])
    return out


@numba.njit(cache=True, nogil=True, parallel=True)
def update_rows(table, ids, ahead, chunks):
    """Adds 1 to the rows `ids`; prefetches `ahead` rows ahead."""
    for chunk in numba.prange(chunks):
        part = ids[len(ids) * chunk // chunks : len(ids) * (chunk + 1) // chunks]
        for i in range(len(part)):
            if ahead and i + ahead < len(part):
                prefetch_row(table, part[i + ahead])
            for d in range(table.shape[1]):
                table[part[i], d] += np.float32(1)


@numba.njit(cache=True, nogil=True, parallel=True)
def count(counters_TC, ids):
    """Counts the ids, every thread all of them."""
    for t in numba.prange(len(counters_TC)):
        counters = counters_TC[t]
        for i in range(len(ids)):
            counters[np.uint32(ids[i])] += 1
