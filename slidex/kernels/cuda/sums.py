"""Weighted sums of rows: the sparse input layer, and the gradient of the hidden vectors.

A block makes 32 columns of one sum; its warps take every eighth pair each, and their parts are added in a fixed
order. Letters: N sums, R rows of the weight, D width, M pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from slidex.kernels.cuda.device import store, wide
from slidex.kernels.cuda.launch import WARP, blocks_for, cuda, float32, kernel

if TYPE_CHECKING:
    import torch

_WARPS = 8
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
    grid = num_rows, blocks_for(width, WARP)
    _weighted_sums.launch(grid, _WARPS * WARP, indptr, slots, ids, factors, weight_RD, bias_D, out_ND)


@kernel
def _weighted_sums(indptr, slots, ids, factors, weight_RD, bias_D, out_ND):
    partial = cuda.shared.array((_WARPS, WARP), float32)
    n, lane, warp = cuda.blockIdx.x, cuda.laneid, cuda.threadIdx.x // WARP
    d, width = np.uint64(cuda.blockIdx.y * WARP + lane), np.uint64(weight_RD.shape[1])
    start, end = np.int64(n) * slots, (np.int64(n) + 1) * slots
    if not slots:
        start, end = indptr[n], indptr[n + 1]
    total = np.float32(0)
    if start < 0 or end < start or end > ids.size:
        start, end, total = 0, 0, np.float32(np.nan)
    j, stop = np.uint64(start + warp), np.uint64(end)
    while j < stop:
        row = ids[j]
        if 0 <= row < weight_RD.shape[0]:
            factor = wide(factors[j]) if factors.size else np.float32(1)
            if d < width:
                total += factor * wide(weight_RD[np.uint64(row), d])
        elif row != -1 or not slots:
            total = np.float32(np.nan)
        j += _NEXT
    partial[warp, lane] = total
    cuda.syncthreads()
    if warp == 0 and d < width:
        total = wide(bias_D[d]) if bias_D.size else np.float32(0)
        for i in range(_WARPS):
            total += partial[i, lane]
        store(out_ND, (n, d), total)
