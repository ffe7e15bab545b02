"""Classes proposed by the input's features: those of the training rows most like a row.

Rows lie in an inverted index, so that a row meets just the rows it shares a feature with; the nearest ones vote for
their classes. Letters: N rows, Q rows that ask, F features, C classes, K neighbours, B classes voted for, M entries of
the index.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np
import torch
from numba import njit, prange

from slidex.kernels.cpu.arguments import Arguments
from slidex.kernels.cpu.heap import GROUPS, best_first, less, offer, reached
from slidex.kernels.cpu.intrinsics import prefetch_at
from slidex.kernels.inverted_index import InvertedIndex

if TYPE_CHECKING:
    from slidex.kernels.row_labels import RowLabels

_DENSE = 4
"""Where a row reads more than a fourth as many entries as there are rows, all sums are looked at afterwards."""
_SHARE_HALVINGS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def inverted_index(
    indptr: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    num_features: int,
    *,
    longest: int,
) -> InvertedIndex:
    """The rows by feature, of each feature the `longest` largest values ("champion lists").

    To read the lists of frequent features would take most of a search's time. Values are compared by magnitude; of
    equal ones the lower row comes first. Reference: `slidex.kernels.reference.inverted_index`.

    Args:
        indptr: int64 (N + 1,), the features of the rows.
        indices: int32 or int64 (nnz,), in [0, F), each at most once in a row.
        values: float32 or float64 (nnz,).
        num_features: F.
        longest: Rows of a feature, at most; at least 1.

    Returns:
        An index of the dtype of `values`.

    Raises:
        ConfigError: A shape, dtype, offset or id does not fit, or a number is out of its range.
    """
    check = Arguments("inverted_index", values.dtype)
    num_rows, nnz = max(len(indptr) - 1, 0), len(indices)
    if longest < 1:
        check.fail("longest", "at least 1", longest)
    arrays = (
        check.offsets("indptr", indptr, num_rows, nnz),
        check.ids("indices", indices, (nnz,), 0, num_features),
        check.floats("values", values, (nnz,)),
    )
    ends, rows, kept = map(torch.from_numpy, _invert(*arrays, num_features, longest))
    return InvertedIndex(ends, rows, kept, num_rows)


def nearest_rows(
    index: InvertedIndex,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    k: int,
    *,
    share: float = 1.0,
    own_Q: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k rows of largest inner product, of those above 0; equal ones by id.

    A row's largest values tell rows apart and have the shortest lists; `share` leaves out the others. Deterministic.
    Reference: `slidex.kernels.reference.nearest_rows`.

    Args:
        index: Of N rows over F features.
        indptr: int64 (Q + 1,), the features of the rows that ask.
        indices: int32 or int64 (nnz,), in [0, F), each at most once in a row.
        values: (nnz,), dtype of the index.
        k: Rows for each; at least 1.
        share: Of a row the values of largest magnitude are read (of equal ones the first), until their squares add up
            to this share of the sum of all squares; above 0, at most 1 for all values.
        own_Q: int64 (Q,), a row each that is not to be found, as it is the asking one itself; -1 for none.

    Returns:
        ``(near_QK, products_QK)``: int64, nearest first, padded with -1; their inner products over what was read and
        what the index holds, 0 at pads.

    Raises:
        ConfigError: A shape, dtype, offset or id does not fit, or a number is out of its range.
    """
    check = Arguments("nearest_rows", index.values.dtype)
    if k < 1:
        check.fail("k", "at least 1", k)
    if not 0 < share <= 1:
        check.fail("share", "above 0 and at most 1", share)
    num_rows, nnz = max(len(indptr) - 1, 0), len(indices)
    own_Q = torch.full((num_rows,), -1) if own_Q is None else own_Q
    near_QK, products_QK = torch.empty(num_rows, k, dtype=torch.int64), values.new_empty(num_rows, k)
    _nearest(
        index.indptr.numpy(),
        index.rows.numpy(),
        index.values.numpy(),
        index.num_rows,
        check.offsets("indptr", indptr, num_rows, nnz),
        check.ids("indices", indices, (nnz,), 0, index.num_features),
        check.floats("values", values, (nnz,)),
        share,
        check.ids("own_Q", own_Q, (num_rows,), -1, index.num_rows),
        _chunks(num_rows),
        near_QK.numpy(),
        products_QK.numpy(),
    )
    return near_QK, products_QK


def neighbor_classes(
    near_QK: torch.Tensor,
    weights_QK: torch.Tensor,
    labels: RowLabels,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The classes with the most votes, each neighbour giving its weight to all of its classes; equal ones by id.

    Deterministic. Reference: `slidex.kernels.reference.neighbor_classes`.

    Args:
        near_QK: int32 or int64, the neighbours of Q rows among N, each at most once in a row; -1 for none.
        weights_QK: float32 or float64, above or equal to 0.
        labels: The classes of the N rows, of C.
        count: Classes for each row, B; at least 1.

    Returns:
        ``(ids_QB, votes_QB)``: int64, those with most votes first, of those above 0, padded with -1; their votes, 0 at
        pads.

    Raises:
        ConfigError: A shape, dtype or id does not fit, or a number is out of its range.
    """
    check = Arguments("neighbor_classes", weights_QK.dtype)
    if count < 1:
        check.fail("count", "at least 1", count)
    shape = tuple(near_QK.shape)
    ids_QB = torch.empty(len(near_QK), count, dtype=torch.int64)
    votes_QB = weights_QK.new_empty(len(near_QK), count)
    _vote(
        check.ids("near_QK", near_QK, shape, -1, labels.num_rows),
        check.floats("weights_QK", weights_QK, shape),
        labels.indptr.numpy(),
        labels.classes.numpy(),
        _chunks(len(near_QK)),
        ids_QB.numpy(),
        votes_QB.numpy(),
    )
    return ids_QB, votes_QB


def _chunks(num_rows: int) -> int:
    """One for each thread: each has arrays as long as what is added up."""
    return min(numba.get_num_threads(), max(num_rows, 1))


@njit(cache=True, nogil=True)
def _invert(indptr, indices, values, num_features, longest):
    """Offsets, rows and values by feature, of each feature the `longest` largest values at most."""
    starts = np.zeros(num_features + 1, np.int64)
    for f in indices:
        starts[f + 1] += 1
    starts = np.cumsum(starts)
    rows, kept = np.empty(starts[-1], np.int32), np.empty(starts[-1], values.dtype)
    next_F = starts[:-1].copy()
    for n in range(len(indptr) - 1):
        for j in range(indptr[n], indptr[n + 1]):
            f = indices[j]
            rows[next_F[f]], kept[next_F[f]] = n, values[j]
            next_F[f] += 1
    ends, left = np.zeros(num_features + 1, np.int64), 0
    best, ids = np.empty(longest, values.dtype), np.empty(longest, np.int64)
    for f in range(num_features):
        start, stop = starts[f], starts[f + 1]
        cut, size = stop - start > longest, 0
        for m in range(start, stop if cut else start):
            v = abs(kept[m])
            if size < longest or v >= best[0]:
                size = offer(best, ids, size, v, np.int64(rows[m]))
        for m in range(start, stop):  # what is left moves to the front
            if not cut or not less(abs(kept[m]), rows[m], best[0], ids[0]):
                rows[left], kept[left] = rows[m], kept[m]
                left += 1
        ends[f + 1] = left
    return ends, rows[:left].copy(), kept[:left].copy()


@njit(cache=True, nogil=True, parallel=True)
def _nearest(
    feature_indptr,
    rows,
    row_values,
    num_rows,
    indptr,
    indices,
    values,
    share,
    own_Q,
    chunks,
    near_QK,
    products_QK,
):
    for chunk in prange(chunks):
        part = slice(len(near_QK) * chunk // chunks, len(near_QK) * (chunk + 1) // chunks)
        _nearest_of(
            feature_indptr,
            rows,
            row_values,
            num_rows,
            indptr[part.start : part.stop + 1],
            indices,
            values,
            share,
            own_Q[part],
            near_QK[part],
            products_QK[part],
        )


@njit(nogil=True)
def _nearest_of(
    feature_indptr, rows, row_values, num_rows, indptr, indices, values, share, own_Q, near_QK, products_QK
):
    sum_N, sums = np.zeros(num_rows, row_values.dtype), np.empty(num_rows, row_values.dtype)
    touched = np.empty(num_rows, np.int32)
    for q in range(len(near_QK)):
        row, width, entries = slice(indptr[q], indptr[q + 1]), 0, 0
        read = _largest(values[row], share)
        for j in read:
            f = indices[row.start + j]
            entries += feature_indptr[f + 1] - feature_indptr[f]
        if entries * _DENSE > num_rows:
            width = num_rows
        for j in read:
            f, v = indices[row.start + j], values[row.start + j]
            own = slice(feature_indptr[f], feature_indptr[f + 1])
            if entries * _DENSE > num_rows:
                _add(rows[own], row_values[own], v, sum_N)
            else:
                width = _add_noting(rows[own], row_values[own], v, sum_N, touched, width)
        if own_Q[q] >= 0:
            sum_N[own_Q[q]] = 0
        every = width == num_rows  # one may be noted twice and another not at all
        if every:
            sums[:], sum_N[:] = sum_N, 0
        else:
            for t in range(width):
                sums[t] = sum_N[touched[t]]
                sum_N[touched[t]] = 0
        _take_best(sums[:width], touched, every, near_QK[q], products_QK[q])


@njit(nogil=True)
def _add(rows, row_values, v, sum_N):
    for m in range(len(rows)):
        sum_N[np.uint32(rows[m])] += v * row_values[m]


@njit(nogil=True)
def _add_noting(rows, row_values, v, sum_N, touched, width):
    """Notes those whose sum was 0 too: twice, should it have come back to 0."""
    for m in range(len(rows)):
        n = np.uint32(rows[m])
        if sum_N[n] == 0 and width < len(touched):
            touched[width] = n
            width += 1
        sum_N[n] += v * row_values[m]
    return width


@njit(cache=True, nogil=True, parallel=True)
def _vote(near_QK, weights_QK, label_indptr, labels, chunks, ids_QB, votes_QB):
    for chunk in prange(chunks):
        part = slice(len(near_QK) * chunk // chunks, len(near_QK) * (chunk + 1) // chunks)
        _vote_of(near_QK[part], weights_QK[part], label_indptr, labels, ids_QB[part], votes_QB[part])


@njit(nogil=True)
def _vote_of(near_QK, weights_QK, label_indptr, labels, ids_QB, votes_QB):
    slots, classes, sums = np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, weights_QK.dtype)
    for q in range(len(near_QK)):
        near_K, votes, size = near_QK[q], 0, 1
        for k in range(len(near_K)):
            prefetch_at(label_indptr, max(near_K[k], 0))
        for k in range(len(near_K)):
            if near_K[k] >= 0:
                first = label_indptr[near_K[k]]
                votes += label_indptr[near_K[k] + 1] - first
                prefetch_at(labels, first)
        while size < 2 * votes:
            size *= 2
        if size > len(slots):
            slots, classes, sums = (
                np.empty(size, np.int32),
                np.empty(size, np.int32),
                np.empty(size, sums.dtype),
            )
        width = _count_votes(near_K, weights_QK[q], label_indptr, labels, slots[:size], classes, sums)
        _take_best(sums[:width], classes, False, ids_QB[q], votes_QB[q])


@njit(nogil=True)
def _count_votes(near_K, weights_K, label_indptr, labels, slots, classes, sums):
    """Lists the classes that have votes, and their votes; how many there are.

    `slots` is a table, twice as long as there are votes, of where a class is listed: arrays over all classes would be
    in no cache.
    """
    slots[:], width = -1, 0
    for k in range(len(near_K)):
        n = near_K[k]
        for j in range(label_indptr[n] if n >= 0 else 0, label_indptr[n + 1] if n >= 0 else 0):
            c = labels[j]
            slot = (np.uint64(c) * _GOLDEN >> np.uint64(32)) & np.uint64(len(slots) - 1)
            while slots[slot] >= 0 and classes[slots[slot]] != c:
                slot = (slot + np.uint64(1)) & np.uint64(len(slots) - 1)
            if slots[slot] < 0:
                slots[slot], classes[width], sums[width] = width, c, 0
                width += 1
            sums[slots[slot]] += weights_K[k]
    return width


@njit(nogil=True)
def _take_best(sums, ids, every, ids_K, best_K):
    """The largest sums above 0 and whose they are, best first, -1 and 0 where there are fewer.

    Place t is of ``ids[t]``, or where `every` one has its place, of t.
    """
    width, size = len(sums), 0
    groups = min(GROUPS * len(ids_K), max(width, 1))  # place t is of group t % groups
    best_G = np.zeros(groups, sums.dtype)
    for start in range(0, width, groups):
        _raise(best_G, sums[start : start + groups])
    least = max(reached(best_G, len(ids_K)), np.finfo(sums.dtype).tiny)
    for g in range(groups):
        if best_G[g] < least:
            continue
        for t in range(g, width, groups):
            if sums[t] >= least:  # a call for each would cost more than all else
                size = offer(best_K, ids_K, size, sums[t], np.int64(t if every else ids[t]))
    ids_K[size:], best_K[size:] = -1, 0
    best_first(best_K, ids_K, size)


@njit(nogil=True)
def _raise(best_G, sums_G):
    for g in range(len(sums_G)):
        best_G[g] = sums_G[g] if sums_G[g] > best_G[g] else best_G[g]


@njit(nogil=True)
def _largest(values, share):
    """Which values have so much of the sum of squares, in rising order."""
    if share == 1:
        return np.arange(len(values))
    square, high = 0.0, values.dtype.type(0)
    for v in values:
        square += v * v
        high = max(high, abs(v))
    # A bound that some more than the share lies above spares the others being sorted.
    low, wanted = values.dtype.type(0), (1 + 1e-4) * share * square
    for _ in range(_SHARE_HALVINGS):
        middle = (low + high) / 2
        if _square_above(values, middle) >= wanted:
            low = middle
        else:
            high = middle
    above = np.flatnonzero(np.abs(values) >= low)
    order = above[np.argsort(-np.abs(values[above]), kind="mergesort")]
    left, size = share * square, 0
    while left > 0 and size < len(order):
        left -= values[order[size]] * values[order[size]]
        size += 1
    return np.sort(order[:size])


@njit(nogil=True)
def _square_above(values, least):
    square = values.dtype.type(0)
    for i in range(len(values)):
        square += values[i] * values[i] if abs(values[i]) >= least else values.dtype.type(0)
    return square
