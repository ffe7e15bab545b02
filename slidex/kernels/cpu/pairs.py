"""Per-sample mode: every row of the batch has its own active classes (SLIDE's way, Chen et al., 2020).

Scores and the hidden gradient walk the batch row by row, with the weight rows of later slots prefetched. The
update walks class by class: the (row, slot) pairs are regrouped so that each weight row is loaded once, its
gradient summed over its samples in cache and the optimiser's step applied at once, with no atomics. All results
are bit-equal for any thread count. Letters: N batch rows, C classes, D hidden width, A active slots per row (-1 is a
pad).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit, prange

from slidex.kernels.cpu.arguments import Arguments, num_chunks
from slidex.kernels.cpu.intrinsics import FUSE, lane_dot, prefetch_row
from slidex.kernels.cpu.transpose import group_by_id
from slidex.kernels.cpu.update import update_groups

if TYPE_CHECKING:
    from slidex.kernels.optimizer import RowState, StepSettings

_SLOTS_AHEAD = 8


def pair_logits(
    hidden_ND: torch.Tensor,
    weight_CD: torch.Tensor,
    bias_C: torch.Tensor | None,
    active_NA: torch.Tensor,
) -> torch.Tensor:
    """Scores of each row's active classes.

    ``logits[n, a] = hidden[n] . weight[c] + bias[c]`` with ``c = active[n, a]``. Reads N * A weight rows,
    writes the result; deterministic. Reference: `slidex.kernels.reference.pair_logits`.

    Args:
        hidden_ND: float32 or float64.
        weight_CD: dtype of `hidden_ND`.
        bias_C: dtype of `hidden_ND`, or None for 0.
        active_NA: int64 class ids in [0, C), or -1 for a pad.

    Returns:
        logits (N, A) of the same dtype, -inf at pads.

    Raises:
        ConfigError: A shape, dtype or id does not fit.
    """
    (num_rows, width), num_classes = hidden_ND.shape, weight_CD.shape[0]
    check = Arguments("pair_logits", hidden_ND.dtype)
    logits_NA = torch.empty(active_NA.shape, dtype=hidden_ND.dtype)
    _logits(
        check.floats("hidden_ND", hidden_ND, (num_rows, width)),
        check.floats("weight_CD", weight_CD, (num_classes, width)),
        check.floats_or_none("bias_C", bias_C, (num_classes,)),
        check.ids("active_NA", active_NA, (num_rows, active_NA.shape[-1]), -1, num_classes),
        logits_NA.numpy(),
    )
    return logits_NA


def pair_hidden_grad(grad_NA: torch.Tensor, weight_CD: torch.Tensor, active_NA: torch.Tensor) -> torch.Tensor:
    """Gradient of the hidden vectors: ``grad_hidden[n] = sum_a grad[n, a] * weight[active[n, a]]``.

    Reads N * A weight rows, writes the result; deterministic. Reference:
    `slidex.kernels.reference.pair_hidden_grad`.

    Args:
        grad_NA: float32 or float64, gradient of the logits; ignored at pads.
        weight_CD: dtype of `grad_NA`.
        active_NA: int64 class ids in [0, C), or -1 for a pad.

    Returns:
        grad_hidden (N, D) of the same dtype.

    Raises:
        ConfigError: A shape, dtype or id does not fit.
    """
    num_classes, width = weight_CD.shape
    check = Arguments("pair_hidden_grad", grad_NA.dtype)
    hidden_grad_ND = torch.empty((grad_NA.shape[0], width), dtype=grad_NA.dtype)
    _hidden_grad(
        check.floats("grad_NA", grad_NA, tuple(active_NA.shape)),
        check.floats("weight_CD", weight_CD, (num_classes, width)),
        check.ids("active_NA", active_NA, tuple(grad_NA.shape), -1, num_classes),
        hidden_grad_ND.numpy(),
    )
    return hidden_grad_ND


def pair_update(
    grad_NA: torch.Tensor,
    hidden_ND: torch.Tensor,
    active_NA: torch.Tensor,
    weight_CD: torch.Tensor,
    bias_C: torch.Tensor | None,
    weight_state: RowState,
    bias_state: RowState | None,
    settings: StepSettings,
) -> None:
    """Gradient of the active weight rows and biases, and their optimiser step, in one pass and in place.

    ``grad_weight[c] = sum over pairs (n, a) with active[n, a] = c of grad[n, a] * hidden[n]``, likewise the
    bias; rows without a pair keep weights and state. Cost O(N * A), whatever C. Deterministic: pairs are
    summed in the order of their position. Reference: `slidex.kernels.reference.pair_update`.

    Args:
        grad_NA: float32 or float64, gradient of the logits; ignored at pads.
        hidden_ND: dtype of `grad_NA`.
        active_NA: int64 class ids in [0, C), or -1 for a pad.
        weight_CD: Updated in place; contiguous.
        bias_C: Updated in place; contiguous; or None.
        weight_state: State of `weight_CD`, updated in place.
        bias_state: State of `bias_C`, updated in place; None where there is no bias.
        settings: The step's settings.

    Raises:
        ConfigError: A shape, dtype or id does not fit.
    """
    (num_rows, num_slots), (num_classes, width) = grad_NA.shape, weight_CD.shape
    check = Arguments("pair_update", grad_NA.dtype)
    grad = check.floats("grad_NA", grad_NA, (num_rows, num_slots))
    active = check.ids("active_NA", active_NA, (num_rows, num_slots), -1, num_classes)
    hidden = check.floats("hidden_ND", hidden_ND, (num_rows, width))
    weights = check.parameter("weight_CD", weight_CD, weight_state, (num_classes, width))
    biases = check.parameter_or_none("bias_C", bias_C, bias_state, (num_classes,))
    indptr = np.arange(num_rows + 1) * num_slots
    groups = group_by_id(active.reshape(-1), indptr, num_classes, num_chunks())
    update_groups(groups, grad.reshape(-1), hidden, weights, biases, settings)


@njit(cache=True, nogil=True, parallel=True)
def _logits(hidden_ND, weight_CD, bias_C, active_NA, logits_NA):
    for n in prange(active_NA.shape[0]):
        _logits_row(hidden_ND[n], weight_CD, bias_C, active_NA[n], logits_NA[n])


@njit(nogil=True, fastmath=FUSE)
def _logits_row(hidden_D, weight_CD, bias_C, active_A, logits_A):
    for a in range(active_A.size):
        if a + _SLOTS_AHEAD < active_A.size:
            prefetch_row(weight_CD, max(active_A[a + _SLOTS_AHEAD], 0))
        c = active_A[a]
        if c < 0:
            logits_A[a] = -np.inf
            continue
        score = lane_dot(hidden_D, weight_CD[c])
        logits_A[a] = score + bias_C[c] if bias_C.size else score


@njit(cache=True, nogil=True, parallel=True)
def _hidden_grad(grad_NA, weight_CD, active_NA, hidden_grad_ND):
    for n in prange(active_NA.shape[0]):
        _hidden_grad_row(grad_NA[n], weight_CD, active_NA[n], hidden_grad_ND[n])


@njit(nogil=True, fastmath=FUSE)
def _hidden_grad_row(grad_A, weight_CD, active_A, out_D):
    out_D[:] = 0
    for a in range(active_A.size):
        if a + _SLOTS_AHEAD < active_A.size:
            prefetch_row(weight_CD, max(active_A[a + _SLOTS_AHEAD], 0))
        c = active_A[a]
        if c < 0:
            continue
        scale = grad_A[a]  # read here: the compiler must fear that out_D overwrites it
        for d in range(out_D.size):
            out_D[d] += scale * weight_CD[c, d]
