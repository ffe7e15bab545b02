"""(row, id) pairs regrouped by id, so that an update kernel meets each parameter row exactly once.

A least-significant-digit radix sort of packed 64-bit keys: cost O(pairs), no scratch of the parameter's
length. It is serial on purpose: at 3 to 4 ns a pair it is a tenth of the update that follows, and every
parallel region costs a scheduler slice when another process holds a core. Letters: N batch rows, M pairs.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numba import njit

PAIR_BITS = 32
PAIR_MASK = (1 << PAIR_BITS) - 1
_DIGIT_BITS = 11  # 2,048 write streams still fit the first-level caches and the TLB
_ROW_COST = 4  # an Adam row update costs about as much as adding four pairs


class _Scratch(threading.local):
    """One growing buffer for each thread: fresh memory costs more in page faults than the sort itself."""

    def __init__(self) -> None:
        self._words = np.empty(0, dtype=np.int64)

    def take(self, count: int) -> np.ndarray:
        """int64 (count,) with undefined content, valid until this thread's next call."""
        if self._words.size < count:
            self._words = np.empty(count, dtype=np.int64)
        return self._words[:count]


_scratch = _Scratch()


@dataclass(frozen=True, slots=True)
class Groups:
    """Pairs in the order of their ids; the arrays live in scratch until the thread's next `group_by_id`.

    Args:
        keys: int64 (pairs less pads,), ``id << 32 | pair`` in ascending order.
        source_rows: int64 (M,), the batch row of each pair, by pair.
        starts: int64 (groups + 1,), where in `keys` each id begins.
        bounds: int64 (chunks + 1,), chunk i has the groups ``bounds[i]:bounds[i + 1]``, about equal work.
    """

    keys: np.ndarray
    source_rows: np.ndarray
    starts: np.ndarray
    bounds: np.ndarray


def group_by_id(ids_M: np.ndarray, indptr: np.ndarray, bound: int, chunks: int) -> Groups:
    """Sort pairs by id, stable in their position, and cut them into chunks of like work.

    Args:
        ids_M: integer (M,), each below `bound`; negative ids are pads and dropped. M < 2^32, bound < 2^31.
        indptr: int64 (N + 1,), batch row n has the pairs ``indptr[n]:indptr[n + 1]``.
        bound: Length of the parameter.
        chunks: Number of chunks.
    """
    num_pairs = ids_M.size
    scratch = _scratch.take(4 * num_pairs + 1)
    keys, spare, source_rows = scratch[: 3 * num_pairs].reshape(3, num_pairs)
    num_keys = _pack(ids_M, indptr, keys, source_rows)
    keys, spare = keys[:num_keys], spare[:num_keys]
    bits = max(1, (bound - 1).bit_length())
    passes = -(-bits // _DIGIT_BITS)
    digit_bits = -(-bits // passes)
    for i in range(passes):
        _radix_pass(keys, spare, PAIR_BITS + i * digit_bits, digit_bits)
        keys, spare = spare, keys
    starts = scratch[3 * num_pairs :]
    starts = starts[: _find_starts(keys, starts) + 1]
    work = starts + _ROW_COST * np.arange(starts.size)
    return Groups(keys, source_rows, starts, np.searchsorted(work, np.linspace(0, work[-1], chunks + 1)))


@njit(cache=True, nogil=True)
def _pack(ids_M, indptr, keys, source_rows):
    count = 0
    for n in range(indptr.size - 1):
        for pair in range(indptr[n], indptr[n + 1]):
            keys[count] = (np.int64(ids_M[pair]) << PAIR_BITS) | pair
            count += ids_M[pair] >= 0  # branch-free: the next key overwrites a pad's
            source_rows[pair] = n
    return count


@njit(cache=True, nogil=True)
def _radix_pass(keys, out, shift, bits):
    """One stable counting pass over ``bits`` bits from ``shift``."""
    mask = (1 << bits) - 1
    at = np.zeros(mask + 1, dtype=np.int64)
    for i in range(keys.size):
        at[(keys[i] >> shift) & mask] += 1
    total = 0
    for digit in range(mask + 1):
        count = at[digit]
        at[digit] = total
        total += count
    for i in range(keys.size):
        digit = (keys[i] >> shift) & mask
        out[at[digit]] = keys[i]
        at[digit] += 1


@njit(cache=True, nogil=True)
def _find_starts(keys, starts):
    count = 0
    last = np.int64(-1)
    for i in range(keys.size):
        group = keys[i] >> PAIR_BITS
        starts[count] = i
        count += group != last  # branch-free: the next group overwrites a start that was none
        last = group
    starts[count] = keys.size
    return count
