"""The largest of what is offered, in two arrays; of equal values those with lower ids. Shared by kernels in Numba."""

from __future__ import annotations

import numpy as np
from numba import njit

GROUPS = 8
"""Groups of values for each one wanted: the more, the nearer the k-th of the groups' best is to the k-th of all."""
_HALVINGS = 12


@njit(nogil=True)
def offer(values, ids, size, v, i):
    """Keeps the largest of what is offered in a heap, the least first, of equal ones the higher id; its size then."""
    if size < len(values):
        at = size
        while at > 0:
            above = (at - 1) // 2
            if not less(v, i, values[above], ids[above]):
                break
            values[at], ids[at] = values[above], ids[above]
            at = above
        values[at], ids[at] = v, i
        return size + 1
    if less(values[0], ids[0], v, i):
        _sink(values, ids, size, v, i)
    return size


@njit(nogil=True)
def best_first(values, ids, size):
    """Puts the `size` elements of a heap in order."""
    for left in range(size - 1, 0, -1):  # the least goes last
        v, i = values[left], ids[left]
        values[left], ids[left] = values[0], ids[0]
        _sink(values, ids, left, v, i)


@njit(nogil=True, inline="always")
def less(v, i, w, j):
    """Whether `v` with id `i` comes after `w` with id `j`."""
    return v < w or (v == w and i > j)


@njit(nogil=True)
def _sink(values, ids, size, v, i):
    """Puts `v` and `i` in the place of a heap's least element."""
    at = 0
    while True:
        below = 2 * at + 1
        if below >= size:
            break
        if below + 1 < size and less(values[below + 1], ids[below + 1], values[below], ids[below]):
            below += 1
        if not less(values[below], ids[below], v, i):
            break
        values[at], ids[at] = values[below], ids[below]
        at = below
    values[at], ids[at] = v, i


@njit(nogil=True)
def reached(best_G, k):
    """A value that at least k of them reach, the k-th largest or a little less; -inf where they are fewer.

    Of the largest of each of some groups: one that k of all values reach.
    """
    if len(best_G) < k:
        return best_G.dtype.type(-np.inf)
    low, high = best_G[0], best_G[0]
    for g in range(len(best_G)):
        low = best_G[g] if best_G[g] < low else low
        high = best_G[g] if best_G[g] > high else high
    for _ in range(_HALVINGS):
        middle = low + (high - low) * best_G.dtype.type(0.5)
        if _count(best_G, middle) >= k:
            low = middle
        else:
            high = middle
    return low


@njit(nogil=True)
def _count(values, least):
    count = np.int32(0)
    for g in range(len(values)):
        count = np.int32(count + (np.int32(1) if values[g] >= least else np.int32(0)))
    return count
