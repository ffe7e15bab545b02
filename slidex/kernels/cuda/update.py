"""Row-sparse optimiser steps on the GPU: a warp sums a row's gradient, updates the row, and is done.

The (row, source) pairs are sorted by parameter row, stably, so that the pairs of a row lie together in the order of
their position. The warp of a row's first pair does the row, the warps of the others end at once: no count comes
back to the host, no sum needs atomics, and the result is the same bits in every run. The time of a row grows with its
pairs: one that all rows of a large batch touch is done by one warp, in full Adam by one for every 128 columns, since
there no column needs to know of another. Which optimiser it is the shapes of the state say
(`slidex.kernels.optimizer.RowState`). New weights of 16 bits are rounded as `slidex.kernels.rounding` says. Letters: R
parameter rows, D their width, N source rows, M pairs (one parameter row, one source row), U listed rows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from slidex.kernels.cuda.arguments import coefficients
from slidex.kernels.cuda.device import ALL_LANES, OF_BIAS, STRIDE, row_key, store_stochastic, warp_sum, wide
from slidex.kernels.cuda.launch import WARP, blocks_for, cuda, float32, kernel

if TYPE_CHECKING:
    from slidex.kernels.cuda.arguments import Arguments
    from slidex.kernels.optimizer import StepSettings

    Parameter = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_MOST_WARPS = 4
_COLUMNS = 4 * WARP
_SHARED_FLOATS = 12_288  # 48 KiB, what every GPU gives a block
_ONE = np.uint64(1)


def update_groups(
    check: Arguments,
    ids_M: torch.Tensor,
    source_row_M: torch.Tensor | None,
    slots: int,
    scale_M: torch.Tensor,
    source_ND: torch.Tensor,
    weights: Parameter,
    biases: Parameter,
    settings: StepSettings,
) -> None:
    """Optimiser step of each parameter row that has pairs.

    A row's gradient is ``sum scale[p] * source[source row of p]`` over its pairs p, in the order of their position.

    Args:
        check: Of the call, for memory and messages.
        ids_M: int32 or int64, parameter row of each pair; a pair whose row is out of range is left out.
        source_row_M: int64, source row of each pair; None where pair p has row ``p // slots``.
        slots: Pairs of a source row, where all have as many.
        scale_M: Factor of each pair, or empty where each is 1.
        source_ND: The rows that are summed.
        weights: A (R, D) parameter and the two parts of its state.
        biases: A (R,) parameter and its state, with gradient ``sum scale[p]``; empty arrays for none.
        settings: The step's settings.

    Raises:
        ConfigError: The rows are too wide.
    """
    sorted_M, order_M = torch.sort(ids_M, stable=True)
    rows_M = check.integer_none() if source_row_M is None else source_row_M
    warps, columns = _layout(check, weights)
    _update_groups.launch(
        (blocks_for(len(ids_M), warps), blocks_for(source_ND.shape[1], columns)),
        warps * WARP,
        sorted_M,
        order_M,
        rows_M,
        slots,
        scale_M,
        source_ND,
        weights,
        biases,
        columns,
        coefficients(settings),
        shared=4 * warps * columns,
    )


def update_rows(
    check: Arguments,
    ids_U: torch.Tensor,
    grad_UD: torch.Tensor,
    grad_bias_U: torch.Tensor,
    weights: Parameter,
    biases: Parameter,
    settings: StepSettings,
) -> None:
    """Optimiser step of the rows `ids_U`, each listed once, with the gradients `grad_UD` and `grad_bias_U`."""
    pool_size, width = grad_UD.shape
    warps, columns = _layout(check, weights)
    _update_rows.launch(
        (blocks_for(pool_size, warps), blocks_for(width, columns)),
        warps * WARP,
        ids_U,
        grad_UD,
        grad_bias_U,
        weights,
        biases,
        columns,
        coefficients(settings),
        shared=4 * warps * columns,
    )


def _layout(check: Arguments, weights: Parameter) -> tuple[int, int]:
    """Warps a block, and columns of a row that a warp does: their gradient lies in shared memory."""
    weight_RD, moment1_RD, moment2_RD = weights
    width = weight_RD.shape[1]
    if not 1 <= width <= _SHARED_FLOATS:
        check.fail("width", f"from 1 to {_SHARED_FLOATS}", width)
    by_column = len(moment1_RD) > 0 and moment2_RD.shape[1] == width
    columns = min(width, _COLUMNS) if by_column else width
    return min(_MOST_WARPS, _SHARED_FLOATS // columns), columns


@kernel
def _update_groups(sorted_M, order_M, rows_M, slots, scale_M, source_ND, weights, biases, columns, step):
    shared = cuda.shared.array(0, float32)
    first = cuda.grid(1) // WARP
    if first >= sorted_M.size:
        return
    row = sorted_M[first]
    if row < 0 or row >= weights[0].shape[0] or (first > 0 and sorted_M[first - 1] == row):
        return
    warp = cuda.threadIdx.x // WARP
    gradient_D = shared[warp * columns : (warp + 1) * columns]
    begin, stop = _part(columns, weights)
    end = _end_of_group(sorted_M, first)
    bias_gradient = _sum_pairs(
        order_M, first, end, rows_M, slots, scale_M, source_ND, gradient_D, begin, stop
    )
    _update_row(gradient_D, weights, row, step, begin, stop)
    if biases[0].size and cuda.laneid == 0 and cuda.blockIdx.y == 0:
        _update_entry(bias_gradient, biases, row, step)


@kernel
def _update_rows(ids_U, grad_UD, grad_bias_U, weights, biases, columns, step):
    shared = cuda.shared.array(0, float32)
    u = cuda.grid(1) // WARP
    if u >= ids_U.size:
        return
    row = ids_U[u]
    if row < 0 or row >= weights[0].shape[0]:
        return
    warp = cuda.threadIdx.x // WARP
    gradient_D = shared[warp * columns : (warp + 1) * columns]
    begin, stop = _part(columns, weights)
    d = begin + np.uint64(cuda.laneid)
    while d < stop:
        gradient_D[d - begin] = wide(grad_UD[u, d])
        d += STRIDE
    _update_row(gradient_D, weights, row, step, begin, stop)
    if biases[0].size and cuda.laneid == 0 and cuda.blockIdx.y == 0:
        bias_gradient = wide(grad_bias_U[u]) if grad_bias_U.size else np.float32(0)
        _update_entry(bias_gradient, biases, row, step)


@cuda.jit(device=True)
def _part(columns, weights):
    """First column of a block's part of the rows, and the one behind its last."""
    begin, width = np.uint64(cuda.blockIdx.y) * np.uint64(_COLUMNS), np.uint64(weights[0].shape[1])
    stop = begin + np.uint64(columns)
    return begin, stop if stop < width else width


@cuda.jit(device=True)
def _end_of_group(sorted_M, first):
    """First position after `first` with another id: bisection, as a hot row has as many pairs as the batch rows."""
    low, high = first + 1, sorted_M.size
    while low < high:
        middle = (low + high) // 2
        if sorted_M[middle] == sorted_M[first]:
            low = middle + 1
        else:
            high = middle
    return low


@cuda.jit(device=True)
def _sum_pairs(order_M, first, end, rows_M, slots, scale_M, source_ND, gradient_D, begin, width):
    """Sum of columns `begin` to `width` of the pairs' scaled source rows, a lane by itself; returns that of scales."""
    scales = np.float32(0)
    d0 = begin + np.uint64(cuda.laneid)
    while d0 < width:
        d1 = d0 + STRIDE
        d2 = d1 + STRIDE
        d3 = d2 + STRIDE
        scales = sum0 = sum1 = sum2 = sum3 = np.float32(0)
        j, stop = np.uint64(first), np.uint64(end)
        while j < stop:
            pair = np.uint64(order_M[j])
            n = np.uint64(rows_M[pair]) if rows_M.size else pair // np.uint64(slots)
            if n < np.uint64(source_ND.shape[0]):  # else it lies behind the last row
                scale = wide(scale_M[pair]) if scale_M.size else np.float32(1)
                scales += scale
                sum0 += scale * wide(source_ND[n, d0])
                if d1 < width:
                    sum1 += scale * wide(source_ND[n, d1])
                if d2 < width:
                    sum2 += scale * wide(source_ND[n, d2])
                if d3 < width:
                    sum3 += scale * wide(source_ND[n, d3])
            j += _ONE
        gradient_D[d0 - begin] = sum0
        if d1 < width:
            gradient_D[d1 - begin] = sum1
        if d2 < width:
            gradient_D[d2 - begin] = sum2
        if d3 < width:
            gradient_D[d3 - begin] = sum3
        d0 = d3 + STRIDE
    return scales


@cuda.jit(device=True)
def _update_row(gradient_D, weights, row, step, begin, stop):
    """Update a part of a row of a (R, D) parameter and its state; each lane reads the gradients that it wrote."""
    if weights[1].shape[0] == 0:
        _rowwise_adagrad_row(gradient_D, weights, row, step)
    elif weights[2].shape[1] < weights[0].shape[1]:
        _rowwise_adam_row(gradient_D, weights, row, step)
    else:
        _adam_row(gradient_D, weights, row, step, begin, stop)


@cuda.jit(device=True)
def _update_entry(gradient, biases, i, step):
    """Update entry i of a (R,) parameter and its state, by one lane."""
    bias_R, moment1_R, moment2_R = biases
    take1, take2, epsilon, step_size, shrink, learning_rate, key = step
    counter = np.uint32(row_key(key, i) + OF_BIAS)
    bias = wide(bias_R[i]) * shrink
    if moment1_R.size:
        moment1 = moment1_R[i] + (gradient - moment1_R[i]) * take1
        moment2 = moment2_R[i] + (gradient * gradient - moment2_R[i]) * take2
        moment1_R[i] = moment1
        moment2_R[i] = moment2
        after = bias - step_size * moment1 / (math.sqrt(moment2) + epsilon)
    else:
        moment2 = moment2_R[i] + gradient * gradient
        moment2_R[i] = moment2
        after = bias - learning_rate * gradient / (math.sqrt(moment2) + epsilon)
    store_stochastic(bias_R, i, after, counter)


@cuda.jit(device=True)
def _adam_row(gradient_D, weights, row, step, begin, stop):
    weight_RD, moment1_RD, moment2_RD = weights
    take1, take2, epsilon, step_size, shrink, _, key = step
    first = row_key(key, row)
    d = begin + np.uint64(cuda.laneid)
    while d < stop:
        gradient = gradient_D[d - begin]
        moment1 = moment1_RD[row, d] + (gradient - moment1_RD[row, d]) * take1
        moment2 = moment2_RD[row, d] + (gradient * gradient - moment2_RD[row, d]) * take2
        moment1_RD[row, d] = moment1
        moment2_RD[row, d] = moment2
        weight = wide(weight_RD[row, d]) * shrink
        after = weight - step_size * moment1 / (math.sqrt(moment2) + epsilon)
        store_stochastic(weight_RD, (row, d), after, np.uint32(first + np.uint32(d)))
        d += STRIDE


@cuda.jit(device=True)
def _rowwise_adam_row(gradient_D, weights, row, step):
    weight_RD, moment1_RD, moment2_R1 = weights
    take1, take2, epsilon, step_size, shrink, _, key = step
    first = row_key(key, row)
    moment2 = moment2_R1[row, 0]
    moment2 += (_mean_square(gradient_D, weight_RD.shape[1]) - moment2) * take2
    moment2 = _written_by_lane_0(moment2, moment2_R1, row)
    scale = step_size / (math.sqrt(moment2) + epsilon)
    d, width = np.uint64(cuda.laneid), np.uint64(weight_RD.shape[1])
    while d < width:
        moment1 = moment1_RD[row, d] + (gradient_D[d] - moment1_RD[row, d]) * take1
        moment1_RD[row, d] = moment1
        after = wide(weight_RD[row, d]) * shrink - scale * moment1
        store_stochastic(weight_RD, (row, d), after, np.uint32(first + np.uint32(d)))
        d += STRIDE


@cuda.jit(device=True)
def _rowwise_adagrad_row(gradient_D, weights, row, step):
    weight_RD, _, moment2_R1 = weights
    _, _, epsilon, _, shrink, learning_rate, key = step
    first = row_key(key, row)
    moment2 = moment2_R1[row, 0] + _mean_square(gradient_D, weight_RD.shape[1])
    moment2 = _written_by_lane_0(moment2, moment2_R1, row)
    scale = learning_rate / (math.sqrt(moment2) + epsilon)
    d, width = np.uint64(cuda.laneid), np.uint64(weight_RD.shape[1])
    while d < width:
        after = wide(weight_RD[row, d]) * shrink - scale * gradient_D[d]
        store_stochastic(weight_RD, (row, d), after, np.uint32(first + np.uint32(d)))
        d += STRIDE


@cuda.jit(device=True)
def _written_by_lane_0(moment2, moment2_R1, row):
    """Lane 0's value, in every lane: another may have read the row only after lane 0 wrote it."""
    if cuda.laneid == 0:
        moment2_R1[row, 0] = moment2
    return cuda.shfl_sync(ALL_LANES, moment2, 0)


@cuda.jit(device=True)
def _mean_square(gradient_D, width):
    total = np.float32(0)
    d = np.uint64(cuda.laneid)
    while d < np.uint64(width):
        total += gradient_D[d] * gradient_D[d]
        d += STRIDE
    return warp_sum(total) / np.float32(width)
