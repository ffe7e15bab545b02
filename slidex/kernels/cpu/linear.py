"""One linear classifier for each class over sparse features, fitted on the rows that matter to the class.

A class's problem is small: its true rows and the rows it was a candidate for. These are copied next to each other, so
that the passes of coordinate descent stay in the cache. Letters: N rows, F features, R ranks of features, C classes, P
pairs of class and row.
"""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numba
import numpy as np
import torch
from numba import njit

from slidex.kernels.cpu.arguments import Arguments, num_chunks
from slidex.kernels.cpu.entries import GROUP, add_row, ranked_entries, sparse_dot
from slidex.kernels.cpu.intrinsics import CACHE_LINE, FUSE, prefetch_at
from slidex.kernels.linear_weights import LinearWeights

if TYPE_CHECKING:
    from collections.abc import Callable

_PAIRS_AHEAD, _LINES_AHEAD = 4, 2
_CHUNK_PAIRS = 1 << 17  # done at once by a thread: a fraction of a second
_PASSES_BETWEEN = 6  # two passes over all of a class's pairs


def linear_fit(
    class_indptr: torch.Tensor,
    rows: torch.Tensor,
    positive: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    num_features: int,
    *,
    cost: float | torch.Tensor,
    centroid: float = 0.0,
    origin: float = 0.0,
    threshold: float = 0.0,
    passes: int = 20,
    tolerance: float = 0.1,
    progress: Callable[[int, int], None] | None = None,
) -> LinearWeights:
    """Weights and bias of every class's linear SVM with squared hinge loss.

    For each class ``min_w |w - centroid m|^2 / 2 + (bias - origin)^2 / 2 + cost * sum_p max(0, 1 - y_p (w . x_p +
    bias))^2`` over its pairs p, with ``y_p`` = 1 for its true rows and -1 for the others, and ``m`` the sum of the
    true rows, scaled to unit length. Where `centroid` and `origin` are 0 that is LIBLINEAR's L2-regularised L2-loss
    SVC; else a class with few rows stays near what these have in common, and few of its pairs move the weights. Solved
    by dual coordinate descent (Hsieh et al., ICML 2008, algorithm 1); a pass over all pairs alternates with several
    over those that have a part in the weights. Classes are independent: the answer depends neither on the number of
    threads nor on other classes. Reference: `slidex.kernels.reference.linear_fit`.

    Args:
        class_indptr: int64 (C + 1,), class c has the pairs ``class_indptr[c]:class_indptr[c + 1]``.
        rows: int32 or int64 (P,), each in [0, N), each at most once in a class.
        positive: bool (P,), whether the class is true for the row.
        indptr: int64 (N + 1,), the features of the rows.
        indices: int32 or int64 (nnz,), in [0, F), each at most once in a row.
        values: float32 or float64 (nnz,), finite. With up to 2^20 features those of float32 are rounded to multiples
            of their row's largest value over 2^(31 - b), where b bits number all features.
        num_features: F.
        cost: Of the loss, against the distance of the weights from where they are drawn to; above 0. One number, or one
            for each class: (C,), of the dtype of `values`.
        centroid: Weights are drawn to so many times the unit vector `m`; at least 0.
        origin: The bias is drawn to it.
        threshold: Weights of smaller magnitude are left out; the bias is always kept.
        passes: Over a class's pairs, at most.
        tolerance: A class is done when the projected gradients of all its pairs lie within so much of each other.
        progress: Called with classes done and classes in all, now and then, in the caller's thread; what it raises
            ends the fit.

    Returns:
        The weights, of the dtype of `values`. A class without pairs has none, and bias -1: it is never true.

    Raises:
        ConfigError: A shape, dtype, offset or id does not fit, or a number is out of its range.
    """
    check = Arguments("linear_fit", values.dtype)
    num_classes, num_rows, nnz = max(len(class_indptr) - 1, 0), max(len(indptr) - 1, 0), len(indices)
    for name, value, least in (
        ("centroid", centroid, 0),
        ("threshold", threshold, 0),
        ("passes", passes, 1),
        ("tolerance", tolerance, 0),
    ):
        if not value >= least:
            check.fail(name, f"at least {least}", value)
    costs = cost if isinstance(cost, torch.Tensor) else values.new_full((num_classes,), cost)
    least = costs.min() if len(costs) else 1
    if not least > 0:
        check.fail("cost", "above 0", float(least))
    if not torch.isfinite(values).all():
        check.fail("values", "finite", float(values[~torch.isfinite(values)][0]))
    if not math.isfinite(origin):
        check.fail("origin", "a finite number", origin)
    starts = check.offsets("class_indptr", class_indptr, num_classes, len(rows))
    pairs = (
        check.ids("rows", rows, (len(rows),), 0, num_rows),
        check.flags("positive", positive, (len(rows),)),
    )
    csr = (
        check.offsets("indptr", indptr, num_rows, nnz),
        check.ids("indices", indices, (nnz,), 0, num_features),
        check.floats("values", values, (nnz,)),
    )
    arrays = *pairs, csr[0], *ranked_entries(*csr, num_features)
    chunks = max(num_chunks(), len(rows) // _CHUNK_PAIRS)
    bounds = np.searchsorted(starts, np.linspace(0, starts[-1], chunks + 1)[1:-1])
    bounds = np.unique([0, *bounds, num_classes])
    cost_C = check.floats("cost", costs, (num_classes,))
    numbers = (centroid, origin, threshold, passes, tolerance)

    def fit(first: int, last: int) -> tuple[np.ndarray, ...]:
        return _fit_classes(first, starts[first : last + 1], cost_C[first:last], *arrays, *numbers)

    parts: list[tuple[np.ndarray, ...]] = []
    with ThreadPoolExecutor(numba.get_num_threads()) as pool:
        work = [pool.submit(fit, first, last) for first, last in itertools.pairwise(bounds)]
        try:
            for last, part in zip(bounds[1:], work, strict=True):
                parts.append(part.result())
                if progress is not None:
                    progress(int(last), num_classes)
        finally:  # what has not begun is not waited for
            pool.shutdown(cancel_futures=True)
    counts, features, kept, biases = (
        torch.from_numpy(np.concatenate(kind)) for kind in zip(*parts, strict=True)
    )
    ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return LinearWeights(ends, features, kept, biases, num_features)


@njit(cache=True, nogil=True)
def _fit_classes(
    first,
    starts,
    cost_C,
    rows,
    positive,
    indptr,
    ids,
    x,
    low,
    scale_N,
    square_N,
    feature_R,
    centroid,
    origin,
    threshold,
    passes,
    tolerance,
):
    """The classes from `first` on, whose pairs begin at `starts`, at costs `cost_C`; the rest is as for `linear_fit`.

    Returns how many weights each class has, int64; their features, int32; the weights; the biases.
    """
    num, kind = len(starts) - 1, square_N.dtype
    counts, biases = np.zeros(num, np.int64), np.full(num, -1, kind)
    kept_f, kept_w, kept = np.empty(1024, np.int32), np.empty(1024, kind), 0
    w_R = np.zeros(len(feature_R), kind)
    taken_f, taken_w = np.empty(len(feature_R), np.int32), np.empty(len(feature_R), kind)
    own_ids, own_x = np.empty(0, np.uint32), np.empty(0, x.dtype)
    for c in range(num):
        pairs = slice(starts[c], starts[c + 1])
        if starts[c] == starts[c + 1]:
            continue
        own, true = rows[pairs], positive[pairs]
        at = _offsets(own, indptr)
        if at[-1] > len(own_ids):
            own_ids = np.empty(at[-1] + at[-1] // 4, np.uint32)
            own_x = np.empty(len(own_ids) if len(x) > 0 else 0, x.dtype)
        _copy_rows(own, at, indptr, ids, x, own_ids, own_x)
        entries = at, own_ids, own_x, low, scale_N[own]
        moved = np.zeros(len(own), np.bool_)
        if centroid > 0:
            _add_centroid(true, entries, w_R, moved, centroid)
        biases[c] = _descend(
            first + c, true, square_N[own], entries, w_R, moved, origin, cost_C[c], passes, tolerance
        )
        size = _take_weights(moved, entries, w_R, threshold, feature_R, taken_f, taken_w)
        if kept + size > len(kept_f):
            room = 2 * (kept + size)
            kept_f, kept_w = _grown(kept_f, room), _grown(kept_w, room)
        order = np.argsort(taken_f[:size])
        kept_f[kept : kept + size], kept_w[kept : kept + size] = taken_f[order], taken_w[order]
        counts[c] = size
        kept += size
    return counts, kept_f[:kept].copy(), kept_w[:kept].copy(), biases


@njit(nogil=True)
def _grown(array, size):
    larger = np.empty(size, array.dtype)
    larger[: len(array)] = array
    return larger


@njit(nogil=True)
def _shuffle(order, state):
    """Shuffles (Fisher and Yates) with a xorshift generator in this state; returns its next."""
    for k in range(len(order) - 1):
        state ^= state << np.uint64(13)
        state ^= state >> np.uint64(7)
        state ^= state << np.uint64(17)
        # The upper half times the width, over 2^32: a remainder would take as long as all else here.
        other = k + np.int64(((state >> np.uint64(32)) * np.uint64(len(order) - k)) >> np.uint64(32))
        order[other], order[k] = order[k], order[other]
    return state


@njit(nogil=True)
def _offsets(own, indptr):
    """Where each of a class's rows begins when they are next to each other, and where the last one ends: int64.

    Their sizes are rounded up to multiples of `GROUP`.
    """
    at = np.empty(len(own) + 1, np.int64)
    at[0] = 0
    for p in range(len(own)):
        size = indptr[own[p] + 1] - indptr[own[p]]
        at[p + 1] = at[p] + (size + GROUP - 1) // GROUP * GROUP
    return at


@njit(nogil=True)
def _copy_rows(own, at, indptr, ids, x, own_ids, own_x):
    """Copies the entries of a class's rows to where they begin in `at`, filled up with zeros."""
    for p in range(len(own)):
        start, stop = indptr[own[p]], indptr[own[p] + 1]
        if p + _PAIRS_AHEAD < len(own):
            _prefetch_start(indptr[own[p + _PAIRS_AHEAD]], ids, x)
        _copy_row(ids, start, stop, own_ids, at[p], at[p + 1])
        if len(x) > 0:
            _copy_row(x, start, stop, own_x, at[p], at[p + 1])


@njit(nogil=True)
def _copy_row(source, start, stop, copy, first, last):
    for j in range(stop - start):
        copy[first + j] = source[start + j]
    copy[first + stop - start : last] = 0


@njit(nogil=True, fastmath=FUSE)
def _add_centroid(true, entries, w_R, moved, factor):
    """Adds `factor` times the unit vector along the sum of the true rows to weights that are 0; says whose it moved."""
    at, ids, x, low, scale_P = entries
    square = 0.0
    for p in np.flatnonzero(true):
        add_row(at[p], at[p + 1], ids, x, low, w_R, scale_P[p])
        moved[p] = True
    for p in np.flatnonzero(true):
        square += scale_P[p] * sparse_dot(at[p], at[p + 1], ids, x, low, w_R)
    for p in np.flatnonzero(true):
        for j in range(at[p], at[p + 1]):
            w_R[ids[j] & low] = 0
    scale = w_R.dtype.type(factor / np.sqrt(square) if square > 0 else 0.0)
    for p in np.flatnonzero(true):
        add_row(at[p], at[p + 1], ids, x, low, w_R, scale * scale_P[p])


@njit(nogil=True, fastmath=FUSE)
def _descend(seed, true, square_P, entries, w_R, moved, origin, cost, passes, tolerance):
    """Dual coordinate descent for one class from the weights in `w_R`, which it moves; returns the bias.

    Args:
        seed: For the order of its pairs.
        true: bool (P,), signs.
        square_P: Sums of the squares of their rows.
        entries: Offsets (P + 1,) of the rows, their `ids`, `x` and `low` as `Entries` has them, and their scales.
        w_R: The weights.
        moved: bool (P,); is set for every pair whose row was added to them.
        origin: As for `linear_fit`, like all that follow.
        cost: Of the class.
        passes: Over its pairs.
        tolerance: Of the projected gradients.
    """
    at, ids, x, low, scale_P = entries
    count, kind = len(true), w_R.dtype
    ridge = kind.type(0.5 / cost)  # what the squared loss adds to the diagonal of the dual's quadratic form
    alpha_P, active_P = np.zeros(count, kind), np.arange(count)
    bias, active, since = kind.type(origin), count, 0
    state = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x2545F4914F6CDD1D)
    for _ in range(passes):
        whole = active == count
        highest, lowest, left = kind.type(-np.inf), kind.type(np.inf), 0
        state = _shuffle(active_P[:active], state)
        for k in range(active):
            p = active_P[k]
            if k + _PAIRS_AHEAD < active:
                _prefetch_start(at[active_P[k + _PAIRS_AHEAD]], ids, x)
            sign = kind.type(1) if true[p] else kind.type(-1)
            before = alpha_P[p]
            score = scale_P[p] * sparse_dot(at[p], at[p + 1], ids, x, low, w_R) + bias
            gradient = sign * score - 1 + before * ridge
            if before == 0 and gradient >= 0:  # right, and it has no part in the weights
                highest, lowest = max(highest, 0), min(lowest, 0)
                continue
            active_P[left] = p
            left += 1
            highest, lowest = max(highest, gradient), min(lowest, gradient)
            alpha_P[p] = max(
                before - gradient / (square_P[p] + 1 + ridge), 0
            )  # 1: the bias, a feature as well
            step = (alpha_P[p] - before) * sign
            bias += step
            moved[p] = True
            add_row(at[p], at[p + 1], ids, x, low, w_R, step * scale_P[p])
        done = highest - lowest <= tolerance
        if whole and done:
            break
        since = 0 if whole else since + 1
        active = left
        if (done or since == _PASSES_BETWEEN) and not whole:
            active = count
            for p in range(count):
                active_P[p] = p
    return bias


@njit(nogil=True)
def _take_weights(moved, entries, w_R, threshold, feature_R, features, weights):
    """Takes the weights out of `w_R`, which is 0 after it; returns how many of at least `threshold` it has written."""
    at, ids, _, low, _ = entries
    size = 0
    for p in np.flatnonzero(moved):
        for j in range(at[p], at[p + 1]):
            rank = ids[j] & low
            weight = w_R[rank]
            if weight != 0:
                w_R[rank] = 0
                if abs(weight) >= threshold:
                    features[size], weights[size] = feature_R[rank], weight
                    size += 1
    return size


@njit(nogil=True, inline="always")
def _prefetch_start(start, ids, x):
    """Asks for the first cache lines of a pair's row; reading on, the processor finds the rest by itself."""
    for line in range(_LINES_AHEAD):
        prefetch_at(ids, start + line * CACHE_LINE // ids.itemsize)
        if len(x) > 0:
            prefetch_at(x, start + line * CACHE_LINE // x.itemsize)
