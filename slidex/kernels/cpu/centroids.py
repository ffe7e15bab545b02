"""Classes proposed by the input's features: those whose training rows look most like the row.

A class is described by the mean of its training rows' features (the "positive instance feature aggregation" of PECOS,
Yu et al., JMLR 2022). Its largest components are kept in inverted lists, so that a row meets just the classes it shares
a feature with. A class of a single row is found as by a search for nearest neighbours. Letters: N rows, F features,
C classes, P pairs of class and row, M components kept.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numba import njit, prange

from slidex.kernels.centroids import Centroids
from slidex.kernels.cpu.arguments import Arguments, num_chunks

_BINS = 1024  # of inner products, to find the k largest among thousands


def class_centroids(
    class_indptr: torch.Tensor,
    rows: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    num_features: int,
    *,
    keep: int,
    longest: int,
) -> Centroids:
    """Every class's sum of rows, scaled to unit length, of which the largest components are kept.

    Then of each feature the `longest` largest components are kept ("champion lists"): to read the lists of frequent
    features would take most of the time. Components are compared by magnitude; of equal ones the lower feature and the
    lower class come first. The answer does not depend on the number of threads.
    Reference: `slidex.kernels.reference.class_centroids`.

    Args:
        class_indptr: int64 (C + 1,), class c has the rows ``rows[class_indptr[c]:class_indptr[c + 1]]``.
        rows: int32 or int64 (P,), each in [0, N).
        indptr: int64 (N + 1,), the features of the rows.
        indices: int32 or int64 (nnz,), in [0, F), each at most once in a row.
        values: float32 or float64 (nnz,).
        num_features: F.
        keep: Components of a class, at most; at least 1.
        longest: Components of a feature, at most; at least 1.

    Returns:
        Centroids of the dtype of `values`.

    Raises:
        ConfigError: A shape, dtype, offset or id does not fit, or a number is out of its range.
    """
    check = Arguments("class_centroids", values.dtype)
    num_classes, num_rows, nnz = max(len(class_indptr) - 1, 0), max(len(indptr) - 1, 0), len(indices)
    for name, value in (("keep", keep), ("longest", longest)):
        if value < 1:
            check.fail(name, "at least 1", value)
    starts = check.offsets("class_indptr", class_indptr, num_classes, len(rows))
    arrays = (
        check.ids("rows", rows, (len(rows),), 0, num_rows),
        check.offsets("indptr", indptr, num_rows, nnz),
        check.ids("indices", indices, (nnz,), 0, num_features),
        check.floats("values", values, (nnz,)),
    )
    room = np.concatenate([[0], np.cumsum(_room(starts, *arrays[:2], keep))])
    features, kept = np.empty(room[-1], np.int32), np.empty(room[-1], arrays[-1].dtype)
    counts = np.zeros(num_classes, np.int64)
    chunks = num_chunks()
    bounds = np.searchsorted(starts, np.linspace(0, starts[-1], chunks + 1)[1:-1])
    bounds = np.concatenate([[0], bounds, [num_classes]])
    _sum_rows(bounds, starts, *arrays, num_features, room, counts, features, kept)
    ends, classes, components = map(
        torch.from_numpy, _invert(counts, room, features, kept, num_features, longest)
    )
    return Centroids(ends, classes, components, num_classes)


def nearest_centroids(
    centroids: Centroids,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    k: int,
    *,
    share: float = 1.0,
) -> torch.Tensor:
    """The k classes of largest inner product of row and centroid, of those above 0; equal ones by id.

    A row's largest values tell classes of few rows apart and have the shortest lists; `share` leaves out the others.
    Deterministic. Reference: `slidex.kernels.reference.nearest_centroids`.

    Args:
        centroids: Of C classes over F features.
        indptr: int64 (N + 1,), the features of the rows.
        indices: int32 or int64 (nnz,), in [0, F), each at most once in a row.
        values: (nnz,), dtype of the centroids.
        k: Classes per row; at least 1.
        share: Of a row the values of largest magnitude are read (of equal ones the first), until their squares add up
            to this share of the sum of all squares; above 0, at most 1 for all values.

    Returns:
        int64 (N, k), nearest first, padded with -1.

    Raises:
        ConfigError: A shape, dtype, offset or id does not fit, or a number is out of its range.
    """
    check = Arguments("nearest_centroids", centroids.values.dtype)
    if k < 1:
        check.fail("k", "at least 1", k)
    if not 0 < share <= 1:
        check.fail("share", "above 0 and at most 1", share)
    num_rows, nnz = max(len(indptr) - 1, 0), len(indices)
    out_NK = torch.empty(num_rows, k, dtype=torch.int64)
    _nearest(
        centroids.indptr.numpy(),
        centroids.classes.numpy(),
        centroids.values.numpy(),
        centroids.num_classes,
        check.offsets("indptr", indptr, num_rows, nnz),
        check.ids("indices", indices, (nnz,), 0, centroids.num_features),
        check.floats("values", values, (nnz,)),
        share,
        min(numba.get_num_threads(), max(num_rows, 1)),
        out_NK.numpy(),
    )
    return out_NK


@njit(cache=True, nogil=True)
def _room(starts, rows, indptr, keep):
    """How many components each class can have."""
    room = np.zeros(len(starts) - 1, np.int64)
    for c in range(len(room)):
        for p in range(starts[c], starts[c + 1]):
            room[c] += indptr[rows[p] + 1] - indptr[rows[p]]
        room[c] = min(room[c], keep)
    return room


@njit(cache=True, nogil=True, parallel=True)
def _sum_rows(bounds, starts, rows, indptr, indices, values, num_features, room, counts, features, kept):
    """Leaves the components of class c at `room[c]` and their number in `counts`."""
    for chunk in prange(len(bounds) - 1):
        sum_F, touched = np.zeros(num_features, values.dtype), np.empty(num_features, np.int32)
        for c in range(bounds[chunk], bounds[chunk + 1]):
            square, size, width = 0.0, 0, 0
            for p in range(starts[c], starts[c + 1]):
                for j in range(indptr[rows[p]], indptr[rows[p] + 1]):
                    f = indices[j]
                    if sum_F[f] == 0 and width < num_features:
                        touched[width] = f
                        width += 1
                    sum_F[f] += values[j]
            whole = width == num_features
            own_f, own_v = features[room[c] : room[c + 1]], kept[room[c] : room[c + 1]]
            for t in range(width):
                f = t if whole else touched[t]
                v = sum_F[f]
                sum_F[f] = 0
                square += v * v
                if v != 0 and (size < len(own_v) or abs(v) >= abs(own_v[0])):
                    size = _offer(own_v, own_f, size, v, np.int32(f))
            scale = 1 / np.sqrt(square) if square > 0 else 0.0
            for i in range(size):
                own_v[i] *= scale
            counts[c] = size


@njit(nogil=True)
def _offer(values, ids, size, v, i):
    """Keeps the largest of what is offered in a heap, the least first, of equal ones the higher id; its size then."""
    if size < len(values):
        at = size
        while at > 0:
            above = (at - 1) // 2
            if not _less(v, i, values[above], ids[above]):
                break
            values[at], ids[at] = values[above], ids[above]
            at = above
        values[at], ids[at] = v, i
        return size + 1
    if _less(values[0], ids[0], v, i):
        _sink(values, ids, size, v, i)
    return size


@njit(nogil=True, inline="always")
def _less(v, i, w, j):
    return abs(v) < abs(w) or (abs(v) == abs(w) and i > j)


@njit(nogil=True)
def _sink(values, ids, size, v, i):
    """Puts `v` and `i` in the place of a heap's least element."""
    at = 0
    while True:
        below = 2 * at + 1
        if below >= size:
            break
        if below + 1 < size and _less(values[below + 1], ids[below + 1], values[below], ids[below]):
            below += 1
        if not _less(values[below], ids[below], v, i):
            break
        values[at], ids[at] = values[below], ids[below]
        at = below
    values[at], ids[at] = v, i


@njit(cache=True, nogil=True)
def _invert(counts, room, features, kept, num_features, longest):
    """Offsets, classes and values by feature, of each feature the `longest` largest components at most."""
    starts = np.zeros(num_features + 1, np.int64)
    for c in range(len(counts)):
        for j in range(room[c], room[c] + counts[c]):
            starts[features[j] + 1] += 1
    starts = np.cumsum(starts)
    classes, values = np.empty(starts[-1], np.int32), np.empty(starts[-1], kept.dtype)
    next_F = starts[:-1].copy()
    for c in range(len(counts)):
        for j in range(room[c], room[c] + counts[c]):
            f = features[j]
            classes[next_F[f]], values[next_F[f]] = c, kept[j]
            next_F[f] += 1
    indptr, left = np.zeros(num_features + 1, np.int64), 0
    best, ids = np.empty(longest, kept.dtype), np.empty(longest, np.int32)
    for f in range(num_features):
        start, stop = starts[f], starts[f + 1]
        cut = stop - start > longest
        if cut:
            size = 0
            for m in range(start, stop):
                if size < longest or abs(values[m]) >= abs(best[0]):
                    size = _offer(best, ids, size, values[m], classes[m])
        for m in range(start, stop):  # what is left moves to the front
            if not cut or not _less(values[m], classes[m], best[0], ids[0]):
                classes[left], values[left] = classes[m], values[m]
                left += 1
        indptr[f + 1] = left
    return indptr, classes[:left].copy(), values[:left].copy()


@njit(cache=True, nogil=True, parallel=True)
def _nearest(
    feature_indptr, classes, components, num_classes, indptr, indices, values, share, chunks, out_NK
):
    num_rows = len(out_NK)
    for chunk in prange(chunks):
        part = slice(num_rows * chunk // chunks, num_rows * (chunk + 1) // chunks)
        _nearest_of(
            feature_indptr,
            classes,
            components,
            num_classes,
            indptr[part.start : part.stop + 1],
            indices,
            values,
            share,
            out_NK[part],
        )


@njit(nogil=True)
def _nearest_of(feature_indptr, classes, components, num_classes, indptr, indices, values, share, out_NK):
    sum_C, touched = np.zeros(num_classes, components.dtype), np.empty(num_classes, np.int32)
    sums = np.empty(num_classes, components.dtype)
    k = out_NK.shape[1]
    best, ids = np.empty(k, components.dtype), np.empty(k, np.int64)
    for n in range(len(out_NK)):
        row = slice(indptr[n], indptr[n + 1])
        width, size = 0, 0
        for j in _largest(values[row], share):
            f, v = indices[row.start + j], values[row.start + j]
            for m in range(feature_indptr[f], feature_indptr[f + 1]):
                c = classes[m]
                if sum_C[c] == 0 and width < num_classes:  # twice, should the sum have come back to 0
                    touched[width] = c
                    width += 1
                sum_C[c] += v * components[m]
        whole = width == num_classes  # one may be noted twice and another not at all
        highest = components.dtype.type(0)
        for t in range(width):
            c = t if whole else touched[t]
            sums[t] = sum_C[c]
            highest = max(highest, sums[t])
            sum_C[c] = 0
        least = _bound(sums[:width], highest, k)
        for t in range(width):
            if sums[t] >= least:  # a call for each would cost more than all else
                size = _offer(best, ids, size, sums[t], np.int64(t if whole else touched[t]))
        out_NK[n, size:] = -1
        for left in range(size, 0, -1):  # the least goes last
            out_NK[n, left - 1] = ids[0]
            _sink(best, ids, left - 1, best[left - 1], ids[left - 1])


@njit(nogil=True)
def _largest(values, share):
    """Which values have so much of the sum of squares, in rising order."""
    if share == 1:
        return np.arange(len(values))
    order = np.argsort(-np.abs(values), kind="mergesort")
    square = 0.0
    for v in values:
        square += v * v
    left, size = share * square, 0
    while left > 0 and size < len(values):
        left -= values[order[size]] * values[order[size]]
        size += 1
    return np.sort(order[:size])


@njit(nogil=True)
def _bound(sums, highest, k):
    """A number above 0 that at least k of the sums reach, and not many more; the least above 0 if there are fewer."""
    tiny = np.finfo(sums.dtype).tiny
    if len(sums) <= k or highest <= 0:
        return tiny
    counts = np.zeros(_BINS, np.int64)
    scale = _BINS / highest
    for v in sums:
        if v > 0:
            counts[min(np.int64(v * scale), _BINS - 1)] += 1
    reached = 0
    for b in range(_BINS - 1, 0, -1):
        reached += counts[b]
        if reached >= k:
            # What was rounded into the bin may lie a little below its edge.
            return max(sums.dtype.type((b - 0.01) / scale), tiny)
    return tiny
