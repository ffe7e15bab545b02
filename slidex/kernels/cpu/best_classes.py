"""The best of all classes: rough products decide who can be among them, exact ones who is.

A rough product, in bfloat16 or not, comes with a bound on its error. Whoever may be among the k best within that bound,
a few more than k, is scored again. So the result does not depend on how products were rounded. Letters: N rows, C
classes, R rows at once, M classes at once, D hidden width, K classes wanted, G groups of classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit, prange

from slidex.kernels.cpu.arguments import Arguments
from slidex.kernels.cpu.heap import GROUPS, best_first, less, offer, reached
from slidex.kernels.cpu.intrinsics import FUSE, lane_dot, prefetch_row, widen

if TYPE_CHECKING:
    from slidex.kernels.rough_rows import RoughRows

_ROWS, _PRODUCTS = 512, 1 << 22
"""Rows and products at once: 16 MiB in float32."""
_FEW = 16
_AHEAD = 4


def best_classes(
    hidden_ND: torch.Tensor,
    weight_CD: torch.Tensor,
    bias_C: torch.Tensor,
    k: int,
    rough: RoughRows,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest ``h . w_c + b_c`` of each row, best first; of equal ones those of lower id first.

    All classes are scored with `rough`, and those that may be among the best exactly, so that how rough it is changes
    the time and nothing else. Deterministic. Reference: `slidex.kernels.reference.best_classes`.

    Args:
        hidden_ND: float32 or float64.
        weight_CD: dtype of `hidden_ND`.
        bias_C: dtype of `hidden_ND`.
        k: Classes for each row; at least 1.
        rough: Of `weight_CD`.

    Returns:
        Scores of the dtype of `hidden_ND` and ids int64, both (N, k), padded with -inf and -1 beyond C.

    Raises:
        ConfigError: A shape or dtype does not fit, or a number is out of its range.
    """
    (num_rows, width), num_classes = hidden_ND.shape, weight_CD.shape[0]
    check = Arguments("best_classes", hidden_ND.dtype)
    if k < 1:
        check.fail("k", "at least 1", k)
    if rough.rows_CD.shape != weight_CD.shape:
        check.fail("rough", f"of shape {tuple(weight_CD.shape)}", tuple(rough.rows_CD.shape))
    hidden = check.floats("hidden_ND", hidden_ND, (num_rows, width))
    weight = check.floats("weight_CD", weight_CD, (num_classes, width))
    bias = check.floats("bias_C", bias_C, (num_classes,))
    scores_NK, ids_NK = hidden_ND.new_empty(num_rows, k), torch.empty(num_rows, k, dtype=torch.int64)
    reach_N = rough.error * torch.linalg.vector_norm(hidden_ND.detach(), dim=1).float().numpy()
    norm, best, found = rough.norm_C.numpy(), scores_NK.numpy(), ids_NK.numpy()
    many = _filled_up(num_rows) if rough.rows_CD.dtype == torch.bfloat16 else num_rows
    rounded_RD = hidden_ND.new_zeros((many, width), dtype=rough.rows_CD.dtype)
    rounded_RD[:num_rows] = hidden_ND.detach()
    at_once = min(len(rounded_RD), _ROWS)
    step = min(max(_PRODUCTS // max(at_once, 1), 1), num_classes)
    # New memory for each chunk would take as long as its products.
    room = rounded_RD.new_empty(at_once * step)
    for row in range(0, num_rows, _ROWS):
        part = slice(row, min(row + _ROWS, num_rows))
        size_N = np.zeros(part.stop - row, np.int64)
        for first in range(0, num_classes, step):
            chunk = slice(first, min(first + step, num_classes))
            rounded = rounded_RD[row : row + _ROWS]
            rough_RM = room[: len(rounded) * (chunk.stop - first)].view(len(rounded), -1)
            torch.mm(rounded, rough.rows_CD[chunk].T, out=rough_RM)
            rough_NM = rough_RM[: len(size_N)]
            _take(
                (rough_NM.view(torch.int16) if rough_NM.dtype == torch.bfloat16 else rough_NM).numpy(),
                norm[chunk],
                reach_N[part],
                first,
                hidden[part],
                weight[chunk],
                bias[chunk],
                size_N,
                best[part],
                found[part],
            )
        _order(size_N, best[part], found[part])
    return scores_NK, ids_NK


def _filled_up(num_rows: int) -> int:
    """Rows that are multiplied in bfloat16 instead of so many: oneDNN compiles, and keeps, code for every shape."""
    return 1 << (num_rows - 1).bit_length() if 0 < num_rows <= _FEW else -(-num_rows // _FEW) * _FEW


@njit(cache=True, nogil=True, parallel=True)
def _take(rough_NM, norm_M, reach_N, first, hidden_ND, weight_MD, bias_M, size_N, scores_NK, ids_NK):
    for n in prange(len(rough_NM)):
        part = scores_NK[n], ids_NK[n]
        size_N[n] = _take_row(
            rough_NM[n], norm_M, reach_N[n], first, hidden_ND[n], weight_MD, bias_M, size_N[n], *part
        )


@njit(nogil=True)
def _take_row(rough_M, norm_M, reach, first, hidden_D, weight_MD, bias_M, size, scores_K, ids_K):
    """Offers the classes from `first` on that may be among the best to a heap; its size then."""
    groups = min(GROUPS * len(scores_K), len(rough_M))  # class m is of group m % groups
    least = scores_K[0]
    if size < len(scores_K):
        least = reached(_best_of_groups(rough_M, norm_M, bias_M, -reach, groups), len(scores_K))
    high_G = _best_of_groups(rough_M, norm_M, bias_M, reach, groups)
    near_M, count = np.empty(len(rough_M), np.int32), 0
    for g in range(groups):
        if high_G[g] < least:
            continue
        for m in range(g, len(rough_M), groups):
            if not widen(rough_M[m]) + bias_M[m] + reach * norm_M[m] < least:
                near_M[count] = m
                count += 1
    for t in range(count):
        if t + _AHEAD < count:
            prefetch_row(weight_MD, near_M[t + _AHEAD])
        m = near_M[t]
        score, c = lane_dot(hidden_D, weight_MD[m]) + bias_M[m], np.int64(first + m)
        if size < len(scores_K) or less(scores_K[0], ids_K[0], score, c):
            size = offer(scores_K, ids_K, size, score, c)
    return size


@njit(nogil=True)
def _best_of_groups(rough_M, norm_M, bias_M, reach, groups):
    """The most that a class of each group has, if each has `reach` times its norm more than its rough score."""
    best_G = np.full(groups, -np.inf, bias_M.dtype)
    for start in range(0, len(rough_M), groups):
        part = slice(start, start + groups)
        _raise(best_G, rough_M[part], norm_M[part], bias_M[part], reach)
    return best_G


@njit(nogil=True, fastmath=FUSE)
def _raise(best_G, rough_G, norm_G, bias_G, reach):
    for g in range(len(rough_G)):
        score = widen(rough_G[g]) + bias_G[g] + reach * norm_G[g]
        best_G[g] = score if score > best_G[g] else best_G[g]


@njit(cache=True, nogil=True)
def _order(size_N, scores_NK, ids_NK):
    for n in range(len(size_N)):
        best_first(scores_NK[n], ids_NK[n], size_N[n])
        scores_NK[n, size_N[n] :], ids_NK[n, size_N[n] :] = -np.inf, -1
