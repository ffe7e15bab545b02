"""Numba kernels that take the first classes they meet and stop, as SLIDE does, instead of counting votes.

A query reads what it needs for k distinct classes and no more: far fewer entries than counting all votes, for
candidates that are worth less (a class is as good as the one bucket it was found in). The order of the tables
and the place where reading a bucket begins are keyed by the query, so that no class gains by its id.

Legend: N rows in a batch, C classes, L tables, V codes looked up per table, T threads.
"""

from __future__ import annotations

import numba
import numpy as np

from slidex.lsh.reading import (
    bucket_key,
    has_inserted,
    read_bucket,
    read_inserted,
    scratch_size,
    uniform_below,
)
from slidex.lsh.voting import draw


@numba.njit(cache=True, nogil=True)
def _take(ids, start, count, seen, out, found):
    """Append the unseen of `count` ids from place `start` on, going round, until `out` is full."""
    at = start
    for _ in range(count):
        if found == len(out):
            break
        c = np.uint32(ids[np.uint64(at)])
        out[np.uint64(found)] = c
        found += seen[c] == 0
        seen[c] = 1
        at = at + 1 if at + 1 < len(ids) else 0
    return found


@numba.njit(cache=True, nogil=True)
def _take_bucket(buckets, table, bucket, key, scratch, seen, out, found):
    """Append the classes of one bucket, inserted ones first, each part from a random place on."""
    if has_inserted(buckets):
        inserted = read_inserted(buckets, table, bucket)
        if len(inserted):
            found = _take(inserted, uniform_below(~key, len(inserted)), len(inserted), seen, out, found)
    if found == len(out):
        return found
    ids, start, count = read_bucket(buckets, table, bucket, key, scratch)
    if count == 0:
        return found
    if count == len(ids):
        start = uniform_below(key, count)
    return _take(ids, start, count, seen, out, found)


@numba.njit(cache=True, nogil=True, parallel=True)
def query_first_come(buckets, codes_NLV, keys_N, seen_TC, out_NK):
    """The first k distinct classes of each query, own buckets of all tables before probed ones.

    Deterministic: a row is one thread's, and its order depends on its key alone.

    Args:
        buckets: `Buckets`.
        codes_NLV: int32 (N, L, V).
        keys_N: uint64 (N,), one random key per query.
        seen_TC: (T, C) scratch of zeros, left zero.
        out_NK: int64 (N, k), in order of arrival, -1 where there are no more.
    """
    threads = seen_TC.shape[0]
    num_rows, num_tables, versions = codes_NLV.shape
    for chunk in numba.prange(threads):
        scratch = np.empty(scratch_size(buckets), dtype=np.int32)
        order = np.empty(num_tables, dtype=np.int32)
        seen = seen_TC[chunk]
        for n in range(num_rows * chunk // threads, num_rows * (chunk + 1) // threads):
            out, found = out_NK[n], 0
            for t in range(num_tables):
                order[t] = t
            for i in range(num_tables * versions):
                if found == len(out):
                    break
                v = i // num_tables
                t = draw(order, i, keys_N[n]) if v == 0 else order[i - v * num_tables]
                key = keys_N[n] + np.uint64(t * versions + v)
                found = _take_bucket(buckets, t, codes_NLV[n, t, v], key, scratch, seen, out, found)
            for i in range(found):
                seen[out[i]] = 0
            out[found:] = -1


@numba.njit(cache=True, nogil=True)
def pool_first_come(buckets, codes_NLV, key, seen, out):
    """The first distinct classes over all (row, table) pairs in random order; own buckets before probed ones.

    One thread: it reads little more than it returns.

    Args:
        buckets: `Buckets`.
        codes_NLV: int32 (N, L, V).
        key: uint64.
        seen: (C,) scratch of zeros, left zero.
        out: int64 (budget,), receives the classes in order of arrival.

    Returns:
        How many were found.
    """
    num_rows, num_tables, versions = codes_NLV.shape
    scratch = np.empty(scratch_size(buckets), dtype=np.int32)
    order = np.arange(num_rows * num_tables)
    found = 0
    for i in range(len(order) * versions):
        if found == len(out):
            break
        v = i // len(order)
        pair = draw(order, i, key) if v == 0 else order[i - v * len(order)]
        n, t = pair // num_tables, pair % num_tables
        pair_key = bucket_key(key, pair, v)
        found = _take_bucket(buckets, t, codes_NLV[n, t, v], pair_key, scratch, seen, out, found)
    for i in range(found):
        seen[out[i]] = 0
    return found
