"""Numba kernels that count votes of a whole batch: the candidates of one pool for all of its rows.

A batch wants about a thousand buckets that lie anywhere, of a few hundred ids each, and every id is a vote for its
class. Over millions of classes these votes, counted bucket by bucket, would each wait for memory. Ids ascend within a
bucket, so they are counted span by span of classes instead: each bucket is read from where the last span ended, and the
counters of a span stay in the second-level cache. What counting leaves is read in order.

Legend: C classes, B = 2^K buckets per table, L tables, M codes looked up per table, R distinct buckets among them, T
    threads, S classes in a span, P pieces of buckets: what is read of one without a turn.
"""

from __future__ import annotations

import numba
import numpy as np

from slidex.kernels.cpu.intrinsics import prefetch_at
from slidex.lsh.reading import (
    OVERFLOWS,
    bucket_key,
    has_inserted,
    read_bucket,
    read_inserted,
)

SPAN = 1 << 17
"""S: their counters, four bytes each, are half of a second-level cache of 1 MB. Half or twice as many are slower."""
_RESERVOIR = OVERFLOWS.index("reservoir")
_PIECES_AHEAD = 4


@numba.njit(cache=True, nogil=True)
def distinct_buckets(codes_LM):
    """The buckets that are looked up, each once: int64 (R, 3), table, bucket, and how often.

    Args:
        codes_LM: int32 (L, M), all codes looked up in each table, ascending.
    """
    wanted_R3 = np.empty((codes_LM.size, 3), dtype=np.int64)
    found = np.int64(0)
    for t in range(codes_LM.shape[0]):
        i = 0
        while i < codes_LM.shape[1]:
            bucket, first = codes_LM[t, i], i
            while i < codes_LM.shape[1] and codes_LM[t, i] == bucket:
                i += 1
            wanted_R3[found, 0], wanted_R3[found, 1], wanted_R3[found, 2] = t, bucket, i - first
            found += 1
    return wanted_R3[:found]


@numba.njit(cache=True, nogil=True)
def _hashed_entries(buckets, wanted_R3):
    """How many hashed classes are read of all buckets that are looked up."""
    entries = np.int64(0)
    for r in range(len(wanted_R3)):
        t, bucket = wanted_R3[r, 0], wanted_R3[r, 1]
        entries += min(buckets.offsets[t, bucket + 1] - buckets.offsets[t, bucket], buckets.limit)
    return entries


@numba.njit(cache=True, nogil=True)
def _add_piece(ids, place, votes, low, high, num_classes, pieces_P3, count):
    """Notes where ascending `ids`, `place` in a larger array, have classes of ``[low, high)``; advances the count."""
    first = 0 if low == 0 else np.searchsorted(ids, low)
    last = len(ids) if high == num_classes else np.searchsorted(ids, high)
    pieces_P3[count, 0], pieces_P3[count, 1], pieces_P3[count, 2] = place + first, place + last, votes
    return count + (last > first)


@numba.njit(cache=True, nogil=True)
def _hashed_pieces(buckets, wanted_R3, key, low, high, sampled):
    """What one thread reads of the hashed classes: int64 (P, 3), first and last place in the ids, and votes of each.

    The ids are those of all tables in a row, or `sampled` where buckets have reservoirs, which are written into it.
    """
    num_classes = buckets.ids.shape[1]
    pieces_P3 = np.empty((2 * len(wanted_R3) + 1, 3), dtype=np.int64)
    count = filled = np.int64(0)
    for r in range(len(wanted_R3)):
        t, bucket, votes = wanted_R3[r, 0], wanted_R3[r, 1], wanted_R3[r, 2]
        ids, start, take = read_bucket(buckets, t, bucket, bucket_key(key, t, bucket), sampled[filled:])
        place = t * num_classes + buckets.offsets[t, bucket]
        if buckets.overflow == _RESERVOIR:
            place = filled
            filled += take
            for i in range(take):
                sampled[place + i] = ids[i]
        tail = min(take, len(ids) - start)
        count = _add_piece(
            ids[start : start + tail], place + start, votes, low, high, num_classes, pieces_P3, count
        )
        count = _add_piece(ids[: take - tail], place, votes, low, high, num_classes, pieces_P3, count)
    return pieces_P3[:count]


@numba.njit(cache=True, nogil=True)
def _inserted_pieces(buckets, wanted_R3, low, high):
    """The same of the inserted classes."""
    num_classes = buckets.ids.shape[1]
    pieces_P3 = np.empty((len(wanted_R3) + 1, 3), dtype=np.int64)
    count = 0
    if has_inserted(buckets):
        for r in range(len(wanted_R3)):
            t, bucket, votes = wanted_R3[r, 0], wanted_R3[r, 1], wanted_R3[r, 2]
            place = buckets.inserted_starts[t] + buckets.inserted_offsets[t, bucket]
            ids = read_inserted(buckets, t, bucket)
            count = _add_piece(ids, place, votes, low, high, num_classes, pieces_P3, count)
    return pieces_P3[:count]


@numba.njit(cache=True, nogil=True)
def _vote_span(ids, pieces_P3, start, end, votes_S, touched, count):
    """Votes of all pieces for the classes in ``[start, end)``; each piece is left to begin where it ended.

    A class's first vote appends it to `touched`, by an entry that is always written and kept by advancing the count.
    """
    for p in range(len(pieces_P3)):
        if p + _PIECES_AHEAD < len(pieces_P3):
            prefetch_at(ids, pieces_P3[p + _PIECES_AHEAD, 0])
        i, last, votes = pieces_P3[p, 0], pieces_P3[p, 1], pieces_P3[p, 2]
        while i < last:
            c = ids[np.uint64(i)]
            if c >= end:
                break
            slot = np.uint32(c - start)
            seen = votes_S[slot]
            touched[np.uint64(count)] = c
            count += seen == 0
            votes_S[slot] = seen + votes
            i += 1
        pieces_P3[p, 0] = i
    return count


@numba.njit(cache=True, nogil=True)
def _settle_span(votes_S, start, touched, votes, first, count, histogram_V):
    """Writes beside the classes ``touched[first:count]`` how many votes they have, counts those, and clears them."""
    for i in range(first, count):
        slot = np.uint32(touched[np.uint64(i)] - start)
        seen = votes_S[slot]
        votes[np.uint64(i)] = seen
        histogram_V[seen] += 1
        votes_S[slot] = 0


@numba.njit(cache=True, nogil=True)
def _vote_range(buckets, wanted_R3, key, low, high, touched, votes, histogram_V):
    """One thread's part of `pool_votes`, the classes in ``[low, high)``; returns how many have votes."""
    reservoirs = buckets.overflow == _RESERVOIR
    sampled = np.empty(_hashed_entries(buckets, wanted_R3) if reservoirs else 0, dtype=np.int32)
    pieces_P3 = _hashed_pieces(buckets, wanted_R3, key, low, high, sampled)
    inserted_P3 = _inserted_pieces(buckets, wanted_R3, low, high)
    ids = sampled if reservoirs else buckets.ids.reshape(-1)
    votes_S = np.zeros(min(SPAN, high - low), dtype=np.int32)
    count = np.int64(0)
    for start in range(low, high, SPAN):
        first, end = count, min(start + SPAN, high)
        count = _vote_span(ids, pieces_P3, start, end, votes_S, touched, count)
        count = _vote_span(buckets.inserted_ids, inserted_P3, start, end, votes_S, touched, count)
        _settle_span(votes_S, start, touched, votes, first, count, histogram_V)
    return count


@numba.njit(cache=True, nogil=True, parallel=True)
def pool_votes(buckets, wanted_R3, key, touched_TE, votes_TE, counts_T, histogram_TV):
    """Votes of a whole batch, each thread counting its own range of classes: no atomics.

    A bucket wanted by several queries is read once and its classes get that many votes.

    Args:
        buckets: `slidex.lsh.reading.Buckets`.
        wanted_R3: int64 (R, 3), from `distinct_buckets`.
        key: uint64; places the windows of overfull buckets.
        touched_TE: int32 (T, E), receives each thread's classes that have votes; E is above C / T + 1.
        votes_TE: int32 (T, E), receives their votes.
        counts_T: int64 (T,), receives how many classes each thread touched.
        histogram_TV: int64 (T, V), zeros; receives how many of these have each number of votes, V above the most.
    """
    threads, num_classes = len(counts_T), buckets.ids.shape[1]
    for chunk in numba.prange(threads):
        low, high = num_classes * chunk // threads, num_classes * (chunk + 1) // threads
        counts_T[chunk] = _vote_range(
            buckets, wanted_R3, key, low, high, touched_TE[chunk], votes_TE[chunk], histogram_TV[chunk]
        )


@numba.njit(cache=True, nogil=True)
def take_most_voted(touched_TE, votes_TE, counts_T, histogram_V, budget, min_votes):
    """Takes the best of what `pool_votes` counted.

    Args:
        touched_TE: int32 (T, E).
        votes_TE: int32 (T, E).
        counts_T: int64 (T,).
        histogram_V: int64 (V,), how many classes have each number of votes.
        budget: At most so many classes.
        min_votes: Classes with fewer votes are left out; at least 1.

    Returns:
        int64 ids of the classes above the cut, fewer than the budget unless all are wanted, and int64 ids of those at
        the cut, of whom the rest of the budget is to be drawn.
    """
    above, cut = np.int64(0), len(histogram_V) - 1  # so many classes have more than `cut` votes
    while cut >= min_votes and above + histogram_V[cut] <= budget:
        above += histogram_V[cut]
        cut -= 1
    equal = histogram_V[cut] if cut >= min_votes else 0
    chosen, level = np.empty(above + 1, dtype=np.int64), np.empty(equal + 1, dtype=np.int64)
    taken = ties = 0
    for chunk in range(len(counts_T)):
        for i in range(counts_T[chunk]):
            seen = votes_TE[chunk, i]
            chosen[np.uint64(taken)] = level[np.uint64(ties)] = touched_TE[chunk, i]
            taken += seen > cut
            ties += seen == cut and equal > 0
    return chosen[:taken].copy(), level[:ties].copy()
