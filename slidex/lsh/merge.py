"""Moves classes between buckets of one compressed table: a single pass over its ids, in place.

Ids ascend within a bucket and buckets lie side by side, so one class that moves shifts everything between its
two buckets. All moves of a table are therefore applied in one pass: most of it copies runs that no move
interrupts, 32 ids at an instruction or two (an id is compared with the next event while it is copied, so runs
need no search), through a buffer small enough for the cache. Legend: C classes, B buckets, M moves.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

BLOCK = 32
"""Ids copied at a time. Arrays handed to `merge_table` must own this many further entries behind the row."""
_FLUSH = 4096
_NO_BOUND = np.int32(np.iinfo(np.int32).max)


@intrinsic
def _copy_block(_context, row, first, out, at, bound):  # noqa: ARG001  (Numba reads the signature)
    """Copy ``row[first:first + BLOCK]`` to ``out[at:]``; how many of them come before the first that is >= `bound`."""

    def generate(context, builder, signature, arguments):
        word, bits = ir.IntType(32), ir.IntType(BLOCK)
        vector = ir.VectorType(word, BLOCK)

        def block_at(array, position):
            data = context.make_array(signature.args[array])(context, builder, arguments[array]).data
            return builder.bitcast(builder.gep(data, [arguments[position]]), vector.as_pointer())

        block = builder.load(block_at(0, 1), align=4)
        builder.store(block, block_at(2, 3), align=4)
        undefined = ir.Constant(vector, ir.Undefined)
        bounds = builder.insert_element(undefined, arguments[4], ir.Constant(word, 0))
        bounds = builder.shuffle_vector(bounds, undefined, ir.Constant(vector, [0] * BLOCK))
        reached = builder.bitcast(builder.icmp_signed(">=", block, bounds), bits)
        # A bit beyond the block stops the count of trailing zeros where no id reaches the bound.
        stopper = ir.Constant(ir.IntType(64), 1 << BLOCK)
        reached = builder.or_(builder.zext(reached, ir.IntType(64)), stopper)
        return builder.cttz(reached, ir.Constant(ir.IntType(1), 1))

    return types.int64(row, types.int64, out, types.int64, types.int32), generate


@numba.njit(cache=True, nogil=True)
def _copy_below(row, first, last, bound, out, at):
    """Copy the leading ids of ``row[first:last]`` that are below `bound` to ``out[at:]``; returns how many.

    Writes up to BLOCK entries more, which the next copy overwrites.
    """
    done, size = np.int64(0), np.int64(last - first)
    while done < size:
        below = _copy_block(row, first + done, out, at + done, bound)  # pyrefly: ignore[missing-argument]
        if below < BLOCK:
            return min(done + below, size)
        done += BLOCK  # not `below`: the next address must not wait for the count
    return size


@numba.njit(cache=True, nogil=True)
def _copy(source, first, out, at, count):
    for i in range(count):
        out[np.uint64(at + i)] = source[np.uint64(first + i)]


@numba.njit(cache=True, nogil=True)
def _sort_events(old, new, moved, ends, events):
    """Every class's leaving (``2 c``) and entering (``2 c + 1``) by bucket, then by class.

    Afterwards ``ends[b]`` is the end of bucket b's events.
    """
    ends[:] = 0
    for i in range(len(moved)):
        ends[old[i] + 1] += 1
        ends[new[i] + 1] += 1
    for b in range(len(ends) - 1):
        ends[b + 1] += ends[b]
    for i in range(len(moved)):
        twice = np.uint32(moved[i]) << np.uint32(1)
        events[ends[old[i]]] = twice
        ends[old[i]] += 1
        events[ends[new[i]]] = twice | np.uint32(1)
        ends[new[i]] += 1


@numba.njit(cache=True, nogil=True)
def merge_table(row, offsets, old, new, moved):
    """Move classes from bucket to bucket.

    Args:
        row: int32 (C,), the table's ids, ascending within a bucket; memory behind it, see `BLOCK`.
        offsets: int32 (B + 1,), where buckets begin.
        old: int32 (M,), the bucket each class is in.
        new: int32 (M,), the bucket it goes to, another one.
        moved: int64 (M,), the classes, ascending.
    """
    ends, events = np.empty(len(offsets), dtype=np.int32), np.empty(2 * len(moved), dtype=np.uint32)
    _sort_events(old, new, moved, ends, events)
    largest = 0
    for b in range(len(offsets) - 1):
        largest = max(largest, offsets[b + 1] - offsets[b])
    # What waits to be written: less than _FLUSH, a bucket, and by how much the row so far has grown.
    buffer = np.empty(_FLUSH + largest + 2 * len(moved) + BLOCK, dtype=np.int32)
    first = written = at = j = np.int64(0)
    for b in range(len(offsets) - 1):
        last = np.int64(offsets[b + 1])
        while j < ends[b]:
            event = events[np.uint64(j)]
            c, enters = np.int32(event >> np.uint32(1)), np.int64(event & np.uint32(1))
            count = _copy_below(row, first, last, c, buffer, at)
            first, at = first + count, at + count
            buffer[np.uint64(at)] = c
            first, at = first + 1 - enters, at + enters
            j += 1
        count = _copy_below(row, first, last, _NO_BOUND, buffer, at)
        first, at = first + count, at + count
        offsets[b + 1] = written + at
        if at >= _FLUSH or b == len(offsets) - 2:
            ready = min(at, first - written)  # the row is free up to what has been read
            _copy(buffer, 0, row, written, ready)
            _copy(buffer, ready, buffer, 0, at - ready)
            written, at = written + ready, at - ready
