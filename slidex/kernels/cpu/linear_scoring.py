"""Scores of a row's candidates by the linear classifiers of their classes.

Letters: N rows, F features, C classes, A candidates per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit, prange

from slidex.kernels.cpu.arguments import Arguments, num_chunks
from slidex.kernels.cpu.entries import ALL, sparse_dot
from slidex.kernels.cpu.intrinsics import CACHE_LINE, FUSE, prefetch_at

if TYPE_CHECKING:
    from slidex.kernels.linear_weights import LinearWeights

_SEARCH_COST = 2
"""Looking up one of a row's features among a class's weights, in steps of reading weights in order."""
_CLASSES_AHEAD, _LINES_AHEAD = 4, 4


def linear_scores(
    weights: LinearWeights,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    candidates_NA: torch.Tensor,
) -> torch.Tensor:
    """``scores[n, a] = x[n] . w[c] + bias[c]`` with ``c = candidates[n, a]``; -inf at pads.

    A class with few weights has all of them read; of one with many, the row's features are looked up. Deterministic.
    Reference: `slidex.kernels.reference.linear_scores`.

    Args:
        weights: Of C classes over F features.
        indptr: int64 (N + 1,), the features of the rows.
        indices: int32 or int64 (nnz,), in [0, F), each at most once in a row.
        values: (nnz,), dtype of the weights.
        candidates_NA: int32 or int64, classes in [0, C), or -1 for none.

    Returns:
        scores (N, A) of the dtype of the weights.

    Raises:
        ConfigError: A shape, dtype, offset or id does not fit.
    """
    check = Arguments("linear_scores", weights.values.dtype)
    num_rows, nnz = max(len(indptr) - 1, 0), len(indices)
    out_NA = torch.empty(num_rows, candidates_NA.shape[1], dtype=weights.values.dtype)
    _score_rows(
        weights.indptr.numpy(),
        weights.features.numpy().view(
            np.uint32
        ),  # a signed one is asked at every use whether it counts from the end
        weights.values.numpy(),
        weights.bias.numpy(),
        check.offsets("indptr", indptr, num_rows, nnz),
        check.ids("indices", indices, (nnz,), 0, weights.num_features),
        check.floats("values", values, (nnz,)),
        weights.num_features,
        check.ids("candidates_NA", candidates_NA, (num_rows, candidates_NA.shape[1]), -1, len(weights.bias)),
        num_chunks(),
        out_NA.numpy(),
    )
    return out_NA


@njit(cache=True, nogil=True, parallel=True)
def _score_rows(
    class_indptr,
    features,
    weights,
    bias_C,
    indptr,
    indices,
    values,
    num_features,
    candidates_NA,
    chunks,
    out_NA,
):
    num_rows = len(candidates_NA)
    for chunk in prange(chunks):
        x_F, places = np.zeros(num_features, values.dtype), np.empty(0, np.uint64)
        for n in range(num_rows * chunk // chunks, num_rows * (chunk + 1) // chunks):
            row = slice(indptr[n], indptr[n + 1])
            ids, x, classes = indices[row], values[row], candidates_NA[n]
            if len(places) < len(ids):
                places = np.empty(2 * len(ids), np.uint64)
            for j in range(len(ids)):
                x_F[ids[j]] = x[j]
            for a in range(len(classes)):
                prefetch_at(class_indptr, max(classes[a], 0))
            for a in range(len(classes)):
                if a + _CLASSES_AHEAD < len(classes):
                    c = max(classes[a + _CLASSES_AHEAD], 0)
                    _prefetch_class(class_indptr[c], class_indptr[c + 1], features, weights)
                c = classes[a]
                if c < 0:
                    out_NA[n, a] = -np.inf
                    continue
                own = slice(class_indptr[c], class_indptr[c + 1])
                f, w = features[own], weights[own]
                if len(ids) * _SEARCH_COST * np.log2(len(f) + 1) < len(f):
                    out_NA[n, a] = bias_C[c] + _looked_up(ids, x, f, w, places)
                else:
                    out_NA[n, a] = bias_C[c] + sparse_dot(0, len(f), f.view(np.uint32), w, ALL, x_F)
            for j in range(len(ids)):
                x_F[ids[j]] = 0


@njit(nogil=True, inline="always")
def _prefetch_class(start, stop, features, weights):
    """Asks for the first weights of a class, and for where a search begins."""
    for line in range(_LINES_AHEAD):
        prefetch_at(features, start + line * CACHE_LINE // features.itemsize)
        prefetch_at(weights, start + line * CACHE_LINE // weights.itemsize)
    for quarter in range(1, 4):
        prefetch_at(features, start + (stop - start) * quarter // 4)


@njit(nogil=True, fastmath=FUSE)
def _looked_up(ids, x, features, weights, places):
    """``sum_j x[j] * w[ids[j]]`` with the weights of a class found by bisection, step by step for all of them at once.

    Steps for one feature would wait for each other. `places` is for use in between, at least as long as `ids`.
    """
    total, size = x.dtype.type(0), np.uint64(len(features))
    for j in range(len(ids)):
        places[j] = 0
    while size > np.uint64(1):  # the last feature that is not above ids[j] is among `size` from places[j]
        half = size >> np.uint64(1)
        for j in range(len(ids)):
            middle = places[j] + half
            places[j] = middle if features[middle] <= ids[j] else places[j]
        size -= half
    for j in range(len(ids)):
        if features[places[j]] == ids[j]:
            total += x[j] * weights[places[j]]
    return total
