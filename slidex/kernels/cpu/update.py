"""Row-sparse Adam: sum a row's gradient in cache, update the row, go to the next.

The gradient never exists as an array: it is still in the first-level cache when the row, its two moments and
nothing else are read and written, once each. That is 3 kB of traffic for D = 128 in float32, and what bounds
these kernels. Letters: R parameter rows, D their width, N source rows, M pairs (one parameter row, one source
row).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numba import njit, prange

from slidex.kernels.cpu.intrinsics import FASTMATH, prefetch_row
from slidex.kernels.cpu.transpose import PAIR_BITS, PAIR_MASK

if TYPE_CHECKING:
    from slidex.kernels.adam import AdamStep
    from slidex.kernels.cpu.transpose import Groups

    Parameter = tuple[np.ndarray, np.ndarray, np.ndarray]

AHEAD = 4
"""Touched rows between a prefetch and its use; a row takes long enough that more would leave the cache
again."""


def coefficients(adam: AdamStep, dtype: np.dtype) -> np.ndarray:
    """The five numbers a row update needs, rounded once to the parameter's dtype so that no loop widens."""
    return np.array([1 - adam.beta1, 1 - adam.beta2, adam.epsilon, adam.step_size, adam.shrink], dtype=dtype)


def update_rows(
    groups: Groups,
    scale_M: np.ndarray,
    source_ND: np.ndarray,
    weights: Parameter,
    biases: Parameter,
    adam: AdamStep,
) -> None:
    """Adam on each parameter row that has pairs.

    A row's gradient is ``sum scale[p] * source[source_row[p]]`` over its pairs p. One thread owns a row: no
    atomics, and pairs are summed in the order of their position, so that the result is bit-equal for any
    number of threads.

    Args:
        groups: The pairs, by parameter row.
        scale_M: Factor of each pair, dtype of the parameter.
        source_ND: The rows that are summed, dtype of the parameter.
        weights: A (R, D) parameter and its two moments.
        biases: A (R,) parameter and its moments, with gradient ``sum scale[p]``; empty arrays for none.
        adam: The step's settings.
    """
    step = coefficients(adam, source_ND.dtype)
    _update_chunks(
        groups.keys,
        groups.starts,
        groups.bounds,
        scale_M,
        groups.source_rows,
        source_ND,
        weights,
        biases,
        step,
    )


@njit(cache=True, nogil=True, parallel=True)
def _update_chunks(keys, starts, bounds, scale_M, source_row_M, source_ND, weights, biases, step):
    for chunk in prange(bounds.size - 1):
        groups = starts[bounds[chunk] : bounds[chunk + 1] + 1]
        _update_chunk(keys, groups, scale_M, source_row_M, source_ND, weights, biases, step)


@njit(nogil=True, fastmath=FASTMATH)
def _update_chunk(keys, groups, scale_M, source_row_M, source_ND, weights, biases, step):
    gradient_D = np.empty(source_ND.shape[1], dtype=source_ND.dtype)
    bias_R, bias_moment1_R, bias_moment2_R = biases
    for i in range(groups.size - 1):
        if i + AHEAD < groups.size - 1:
            prefetch_parameter(weights, keys[groups[i + AHEAD]] >> PAIR_BITS)
        gradient_D[:] = 0
        bias_gradient = gradient_D.dtype.type(0)
        for j in range(groups[i], groups[i + 1]):
            pair = keys[j] & PAIR_MASK
            n = source_row_M[pair]
            scale = scale_M[pair]
            bias_gradient += scale
            for d in range(gradient_D.size):
                gradient_D[d] += scale * source_ND[n, d]
        row = keys[groups[i]] >> PAIR_BITS
        adam_row(gradient_D, weights, row, step)
        if bias_R.size:
            adam_entry(bias_gradient, bias_R, bias_moment1_R, bias_moment2_R, row, step)


@njit(nogil=True)
def prefetch_parameter(weights, row):
    """Ask for one row of a parameter and of its two moments."""
    prefetch_row(weights[0], row)
    prefetch_row(weights[1], row)
    prefetch_row(weights[2], row)


@njit(nogil=True, error_model="numpy", fastmath=FASTMATH)
def adam_entry(gradient, weight, moment1, moment2, i, step):
    """Update entry i of a 1-D parameter and its moments in place; `step` is made by `coefficients`."""
    moment1[i] += (gradient - moment1[i]) * step[0]
    moment2[i] += (gradient * gradient - moment2[i]) * step[1]
    weight[i] = weight[i] * step[4] - step[3] * moment1[i] / (math.sqrt(moment2[i]) + step[2])


@njit(nogil=True, error_model="numpy", fastmath=FASTMATH)
def adam_row(gradient_D, weights, row, step):
    """Update one row of a (R, D) parameter and its moments in place; `step` is made by `coefficients`."""
    weight_RD, moment1_RD, moment2_RD = weights
    take1, take2, epsilon, step_size, shrink = step[0], step[1], step[2], step[3], step[4]
    for d in range(gradient_D.size):
        gradient = gradient_D[d]
        moment1 = moment1_RD[row, d] + (gradient - moment1_RD[row, d]) * take1
        moment2 = moment2_RD[row, d] + (gradient * gradient - moment2_RD[row, d]) * take2
        moment1_RD[row, d] = moment1
        moment2_RD[row, d] = moment2
        weight_RD[row, d] = weight_RD[row, d] * shrink - step_size * moment1 / (math.sqrt(moment2) + epsilon)
