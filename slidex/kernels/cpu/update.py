"""Row-sparse optimiser steps: sum a row's gradient in cache, update the row, go to the next.

The gradient never exists as an array: it is still in the first-level cache when the row, its state and nothing
else are read and written, once each. That is 3 kB of traffic with Adam for D = 128 in float32, 2 kB with row-wise
Adam and 1 kB with row-wise Adagrad, and what bounds these kernels. Which of the three it is the shapes of the state
say (`slidex.kernels.optimizer.RowState`), row by row, so that all are compiled once. Letters: R parameter rows, D their
width, N source rows, M pairs (one parameter row, one source row).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numba import njit, prange

from slidex.kernels.cpu.intrinsics import FUSE, lane_dot, prefetch_row
from slidex.kernels.cpu.transpose import PAIR_BITS, PAIR_MASK

if TYPE_CHECKING:
    from slidex.kernels.cpu.transpose import Groups
    from slidex.kernels.optimizer import StepSettings

    Parameter = tuple[np.ndarray, np.ndarray, np.ndarray]

AHEAD = 4
"""Touched rows between a prefetch and its use; a row takes long enough that more would leave the cache
again."""


def coefficients(settings: StepSettings, dtype: np.dtype) -> np.ndarray:
    """The six numbers a row update needs, rounded once to the parameter's dtype so that no loop widens."""
    numbers = 1 - settings.beta1, 1 - settings.beta2, settings.epsilon, settings.step_size, settings.shrink
    return np.array([*numbers, settings.learning_rate], dtype=dtype)


def update_groups(
    groups: Groups,
    scale_M: np.ndarray,
    source_ND: np.ndarray,
    weights: Parameter,
    biases: Parameter,
    settings: StepSettings,
) -> None:
    """Optimiser step of each parameter row that has pairs.

    A row's gradient is ``sum scale[p] * source[source_row[p]]`` over its pairs p. One thread owns a row: no
    atomics, and pairs are summed in the order of their position, so that the result is bit-equal for any
    number of threads.

    Args:
        groups: The pairs, by parameter row.
        scale_M: Factor of each pair, dtype of the parameter.
        source_ND: The rows that are summed, dtype of the parameter.
        weights: A (R, D) parameter and the two parts of its state.
        biases: A (R,) parameter and its state, with gradient ``sum scale[p]``; empty arrays for none.
        settings: The step's settings.
    """
    step = coefficients(settings, source_ND.dtype)
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


@njit(nogil=True, fastmath=FUSE)
def _update_chunk(keys, groups, scale_M, source_row_M, source_ND, weights, biases, step):
    gradient_D = np.empty(source_ND.shape[1], dtype=source_ND.dtype)
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
        update_row(gradient_D, weights, row, step)
        if biases[0].size:
            update_entry(bias_gradient, biases, row, step)


@njit(nogil=True)
def prefetch_parameter(weights, row):
    """Ask for one row of a parameter and of what its state holds."""
    prefetch_row(weights[0], row)
    if weights[1].size:
        prefetch_row(weights[1], row)
    prefetch_row(weights[2], row)


@njit(nogil=True, fastmath=FUSE)
def update_row(gradient_D, weights, row, step):
    """Update one row of a (R, D) parameter and its state in place; `step` is made by `coefficients`."""
    if not weights[1].size:
        _rowwise_adagrad_row(gradient_D, weights, row, step)
    elif weights[2].shape[1] < gradient_D.size:
        _rowwise_adam_row(gradient_D, weights, row, step)
    else:
        _adam_row(gradient_D, weights, row, step)


@njit(nogil=True, error_model="numpy", fastmath=FUSE)
def update_entry(gradient, weights, i, step):
    """Update entry i of a (R,) parameter and its state in place; `step` is made by `coefficients`."""
    weight_R, moment1_R, moment2_R = weights
    if moment1_R.size:
        moment1_R[i] += (gradient - moment1_R[i]) * step[0]
        moment2_R[i] += (gradient * gradient - moment2_R[i]) * step[1]
        weight_R[i] = weight_R[i] * step[4] - step[3] * moment1_R[i] / (math.sqrt(moment2_R[i]) + step[2])
    else:
        moment2_R[i] += gradient * gradient
        weight_R[i] = weight_R[i] * step[4] - step[5] * gradient / (math.sqrt(moment2_R[i]) + step[2])


@njit(nogil=True, error_model="numpy", fastmath=FUSE)
def _adam_row(gradient_D, weights, row, step):
    weight_RD, moment1_RD, moment2_RD = weights
    take1, take2, epsilon, step_size, shrink = step[0], step[1], step[2], step[3], step[4]
    for d in range(gradient_D.size):
        gradient = gradient_D[d]
        moment1 = moment1_RD[row, d] + (gradient - moment1_RD[row, d]) * take1
        moment2 = moment2_RD[row, d] + (gradient * gradient - moment2_RD[row, d]) * take2
        moment1_RD[row, d] = moment1
        moment2_RD[row, d] = moment2
        weight_RD[row, d] = weight_RD[row, d] * shrink - step_size * moment1 / (math.sqrt(moment2) + epsilon)


@njit(nogil=True, error_model="numpy", fastmath=FUSE)
def _rowwise_adam_row(gradient_D, weights, row, step):
    weight_RD, moment1_RD, moment2_R1 = weights
    take1, take2, epsilon, step_size, shrink = step[0], step[1], step[2], step[3], step[4]
    moment2_R1[row, 0] += (_mean_square(gradient_D) - moment2_R1[row, 0]) * take2
    scale = step_size / (math.sqrt(moment2_R1[row, 0]) + epsilon)
    for d in range(gradient_D.size):
        moment1 = moment1_RD[row, d] + (gradient_D[d] - moment1_RD[row, d]) * take1
        moment1_RD[row, d] = moment1
        weight_RD[row, d] = weight_RD[row, d] * shrink - scale * moment1


@njit(nogil=True, error_model="numpy", fastmath=FUSE)
def _rowwise_adagrad_row(gradient_D, weights, row, step):
    weight_RD, _, moment2_R1 = weights
    epsilon, shrink, learning_rate = step[2], step[4], step[5]
    moment2_R1[row, 0] += _mean_square(gradient_D)
    scale = learning_rate / (math.sqrt(moment2_R1[row, 0]) + epsilon)
    for d in range(gradient_D.size):
        weight_RD[row, d] = weight_RD[row, d] * shrink - scale * gradient_D[d]


@njit(nogil=True, error_model="numpy", fastmath=FUSE)
def _mean_square(gradient_D):
    return lane_dot(gradient_D, gradient_D) / gradient_D.dtype.type(gradient_D.size)
