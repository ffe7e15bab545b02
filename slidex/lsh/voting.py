"""Numba kernels that count, for a query, how often each class turns up in the buckets it is sent to.

A class's votes are the number of looked-up buckets that hold it. Votes live in a scratch array of one small
integer per class that is left all zero, reset through the list of touched classes, so a query costs what its
buckets hold and never C. Every random choice (which part of an overfull bucket is read, which of equally
voted classes are kept) is a hash of an explicit key: the same for any number of threads, and fair to every
class over many keys, where taking the first would always favour low ids.

Legend: N rows in a batch, C classes, B = 2^K buckets per table, L tables, V codes looked up per table, T
    threads.
"""

from __future__ import annotations

import numba
import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@numba.njit(cache=True, nogil=True, inline="always")
def mix(value):
    """The splitmix64 finaliser (Steele et al. 2014), a bijection of uint64 to uint64."""
    value = np.uint64(value) + _GOLDEN
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


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
def _window(size, limit, key):
    """Start and length of the part of a bucket to read: all, or `limit` entries from a random start."""
    if size <= limit:
        return 0, size
    return np.int64(mix(key) % np.uint64(size)), limit


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
def _vote(offsets, ids, codes_LV, key, max_bucket, votes, touched, repeated):
    """Count one query's votes; returns how many classes have one vote or more, and two or more."""
    count = repeats = 0
    versions = codes_LV.shape[1]
    for t in range(codes_LV.shape[0]):
        for v in range(versions):
            first = offsets[t, codes_LV[t, v]]
            size = offsets[t, codes_LV[t, v] + 1] - first
            start, take = _window(size, max_bucket, key + np.uint64(t * versions + v))
            tail = min(take, size - start)
            row = ids[t, first : first + size]
            count, repeats = _vote_run(row[start : start + tail], votes, touched, repeated, count, repeats)
            count, repeats = _vote_run(row[: take - tail], votes, touched, repeated, count, repeats)
    return count, repeats


@numba.njit(cache=True, nogil=True)
def _draw(items, i, key):
    """Step i of a Fisher-Yates shuffle: swap a random one of ``items[i:]`` into place i and return it."""
    j = i + np.int64(mix(key ^ mix(np.uint64(i))) % np.uint64(len(items) - i))
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
            out_K[i] = _draw(ranked[: ends[level]], i, key)
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
        c = _draw(touched, i, ~key)
        i += 1
        if votes[c] == 1:
            out_K[taken] = c
            taken += 1
    out_K[taken:] = -1
    for i in range(len(touched)):
        votes[np.uint32(touched[i])] = 0


@numba.njit(cache=True, nogil=True, parallel=True)
def query_tables(offsets, ids, codes_NLV, keys_N, min_votes, max_bucket, votes_TC, capacity, out_NK):
    """Top k classes by votes for each query.

    Reads `offsets`, `ids`; writes `out_NK`; leaves `votes_TC` zero. Deterministic: no atomics, one thread a
    row.

    Args:
        offsets: int32 (L, B + 1).
        ids: int32 (L, C).
        codes_NLV: int32 (N, L, V).
        keys_N: uint64 (N,), one random key per query.
        min_votes: At least 1; classes with fewer votes are left out.
        max_bucket: The most classes read from one bucket.
        votes_TC: (T, C) scratch of zeros, unsigned, able to hold ``L * V``.
        capacity: The most classes one query can touch.
        out_NK: int64 (N, k).
    """
    threads = votes_TC.shape[0]
    num_rows = codes_NLV.shape[0]
    levels = codes_NLV.shape[1] * codes_NLV.shape[2] + 1
    for chunk in numba.prange(threads):
        touched = np.empty(capacity + 1, dtype=np.int32)
        repeated = np.empty(capacity + 1, dtype=np.int32)
        ranked = np.empty(capacity, dtype=np.int32)
        ends = np.empty(levels, dtype=np.int64)
        votes = votes_TC[chunk]
        for n in range(num_rows * chunk // threads, num_rows * (chunk + 1) // threads):
            key = keys_N[n]
            count, repeats = _vote(offsets, ids, codes_NLV[n], key, max_bucket, votes, touched, repeated)
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
def query_capacity(offsets, codes_NLV, max_bucket):
    """The most classes any of the queries can touch."""
    largest = 0
    for n in range(codes_NLV.shape[0]):
        total = 0
        for t in range(codes_NLV.shape[1]):
            for v in range(codes_NLV.shape[2]):
                bucket = codes_NLV[n, t, v]
                total += min(offsets[t, bucket + 1] - offsets[t, bucket], max_bucket)
        largest = max(largest, total)
    return largest


@numba.njit(cache=True, nogil=True)
def _vote_range(ids, low, high, weight, votes, touched, count):
    """`weight` votes for each of the ascending `ids` in ``[low, high)``."""
    for i in range(np.searchsorted(ids, low), len(ids)):
        c = ids[i]
        if c >= high:
            break
        if votes[c] == 0:
            touched[low + count] = c
            count += 1
        votes[c] += weight
    return count


@numba.njit(cache=True, nogil=True, parallel=True)
def pool_votes(offsets, ids, codes_LM, key, max_bucket, votes, touched, counts_T):
    """Votes of a whole batch, each thread counting its own range of classes: no atomics.

    A bucket wanted by several queries is read once and its classes get that many votes.

    Args:
        offsets: int32 (L, B + 1).
        ids: int32 (L, C), ascending within a bucket.
        codes_LM: int32 (L, M), all codes looked up in each table, sorted in place.
        key: uint64; chooses what is read of a bucket larger than `max_bucket`.
        max_bucket: The most classes read from one bucket.
        votes: int32 (C,), zeros; receives the votes.
        touched: int32 (C,); thread t's touched classes are written from ``C * t // T`` on.
        counts_T: int64 (T,), receives how many classes each thread touched.
    """
    for t in numba.prange(codes_LM.shape[0]):
        codes_LM[t].sort()
    threads, num_classes, num_codes = len(counts_T), len(votes), codes_LM.shape[1]
    for chunk in numba.prange(threads):
        low, high = num_classes * chunk // threads, num_classes * (chunk + 1) // threads
        count = 0
        for t in range(codes_LM.shape[0]):
            codes = codes_LM[t]
            i = 0
            while i < num_codes:
                bucket, run = codes[i], i
                while i < num_codes and codes[i] == bucket:
                    i += 1
                first = offsets[t, bucket]
                row = ids[t, first : offsets[t, bucket + 1]]
                bucket_key = key ^ mix(np.uint64(t) << np.uint64(32) | np.uint64(bucket))
                start, take = _window(len(row), max_bucket, bucket_key)
                tail = min(take, len(row) - start)
                count = _vote_range(row[start : start + tail], low, high, i - run, votes, touched, count)
                count = _vote_range(row[: take - tail], low, high, i - run, votes, touched, count)
        counts_T[chunk] = count


@numba.njit(cache=True, nogil=True)
def take_votes(touched, counts_T, votes):
    """Gather what `pool_votes` counted and set the votes back to zero.

    Returns:
        int64 (M,) ids and int32 (M,) votes of the touched classes.
    """
    total = counts_T.sum()
    ids, found = np.empty(total, dtype=np.int64), np.empty(total, dtype=np.int32)
    at = 0
    for chunk in range(len(counts_T)):
        low = len(votes) * chunk // len(counts_T)
        for i in range(low, low + counts_T[chunk]):
            ids[at], found[at] = touched[i], votes[touched[i]]
            votes[touched[i]] = 0
            at += 1
    return ids, found
