"""Scores of a row's candidates by the linear classifiers of their classes.

Letters: N rows, F features, C classes, A candidates per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit, prange

from slidex.kernels.cpu.arguments import Arguments, num_chunks
from slidex.kernels.cpu.intrinsics import FUSE
from slidex.kernels.cpu.linear import sparse_dot

if TYPE_CHECKING:
    from slidex.kernels.linear_weights import LinearWeights

_SEARCH_COST = 4
"""Looking up one of a row's features among a class's weights, in steps of reading weights in order."""


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
        weights.features.numpy(),
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
        x_F = np.zeros(num_features, values.dtype)
        for n in range(num_rows * chunk // chunks, num_rows * (chunk + 1) // chunks):
            row = slice(indptr[n], indptr[n + 1])
            ids, x = indices[row], values[row]
            for j in range(len(ids)):
                x_F[ids[j]] = x[j]
            for a in range(candidates_NA.shape[1]):
                c = candidates_NA[n, a]
                if c < 0:
                    out_NA[n, a] = -np.inf
                    continue
                start, stop = class_indptr[c], class_indptr[c + 1]
                if len(ids) * _SEARCH_COST * np.log2(stop - start + 1) < stop - start:
                    out_NA[n, a] = bias_C[c] + _looked_up(ids, x, features[start:stop], weights[start:stop])
                else:
                    out_NA[n, a] = bias_C[c] + sparse_dot(start, stop, features, weights, x_F)
            for j in range(len(ids)):
                x_F[ids[j]] = 0


@njit(nogil=True, fastmath=FUSE)
def _looked_up(ids, x, features, weights):
    """``sum_j x[j] * w[ids[j]]`` with the weights of a class found by bisection."""
    total = x.dtype.type(0)
    for j in range(len(ids)):
        low, size = 0, len(features)
        while size > 1:  # the last feature that is not above ids[j] is among `size` from `low`
            half = size >> 1
            low += half if features[low + half] <= ids[j] else 0
            size -= half
        if features[low] == ids[j]:
            total += x[j] * weights[low]
    return total
