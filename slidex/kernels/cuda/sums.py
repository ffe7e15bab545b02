"""Weighted sums of rows: the sparse input layer, and the gradient of the hidden vectors.

A block makes 128 columns of one sum; its warps take every eighth pair each, and their parts are added in a fixed
order. What the memory gives depends on how many loads are on their way at a time: a lane asks for four columns of two
rows before it adds the first. Letters: N sums, R rows of the weight, D width, M pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from slidex.kernels.cuda.device import STRIDE, store, wide
from slidex.kernels.cuda.launch import WARP, blocks_for, cuda, float32, kernel

if TYPE_CHECKING:
    import torch

_WARPS = 8
_COLUMNS = 4 * WARP
_NEXT = np.uint64(_WARPS)


def weighted_sums(
    indptr: torch.Tensor,
    slots: int,
    ids: torch.Tensor,
    factors: torch.Tensor,
    weight_RD: torch.Tensor,
    bias_D: torch.Tensor,
    out_ND: torch.Tensor,
) -> None:
    """``out[n] = bias + sum_j factors[j] * weight[ids[j]]`` over the pairs j of row n.

    Args:
        indptr: int64 (N + 1,), CSR offsets; not read where each row has `slots` pairs.
        slots: Pairs of each row, where id -1 is a pad; 0 for CSR rows, where it is an error.
        ids: int32 or int64 (M,).
        factors: (M,), or empty where each counts 1.
        weight_RD: The rows.
        bias_D: (D,), or empty for none.
        out_ND: Overwritten; a row with an id or offset out of range becomes NaN.
    """
    num_rows, width = out_ND.shape
    grid = num_rows, blocks_for(width, _COLUMNS)
    _weighted_sums.launch(grid, _WARPS * WARP, indptr, slots, ids, factors, weight_RD, bias_D, out_ND)


@kernel
def _weighted_sums(indptr, slots, ids, factors, weight_RD, bias_D, out_ND):
    partial = cuda.shared.array((_WARPS, _COLUMNS), float32)
    n, lane, warp = cuda.blockIdx.x, cuda.laneid, cuda.threadIdx.x // WARP
    rows, width = np.int64(weight_RD.shape[0]), np.uint64(weight_RD.shape[1])
    d0 = np.uint64(cuda.blockIdx.y * _COLUMNS + lane)
    d1 = d0 + STRIDE
    d2 = d1 + STRIDE
    d3 = d2 + STRIDE
    # Columns behind the last are read at the first, and not written.
    e0, e1, e2, e3 = _within(d0, width), _within(d1, width), _within(d2, width), _within(d3, width)
    start, end = np.int64(n) * slots, (np.int64(n) + 1) * slots
    if not slots:
        start, end = indptr[n], indptr[n + 1]
    fault = np.float32(0)
    if start < 0 or end < start or end > ids.size:
        start, end, fault = 0, 0, np.float32(np.nan)
    sum0 = sum1 = sum2 = sum3 = np.float32(0)
    j, stop = np.uint64(start + warp), np.uint64(end)
    while j < stop:
        k = j + _NEXT
        row, other = np.int64(ids[j]), np.int64(ids[k]) if k < stop else np.int64(-1)
        has_row, has_other = 0 <= row < rows, 0 <= other < rows
        if not has_row and (row != -1 or not slots):
            fault = np.float32(np.nan)
        if not has_other and k < stop and (other != -1 or not slots):
            fault = np.float32(np.nan)
        if has_row or has_other:
            r, q = np.uint64(row if has_row else other), np.uint64(other if has_other else row)
            last = k if k < stop else j
            factor = wide(factors[j]) if factors.size else np.float32(1)
            second = wide(factors[last]) if factors.size else np.float32(1)
            r0, r1, r2, r3 = weight_RD[r, e0], weight_RD[r, e1], weight_RD[r, e2], weight_RD[r, e3]
            q0, q1, q2, q3 = weight_RD[q, e0], weight_RD[q, e1], weight_RD[q, e2], weight_RD[q, e3]
            if has_row:
                sum0 += factor * wide(r0)
                sum1 += factor * wide(r1)
                sum2 += factor * wide(r2)
                sum3 += factor * wide(r3)
            if has_other:
                sum0 += second * wide(q0)
                sum1 += second * wide(q1)
                sum2 += second * wide(q2)
                sum3 += second * wide(q3)
        j = k + _NEXT
    column = np.uint64(lane)
    partial[warp, column] = sum0 + fault
    partial[warp, column + STRIDE] = sum1 + fault
    partial[warp, column + STRIDE * np.uint64(2)] = sum2 + fault
    partial[warp, column + STRIDE * np.uint64(3)] = sum3 + fault
    cuda.syncthreads()
    d = np.uint64(cuda.blockIdx.y * _COLUMNS + cuda.threadIdx.x)
    if cuda.threadIdx.x < _COLUMNS and d < width:
        total = wide(bias_D[d]) if bias_D.size else np.float32(0)
        for i in range(_WARPS):
            total += partial[i, cuda.threadIdx.x]
        store(out_ND, (n, d), total)


@cuda.jit(device=True)
def _within(d, width):
    return d if d < width else np.uint64(0)
