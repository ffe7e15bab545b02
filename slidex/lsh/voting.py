"""Numba kernels that count, for a query, how often each class turns up in the buckets it is sent to.

A class's votes are the number of looked-up buckets that hold it. Votes live in a scratch array of one small
integer per class that is left all zero, as a rule reset through the list of touched classes, so a query costs
what its buckets hold and not C. Which of equally voted classes are kept is a hash of an explicit key: the same
for any number of threads, and fair to every class over many keys, where the first would always favour low ids.

Legend: N rows in a batch, C classes, B = 2^K buckets per table, L tables, V codes looked up per table, T
    threads.
"""

from __future__ import annotations

import numba
import numpy as np

from slidex.lsh.reading import (
    has_inserted,
    mix,
    prefetch_bucket,
    read_bucket,
    read_inserted,
    scratch_size,
    uniform_below,
)

_CLEAR_RATIO = 32
"""Votes are cleared as a whole rather than class by class where one class in 32 or more was touched."""


@numba.njit(cache=True, nogil=True)
def mix_ids(ids, key):
    """A distinct pseudo-random uint64 for each distinct id.

    Args:
        ids: int64 (M,).
        key: uint64.
    """
    out = np.empty(len(ids), dtype=np.uint64)
    for i in range(len(ids)):
        out[i] = mix(np.uint64(ids[i]) ^ key)
    return out


@numba.njit(cache=True, nogil=True)
def _vote_run(ids, votes, touched, repeated, count, repeats):
    """One vote for each of `ids`; a class's first vote appends it to `touched`, its second to `repeated`.

    Free of branches: an entry is always written, and kept by advancing the count. Unsigned indices spare
    numba's wrap-around of negative ones (a quarter of the time).
    """
    for i in range(len(ids)):
        c = np.uint32(ids[i])
        seen = votes[c]
        touched[np.uint64(count)] = c
        count += seen == 0
        repeated[np.uint64(repeats)] = c
        repeats += seen == 1
        votes[c] = seen + 1
    return count, repeats


@numba.njit(cache=True, nogil=True)
def _vote(buckets, codes_LV, key, scratch, votes, touched, repeated):
    """Count one query's votes; returns how many classes have one vote or more, and two or more."""
    count = repeats = 0
    versions = codes_LV.shape[1]
    for t in range(codes_LV.shape[0]):
        for v in range(versions):
            if t + 1 < codes_LV.shape[0]:
                prefetch_bucket(buckets, t + 1, codes_LV[t + 1, v])
            ids, start, take = read_bucket(
                buckets, t, codes_LV[t, v], key + np.uint64(t * versions + v), scratch
            )
            tail = min(take, len(ids) - start)
            count, repeats = _vote_run(ids[start : start + tail], votes, touched, repeated, count, repeats)
            count, repeats = _vote_run(ids[: take - tail], votes, touched, repeated, count, repeats)
            if has_inserted(buckets):
                inserted = read_inserted(buckets, t, codes_LV[t, v])
                count, repeats = _vote_run(inserted, votes, touched, repeated, count, repeats)
    return count, repeats


@numba.njit(cache=True, nogil=True)
def draw(items, i, key):
    """Step i of a Fisher-Yates shuffle: swap a random one of ``items[i:]`` into place i and return it."""
    j = i + uniform_below(key ^ mix(np.uint64(i)), len(items) - i)
    items[i], items[j] = items[j], items[i]
    return items[i]


@numba.njit(cache=True, nogil=True)
def _rank_repeated(repeated, votes, ends, ranked, key, min_votes, out_K):
    """Write classes of two votes or more to `out_K`, most votes first; returns how many were written.

    A counting sort by votes that leaves out the levels below the cut. O(repeated + K).
    """
    ends[:] = 0
    for i in range(len(repeated)):
        ends[votes[repeated[i]]] += 1
    level, filled = len(ends) - 1, 0
    while level >= min_votes and filled < len(out_K):
        ends[level], filled = filled, filled + ends[level]
        level -= 1
    lowest = level + 1
    for i in range(len(repeated)):
        v = votes[repeated[i]]
        if v >= lowest:
            ranked[ends[v]] = repeated[i]
            ends[v] += 1
    taken, i = min(filled, len(out_K)), 0
    for level in range(len(ends) - 1, lowest - 1, -1):
        for i in range(i, min(ends[level], taken)):  # noqa: B020  (each level goes on from the last)
            out_K[i] = draw(ranked[: ends[level]], i, key)
        i = min(ends[level], taken)
    return taken


@numba.njit(cache=True, nogil=True)
def _rank(touched, repeated, votes, ends, ranked, key, min_votes, out_K):
    """Write the K most voted of `touched`, most votes first, and set their votes back to zero.

    Classes of equal votes are in random order, so any prefix of the answer is a fair one. O(touched + K).
    """
    taken = _rank_repeated(repeated, votes, ends, ranked, key, max(min_votes, 2), out_K)
    i = 0
    while min_votes == 1 and taken < len(out_K) and i < len(touched):
        c = draw(touched, i, ~key)
        i += 1
        if votes[c] == 1:
            out_K[taken] = c
            taken += 1
    out_K[taken:] = -1
    if len(touched) * _CLEAR_RATIO > len(votes):
        votes[:] = 0
        return
    for i in range(len(touched)):
        votes[np.uint32(touched[i])] = 0


@numba.njit(cache=True, nogil=True, parallel=True)
def query_tables(buckets, codes_NLV, keys_N, min_votes, votes_TC, capacity, out_NK):
    """Top k classes by votes for each query.

    Writes `out_NK`; leaves `votes_TC` zero. Deterministic: no atomics, one thread a row.

    Args:
        buckets: `slidex.lsh.reading.Buckets`.
        codes_NLV: int32 (N, L, V).
        keys_N: uint64 (N,), one random key per query.
        min_votes: At least 1; classes with fewer votes are left out.
        votes_TC: (T, C) scratch of zeros, unsigned, able to hold ``L * V``, or twice as much with insertion.
        capacity: The most classes one query can touch.
        out_NK: int64 (N, k).
    """
    threads = votes_TC.shape[0]
    num_rows = codes_NLV.shape[0]
    levels = codes_NLV.shape[1] * codes_NLV.shape[2] * (2 if has_inserted(buckets) else 1) + 1
    for chunk in numba.prange(threads):
        scratch = np.empty(scratch_size(buckets), dtype=np.int32)
        touched = np.empty(capacity + 1, dtype=np.int32)
        repeated = np.empty(capacity + 1, dtype=np.int32)
        ranked = np.empty(capacity, dtype=np.int32)
        ends = np.empty(levels, dtype=np.int64)
        votes = votes_TC[chunk]
        for n in range(num_rows * chunk // threads, num_rows * (chunk + 1) // threads):
            key = keys_N[n]
            count, repeats = _vote(buckets, codes_NLV[n], key, scratch, votes, touched, repeated)
            _rank(touched[:count], repeated[:repeats], votes, ends, ranked, key, min_votes, out_NK[n])


@numba.njit(cache=True, nogil=True)
def query_keys(codes_NLV, seed, step):
    """One uint64 key per query from its codes, the seed and the step: independent of the rest of the batch.

    Args:
        codes_NLV: int32 (N, L, V).
        seed: uint64.
        step: uint64.
    """
    keys_N = np.empty(codes_NLV.shape[0], dtype=np.uint64)
    for n in range(len(keys_N)):
        key = mix(seed) ^ mix(~step)
        for t in range(codes_NLV.shape[1]):
            key = mix(key ^ np.uint64(codes_NLV[n, t, 0]))
        keys_N[n] = key
    return keys_N


@numba.njit(cache=True, nogil=True)
def query_capacity(buckets, codes_NLV):
    """The most classes any of the queries can touch."""
    largest = 0
    for n in range(codes_NLV.shape[0]):
        total = 0
        for t in range(codes_NLV.shape[1]):
            for v in range(codes_NLV.shape[2]):
                bucket = codes_NLV[n, t, v]
                size = buckets.offsets[t, bucket + 1] - buckets.offsets[t, bucket]
                total += min(size, buckets.limit)
                if has_inserted(buckets):
                    total += len(read_inserted(buckets, t, bucket))
        largest = max(largest, total)
    return largest
