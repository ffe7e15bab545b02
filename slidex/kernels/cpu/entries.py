"""Sparse rows as coordinate descent reads them, time and again: frequent features first, an entry in 32 bits.

A feature is known by its rank among all by frequency, so that the weights read most lie next to each other. A float32
value and its rank share a word: its lower bits are the rank, and as an integer it is the nearest such to the value in
units of the row's scale. Sums over rows wait for memory, of which they then read half as much.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, types
from numba.extending import overload

from slidex.kernels.cpu.intrinsics import FUSE

ALL = np.uint32(0xFFFFFFFF)
GROUP = 4
"""Entries that a loop takes at once. Rows of a multiple of it have no rest, at whose end a processor guesses wrong."""
WORD_FEATURES = 1 << 20
"""With more features a word would keep fewer than 12 bits of a value: both are then kept apart."""
_LARGEST = (1 << 31) - (1 << 9)
"""Of an integer in a word, nearly: a scale is rounded to 24 bits."""
_LEAST = 2.0**-90
"""A row without a larger value counts as one of zeros: its scale would be no normal float32."""


class Entries(NamedTuple):
    """The entries of sparse rows.

    Args:
        ids: uint32 (nnz,), ranks of features in the bits that are set in `low`; unsigned, as for others Numba asks
            every index whether it counts from the end.
        x: float (nnz,), the values; uint32 (0,) where they are in the words of `ids`.
        low: A mask.
        scale_N: What a row's values are to be multiplied by, of their dtype.
        square_N: Sums of the squares of each row's values, so multiplied.
        feature_R: int32, the feature of every rank.
    """

    ids: np.ndarray
    x: np.ndarray
    low: np.uint32
    scale_N: np.ndarray
    square_N: np.ndarray
    feature_R: np.ndarray


def ranked_entries(indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, num_features: int) -> Entries:
    """Those of rows in CSR form; values of float64 stay as they are."""
    feature_R = np.argsort(-np.bincount(indices, minlength=num_features), kind="stable").astype(np.int32)
    rank_F = np.empty(num_features, np.uint32)
    rank_F[feature_R] = np.arange(num_features, dtype=np.uint32)
    ids, x, low, scale_N = rank_F[indices], values, ALL, np.ones(len(indptr) - 1, values.dtype)
    if values.dtype == np.float32 and num_features <= WORD_FEATURES:
        low = np.uint32((1 << (num_features - 1).bit_length()) - 1)
        _into_words(indptr, values, low, ids, scale_N)
        x = np.empty(0, np.uint32)
    return Entries(ids, x, low, scale_N, _squares(indptr, ids, x, scale_N), feature_R)


@njit(cache=True, nogil=True)
def _into_words(indptr, values, low, ids, scale_N):
    """Makes of every rank the integer nearest to the value over the row's scale that has the rank for lower bits."""
    low = np.int64(low)
    for n in range(len(scale_N)):
        row, most = slice(indptr[n], indptr[n + 1]), 0.0
        for value in values[row]:
            most = max(most, abs(value))
        if most > _LEAST:
            scale_N[n] = most / (_LARGEST - low)
        for j in range(indptr[n], indptr[n + 1]):
            whole = np.int64(np.rint(values[j] / np.float64(scale_N[n])))
            ids[j] |= np.uint32(np.int32((whole - np.int64(ids[j]) + (low + 1) // 2) & ~low))


@njit(cache=True, nogil=True)
def _squares(indptr, ids, x, scale_N):
    square_N = np.zeros_like(scale_N)
    for n in range(len(square_N)):
        for j in range(indptr[n], indptr[n + 1]):
            square_N[n] += (scale_N[n] * _value(ids[j], x, j)) ** 2
    return square_N


def _value(word, x, j):  # noqa: ARG001
    """The value of entry j, whose word is given."""
    return x[j]


@overload(_value)
def _value_impl(word, x, j):  # noqa: ARG001
    if x.dtype == types.uint32:
        return lambda word, x, j: np.float32(np.int32(word))  # noqa: ARG005
    return lambda word, x, j: x[j]  # noqa: ARG005


@njit(nogil=True, fastmath=FUSE)
def sparse_dot(start, stop, ids, x, low, w):
    """``sum_j x[j] * w[ids[j]]``: `GROUP` sums, so that additions do not wait for each other; always in this order."""
    a = b = c = d = w.dtype.type(0)
    whole = start + (stop - start) // GROUP * GROUP
    for j in range(start, whole, GROUP):
        a += _value(ids[j], x, j) * w[ids[j] & low]
        b += _value(ids[j + 1], x, j + 1) * w[ids[j + 1] & low]
        c += _value(ids[j + 2], x, j + 2) * w[ids[j + 2] & low]
        d += _value(ids[j + 3], x, j + 3) * w[ids[j + 3] & low]
    for j in range(whole, stop):
        a += _value(ids[j], x, j) * w[ids[j] & low]
    return (a + b) + (c + d)


@njit(nogil=True, fastmath=FUSE)
def add_row(start, stop, ids, x, low, w, factor):
    """Adds `factor` times these entries, of which there are a multiple of `GROUP`, to weights."""
    for j in range(start, stop, GROUP):
        w[ids[j] & low] += factor * _value(ids[j], x, j)
        w[ids[j + 1] & low] += factor * _value(ids[j + 1], x, j + 1)
        w[ids[j + 2] & low] += factor * _value(ids[j + 2], x, j + 2)
        w[ids[j + 3] & low] += factor * _value(ids[j + 3], x, j + 3)
