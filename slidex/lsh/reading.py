"""What is read of a bucket: its hashed classes, at most `limit` of them, and the classes inserted there.

Buckets are bounded when they are read, not when they are filled. In a compressed table a bounded bucket would
save no time at a build (every class is placed anyway), would make an update depend on history (a class that
leaves should make room for one that was turned away, and nobody remembers which), and would fix the bound for
good; here a bound costs nothing until a bucket is read, and the answer depends on the codes alone.

Every random choice is a hash of an explicit key: the same for any number of threads, and fair to every class
over many keys. Legend: C classes, B = 2^K buckets per table, L tables, I inserted classes in all.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from slidex.kernels.cpu.intrinsics import prefetch_row

OVERFLOWS = ("window", "reservoir", "first")
"""What is read of a bucket that holds more than the limit; see `HashIndex`."""
_RESERVOIR, _FIRST = 1, 2
_PREFETCHED = 1024

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_HALF = np.uint64(32)


class Buckets(NamedTuple):
    """Bucket tables as the kernels see them.

    Attributes:
        offsets: int32 (L, B + 1): bucket b of table t is ``ids[t, offsets[t, b]:offsets[t, b + 1]]``.
        ids: int32 (L, C), ascending within a bucket.
        inserted_offsets: int32 (L, B + 1), or (0, 0) for no insertion.
        inserted_starts: int64 (L + 1,): the classes inserted in bucket b of table t are ``inserted_ids`` from
            ``inserted_starts[t] + inserted_offsets[t, b]`` to ``... + inserted_offsets[t, b + 1]``.
        inserted_ids: int32 (I,), ascending within a bucket.
        limit: The most hashed classes read of one bucket.
        overflow: Position in `OVERFLOWS`.
        seed: uint64, keys the reservoirs.
    """

    offsets: np.ndarray
    ids: np.ndarray
    inserted_offsets: np.ndarray
    inserted_starts: np.ndarray
    inserted_ids: np.ndarray
    limit: int
    overflow: int
    seed: np.uint64


@numba.njit(cache=True, nogil=True, inline="always")
def mix(value):
    """The splitmix64 finaliser (Steele et al. 2014), a bijection of uint64 to uint64."""
    value = np.uint64(value) + _GOLDEN
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def uniform_below(key, count):
    """An integer in ``[0, count)`` from a uint64 key, each equally likely to within ``count / 2^32``."""
    return np.int64(((mix(key) >> _HALF) * np.uint64(count)) >> _HALF)


@numba.njit(cache=True, nogil=True)
def bucket_key(key, table, bucket):
    """A uint64 key of one bucket."""
    return mix(key ^ mix(np.uint64(table) << _HALF | np.uint64(bucket)))


@numba.njit(cache=True, nogil=True)
def draw_reservoir(row, limit, key, out):
    """A sample of `limit` entries of `row`, each with probability ``limit / len(row)``.

    One from each of `limit` stretches of near equal length, all turned by a random amount: the turn makes the
    odds exactly equal, the stretches keep the sample in order, free of repeats and O(limit).

    Args:
        row: int32 (S,), S above `limit`.
        limit: At least 1.
        key: uint64.
        out: int32 (limit,) or longer, receives the entries in order from the turning point on.

    Returns:
        How many entries come before the order wraps around to the start of `row`.
    """
    size = len(row)
    turn = uniform_below(key, size)
    length, rest = size // limit, size % limit
    unwrapped = first = error = np.int64(0)
    for i in range(limit):  # stretch i ends at (i + 1) * size // limit
        error += rest
        longer = np.int64(error >= limit)
        error -= longer * limit
        at = first + uniform_below(key + np.uint64(i + 1), length + longer) + turn
        first += length + longer
        unwrapped += at < size
        out[np.uint64(i)] = row[np.uint64(at if at < size else at - size)]
    return unwrapped


@numba.njit(cache=True, nogil=True)
def read_bucket(buckets, table, bucket, key, scratch):
    """The hashed classes to read of one bucket.

    Args:
        buckets: `Buckets`.
        table: t.
        bucket: b.
        key: uint64, places the window of an overfull bucket.
        scratch: int32 (limit,) for a reservoir.

    Returns:
        ``(ids, start, count)``: read `count` of `ids` from place `start` on, going round at the end. The part
        before the end and the part after it each ascend.
    """
    row = buckets.ids[table, buckets.offsets[table, bucket] : buckets.offsets[table, bucket + 1]]
    size, limit = len(row), buckets.limit
    if size <= limit:
        return row, np.int64(0), np.int64(size)
    if buckets.overflow == _RESERVOIR:
        turned = draw_reservoir(row, limit, bucket_key(buckets.seed, table, bucket), scratch)
        return scratch[:limit], turned % limit, np.int64(limit)
    if buckets.overflow == _FIRST:
        return row, np.int64(0), np.int64(limit)
    return row, uniform_below(key, size), np.int64(limit)


@numba.njit(cache=True, nogil=True)
def prefetch_bucket(buckets, table, bucket):
    """Ask for the hashed classes of a bucket that is about to be read, up to the limit.

    A bucket is somewhere in hundreds of megabytes; this hides the wait for its first lines (a fifth to a third
    of a query).
    """
    first = buckets.offsets[table, bucket]
    last = min(buckets.offsets[table, bucket + 1], first + min(buckets.limit, _PREFETCHED))
    prefetch_row(buckets.ids[table : table + 1, first:last], 0)


@numba.njit(cache=True, nogil=True)
def has_inserted(buckets):
    """Whether any table may hold inserted classes."""
    return len(buckets.inserted_offsets) > 0


@numba.njit(cache=True, nogil=True)
def read_inserted(buckets, table, bucket):
    """The classes inserted in one bucket: int32, ascending."""
    start, offsets = buckets.inserted_starts[table], buckets.inserted_offsets[table]
    return buckets.inserted_ids[start + offsets[bucket] : start + offsets[bucket + 1]]


@numba.njit(cache=True, nogil=True)
def scratch_size(buckets):
    """Length of the scratch that `read_bucket` needs."""
    return buckets.limit if buckets.overflow == _RESERVOIR else np.int64(0)
