"""Numba-CUDA kernels that count how often each class turns up in the buckets that queries are sent to.

The counts equal those of `slidex.lsh.voting`. A row's classes are counted in a hash table in global memory whose
size follows what the row's buckets hold, not C, and its k best are found by a radix selection over (votes,
scattered class), which no two classes share: which slot a class gets depends on the order of the threads, the
answer does not. Only integers are added atomically.

Legend: N rows in a batch, C classes, B = 2^K buckets per table, L tables, V codes looked up per table, T blocks
    of threads, W slots of a block's hash table.
"""

from __future__ import annotations

import numpy as np

from slidex.kernels.cuda.launch import WARP, cuda, kernel, types
from slidex.lsh.cuda.reading import bucket_key, mix, place, query_key, scatter, turn

_DIGIT = 8
_BINS = 1 << _DIGIT
HASH_DIGITS = 4
"""Digits of a scattered class; digits of the votes come before them."""


NEVER = np.int64(2**63 - 1)
"""The order of a class that a pool does not take."""


@cuda.jit(device=True)
def _size(offsets, table, bucket):
    return np.int64(offsets[table, bucket + 1]) - np.int64(offsets[table, bucket])


@cuda.jit(device=True)
def _entries(offsets, codes_LV, limit, total):
    """Adds to ``total[0]`` (shared, zero) how many classes the whole block is to read for one query."""
    versions = codes_LV.shape[1]
    for x in range(cuda.threadIdx.x, codes_LV.shape[0] * versions, cuda.blockDim.x):
        t = x // versions
        cuda.atomic.add(total, 0, min(limit, _size(offsets, t, codes_LV[t, x % versions])))


@cuda.jit(device=True)
def _count(c, key, slots, mask):
    """One vote for class c, in the first slot from its scattered place on that is its own or free."""
    at = np.int64(scatter(c, key)) & mask
    while True:
        holder = cuda.atomic.cas(slots, (at, 0), -1, c)
        if holder < 0 or holder == c:
            cuda.atomic.add(slots, (at, 1), 1)
            return
        at = (at + 1) & mask


@cuda.jit(device=True)
def _vote(offsets, ids, codes_LV, limit, overflow, seed, key, slots, mask):
    """Count one query's votes with the whole block, a warp for each bucket."""
    versions = codes_LV.shape[1]
    for x in range(cuda.threadIdx.x // WARP, codes_LV.shape[0] * versions, cuda.blockDim.x // WARP):
        t = x // versions
        bucket = codes_LV[t, x % versions]
        size, low = _size(offsets, t, bucket), np.int64(offsets[t, bucket])
        begin = turn(t, bucket, size, limit, overflow, seed, key + np.uint64(x))
        for i in range(cuda.threadIdx.x % WARP, min(size, limit), WARP):
            at = place(t, bucket, size, limit, overflow, seed, begin, i)
            _count(ids[t, low + at], key, slots, mask)


@cuda.jit(device=True)
def _rank(c, votes, key):
    """A number that orders classes by votes, then at random, each another: int64."""
    return np.int64(votes) << np.int64(_DIGIT * HASH_DIGITS) | np.int64(scatter(c, key))


@cuda.jit(device=True)
def _threshold(slots, size, key, min_votes, digits, k, histogram, found):
    """The k-th largest rank of classes with `min_votes` or more; where there are fewer, a rank below theirs.

    Radix selection from the highest of `digits` digits down, until a digit's bin is wanted as a whole. Shared
    memory: `histogram` int32 (`_BINS`,), `found` int64 (3,): the digit, how many are wanted of its bin, whether
    these are all. All threads of the block must call it, and get the same.
    """
    prefix, wanted = np.int64(0), np.int64(k)
    for digit in range(digits - 1, -1, -1):
        shift = np.int64(_DIGIT * digit)
        for b in range(cuda.threadIdx.x, _BINS, cuda.blockDim.x):
            histogram[b] = 0
        cuda.syncthreads()
        for at in range(cuda.threadIdx.x, size, cuda.blockDim.x):
            if slots[at, 1] >= min_votes:
                rank = _rank(slots[at, 0], slots[at, 1], key)
                if rank >> shift >> np.int64(_DIGIT) == prefix:
                    cuda.atomic.add(histogram, (rank >> shift) & np.int64(_BINS - 1), 1)
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            b = _BINS - 1
            while b > 0 and histogram[b] < wanted:
                wanted -= histogram[b]
                b -= 1
            found[0], found[1], found[2] = b, wanted, histogram[b] <= wanted
        cuda.syncthreads()
        prefix, wanted, whole = prefix << np.int64(_DIGIT) | found[0], found[1], found[2]
        cuda.syncthreads()
        if whole:
            return prefix << shift
    return prefix


@kernel
def query_tables(
    offsets,
    ids,
    codes_NLV,
    limit,
    overflow,
    seed,
    step,
    min_votes,
    digits,
    slots_TW2,
    ranks_NK,
    ids_NK,
):
    """The k most voted classes of each query, in no order.

    Reads per query two offsets for each looked-up bucket and 4 bytes for each class in it; the hash table takes
    8 bytes for each of at least twice as many slots, read once per digit of the selection (as a rule two or three).
    Atomics: compare-and-swap and integer add. Deterministic but for the order within a row of the answer, which
    `ranks_NK` settles. Grid: any number of blocks up to T, one row a block at a time; whole warps. Reference:
    `slidex.lsh.voting.query_tables`, whose votes it has; equal votes it ranks otherwise.

    Args:
        offsets: int32 (L, B + 1), as in `slidex.lsh.reading.Buckets`.
        ids: int32 (L, C).
        codes_NLV: int32 (N, L, V).
        limit: The most classes read of one bucket.
        overflow: Position in `slidex.lsh.reading.OVERFLOWS`.
        seed: Non-negative; keys reservoirs, windows and ranks.
        step: Non-negative; with the query's codes keys windows and ranks.
        min_votes: At least 1.
        digits: 8-bit digits of the largest rank.
        slots_TW2: int32 (T, W, 2) scratch of any content: class and votes of each slot; W a power of two, at
            least twice the distinct classes of any query.
        ranks_NK: int64 (N, k), filled with -1; receives a number that grows with the votes, distinct in a row.
        ids_NK: int32 (N, k), filled with -1; receives the classes.
    """
    histogram = cuda.shared.array(_BINS, types.int32)
    found = cuda.shared.array(3, types.int64)
    keys = cuda.shared.array(1, types.uint64)
    slots = slots_TW2[cuda.blockIdx.x]
    root = np.uint64(seed)
    start_key = mix(root) ^ mix(~np.uint64(step))
    for n in range(cuda.blockIdx.x, codes_NLV.shape[0], cuda.gridDim.x):
        codes_LV = codes_NLV[n]
        if cuda.threadIdx.x == 0:
            found[0] = 0
            keys[0] = query_key(codes_LV, start_key)
        cuda.syncthreads()
        key = keys[0]
        _entries(offsets, codes_LV, limit, found)
        cuda.syncthreads()
        size = np.int64(1)
        while size < 2 * found[0] and size < slots.shape[0]:
            size *= 2
        for at in range(cuda.threadIdx.x, size, cuda.blockDim.x):
            slots[at, 0] = -1
            slots[at, 1] = 0
        cuda.syncthreads()
        _vote(offsets, ids, codes_LV, limit, overflow, root, key, slots, size - 1)
        cuda.syncthreads()
        least = _threshold(slots, size, key, min_votes, digits, ranks_NK.shape[1], histogram, found)
        if cuda.threadIdx.x == 0:
            found[0] = 0
        cuda.syncthreads()
        for at in range(cuda.threadIdx.x, size, cuda.blockDim.x):
            if slots[at, 1] >= min_votes:
                rank = _rank(slots[at, 0], slots[at, 1], key)
                if rank >= least:
                    column = cuda.atomic.add(found, 0, 1)
                    ranks_NK[n, column] = rank
                    ids_NK[n, column] = slots[at, 0]
        cuda.syncthreads()


@kernel
def pool_votes(offsets, ids, codes_NLV, limit, overflow, seed, step, votes_C):
    """Votes of a whole batch: one for every class of every bucket that any query looks up.

    Reads two offsets for each looked-up bucket and 4 bytes for each class in it, adds 4 bytes for each. Atomics:
    integer add. Deterministic. Grid: any, of whole warps, each a bucket at a time. Reference:
    `slidex.lsh.voting.pool_votes`, which it equals.

    Args:
        offsets: int32 (L, B + 1).
        ids: int32 (L, C).
        codes_NLV: int32 (N, L, V).
        limit: The most classes read of one bucket.
        overflow: Position in `slidex.lsh.reading.OVERFLOWS`.
        seed: Non-negative; keys reservoirs and windows.
        step: Non-negative; keys windows: a bucket has one for the whole batch.
        votes_C: int32 (C,), zeros; receives the votes.
    """
    tables, versions = codes_NLV.shape[1], codes_NLV.shape[2]
    root = np.uint64(seed)
    key = mix(root ^ np.uint64(step))
    lookups = codes_NLV.shape[0] * tables * versions
    for x in range(cuda.grid(1) // WARP, lookups, cuda.gridsize(1) // WARP):
        n, t, v = x // (tables * versions), x // versions % tables, x % versions
        bucket = codes_NLV[n, t, v]
        size, low = _size(offsets, t, bucket), np.int64(offsets[t, bucket])
        begin = turn(t, bucket, size, limit, overflow, root, bucket_key(key, t, bucket))
        for i in range(cuda.threadIdx.x % WARP, min(size, limit), WARP):
            at = place(t, bucket, size, limit, overflow, root, begin, i)
            cuda.atomic.add(votes_C, ids[t, low + at], 1)


@kernel
def rank_votes(votes_C, cut, seed, step, order_C):
    """The order in which a pool takes classes: those above the cut, those at it by their hashes, no others.

    Reads 4 bytes a class, writes 8. No atomics. Deterministic. Grid: any. Reference: `BucketTables.pool`.

    Args:
        votes_C: int32 (C,), from `pool_votes`.
        cut: int32 (1,), the fewest votes that a class of the pool may have.
        seed: Non-negative.
        step: Non-negative.
        order_C: int64 (C,), written: -1, the hash's first 62 bits, or `NEVER`.
    """
    key = mix(np.uint64(seed) ^ np.uint64(step))
    for c in range(cuda.grid(1), votes_C.shape[0], cuda.gridsize(1)):
        if votes_C[c] > cut[0]:
            order_C[c] = np.int64(-1)
        elif votes_C[c] == cut[0]:
            order_C[c] = np.int64(mix(np.uint64(c) ^ key) >> np.uint64(2))
        else:
            order_C[c] = NEVER
