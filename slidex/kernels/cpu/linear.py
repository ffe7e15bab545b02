"""One linear classifier for each class over sparse features, fitted on the rows that matter to the class.

A class's problem is small: its true rows and the rows it was a candidate for. These are copied next to each other with
the features that occur in them numbered from 0, so that the passes of coordinate descent stay in the cache; the
features' own numbers come back when weights are written out. Letters: N rows, F features, C classes, P pairs of class
and row, L features of a class's rows.
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
        values: float32 or float64 (nnz,).
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
    if not math.isfinite(origin):
        check.fail("origin", "a finite number", origin)
    starts = check.offsets("class_indptr", class_indptr, num_classes, len(rows))
    arrays = (
        check.ids("rows", rows, (len(rows),), 0, num_rows),
        check.flags("positive", positive, (len(rows),)),
        check.offsets("indptr", indptr, num_rows, nnz),
        check.ids("indices", indices, (nnz,), 0, num_features),
        check.floats("values", values, (nnz,)),
    )
    chunks = max(num_chunks(), len(rows) // _CHUNK_PAIRS)
    bounds = np.searchsorted(starts, np.linspace(0, starts[-1], chunks + 1)[1:-1])
    bounds = np.unique([0, *bounds, num_classes])
    cost_C = check.floats("cost", costs, (num_classes,))
    numbers = (num_features, centroid, origin, threshold, passes, tolerance)

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
    indices,
    values,
    num_features,
    centroid,
    origin,
    threshold,
    passes,
    tolerance,
):
    """The classes from `first` on, whose pairs begin at `starts`, at costs `cost_C`; the rest is as for `linear_fit`.

    Returns how many weights each class has, int64; their features, int32; the weights; the biases.
    """
    num = len(starts) - 1
    counts, biases = np.zeros(num, np.int64), np.full(num, -1, values.dtype)
    kept_f, kept_w, kept = np.empty(1024, np.int32), np.empty(1024, values.dtype), 0
    place_F = np.full(num_features, -1, np.int64)
    feature_L, w_L = np.empty(num_features, np.int32), np.empty(num_features, values.dtype)
    ids, x = np.empty(0, np.int32), np.empty(0, values.dtype)
    chosen_L = np.empty(num_features, np.int32)
    for c in range(num):
        pairs = slice(starts[c], starts[c + 1])
        if starts[c] == starts[c + 1]:
            continue
        own, size = rows[pairs], 0
        at = np.empty(len(own) + 1, np.int64)
        for p in range(len(own)):
            at[p] = size
            size += indptr[own[p] + 1] - indptr[own[p]]
        at[len(own)] = size
        if size > len(ids):
            ids, x = np.empty(size + size // 4, np.int32), np.empty(size + size // 4, values.dtype)
        width = _copy_rows(c, own, at, indptr, indices, values, place_F, feature_L, ids, x)
        w_L[:width] = 0
        if centroid > 0:
            _add_centroid(positive[pairs], at, ids, x, w_L[:width], centroid)
        cost = cost_C[c]
        biases[c] = _descend(first + c, positive[pairs], at, ids, x, w_L, origin, cost, passes, tolerance)
        size = 0
        for i in range(width):
            if w_L[i] != 0 and abs(w_L[i]) >= threshold:
                chosen_L[size] = i
                size += 1
        chosen = chosen_L[:size][np.argsort(feature_L[chosen_L[:size]])]
        if kept + size > len(kept_f):
            room = 2 * (kept + size)
            kept_f, kept_w = _grown(kept_f, room), _grown(kept_w, room)
        kept_f[kept : kept + size], kept_w[kept : kept + size] = feature_L[chosen], w_L[chosen]
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
def _copy_rows(c, own, at, indptr, indices, values, place_F, feature_L, ids, x):
    """Copies a class's rows next to each other, with features numbered as they come; returns how many there are.

    A feature's number stands in the lower half of `place_F`, the class that it holds for in the upper one.
    """
    width, mine = 0, np.int64(c) << 32
    for p in range(len(own)):
        start = indptr[own[p]]
        if p + _PAIRS_AHEAD < len(own):
            _prefetch_start(indptr[own[p + _PAIRS_AHEAD]], indices, values)
        for j in range(at[p + 1] - at[p]):
            f = indices[start + j]
            number = place_F[f] - mine
            if number < 0 or number > 0xFFFFFFFF:
                number = width
                place_F[f], feature_L[width] = mine + width, f
                width += 1
            ids[at[p] + j], x[at[p] + j] = number, values[start + j]
    return width


@njit(nogil=True, fastmath=FUSE)
def _add_centroid(positive, at, ids, x, w_L, factor):
    """Adds `factor` times the unit vector along the sum of the true rows to weights that are 0."""
    for p in range(len(positive)):
        if positive[p]:
            for j in range(at[p], at[p + 1]):
                w_L[ids[j]] += x[j]
    square = 0.0
    for i in range(len(w_L)):
        square += w_L[i] * w_L[i]
    scale = w_L.dtype.type(factor / np.sqrt(square) if square > 0 else 0.0)
    for i in range(len(w_L)):
        w_L[i] *= scale


@njit(nogil=True, fastmath=FUSE)
def _descend(seed, positive, at, ids, x, w_L, origin, cost, passes, tolerance):
    """Dual coordinate descent for one class from the weights in `w_L`, which it moves; returns the bias."""
    count, kind = len(positive), x.dtype
    ridge = kind.type(0.5 / cost)  # what the squared loss adds to the diagonal of the dual's quadratic form
    alpha_P, square_P, active_P = np.zeros(count, kind), np.empty(count, kind), np.arange(count)
    for p in range(count):
        square_P[p] = 1 + ridge  # the bias is a feature of value 1
        for j in range(at[p], at[p + 1]):
            square_P[p] += x[j] * x[j]
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
            sign = kind.type(1) if positive[p] else kind.type(-1)
            before = alpha_P[p]
            gradient = sign * (sparse_dot(at[p], at[p + 1], ids, x, w_L) + bias) - 1 + before * ridge
            if before == 0 and gradient >= 0:  # right, and it has no part in the weights
                highest, lowest = max(highest, 0), min(lowest, 0)
                continue
            active_P[left] = p
            left += 1
            highest, lowest = max(highest, gradient), min(lowest, gradient)
            alpha_P[p] = max(before - gradient / square_P[p], 0)
            step = (alpha_P[p] - before) * sign
            bias += step
            for j in range(at[p], at[p + 1]):
                w_L[ids[j]] += step * x[j]
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


@njit(nogil=True, inline="always")
def _prefetch_start(start, ids, x):
    """Asks for the first cache lines of a pair's row; reading on, the processor finds the rest by itself."""
    for line in range(_LINES_AHEAD):
        prefetch_at(ids, start + line * CACHE_LINE // ids.itemsize)
        prefetch_at(x, start + line * CACHE_LINE // x.itemsize)


@njit(nogil=True, fastmath=FUSE)
def sparse_dot(start, stop, ids, x, w):
    """``sum_j x[j] * w[ids[j]]``: four sums, so that additions do not wait for each other; always in this order."""
    a = b = c = d = x.dtype.type(0)
    whole = start + (stop - start) // 4 * 4
    for j in range(start, whole, 4):
        a += x[j] * w[ids[j]]
        b += x[j + 1] * w[ids[j + 1]]
        c += x[j + 2] * w[ids[j + 2]]
        d += x[j + 3] * w[ids[j + 3]]
    for j in range(whole, stop):
        a += x[j] * w[ids[j]]
    return (a + b) + (c + d)
