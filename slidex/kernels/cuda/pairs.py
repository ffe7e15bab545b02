"""Per-sample mode on the GPU: every row of the batch has its own active classes.

Scores take a warp for four slots of a row, whose weights it asks for side by side, so that enough loads are on their
way; the hidden gradient is a weighted sum of rows (`sums`), the update goes class by class (`update`). Letters: N batch
rows, C classes, D hidden width, A active slots per row (-1 is a pad).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from slidex.kernels.cuda.arguments import Arguments
from slidex.kernels.cuda.device import STRIDE, warp_sum, wide
from slidex.kernels.cuda.launch import WARP, blocks_for, cuda, kernel
from slidex.kernels.cuda.sums import weighted_sums
from slidex.kernels.cuda.update import update_groups

if TYPE_CHECKING:
    import torch

    from slidex.kernels.optimizer import RowState, StepSettings

_WARPS = 4
_SLOTS = 4  # of a warp


def pair_logits(
    hidden_ND: torch.Tensor, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, active_NA: torch.Tensor
) -> torch.Tensor:
    """Scores of each row's active classes, as `slidex.kernels.cpu.pair_logits`; deterministic.

    Args:
        hidden_ND: float32, bfloat16 or float16, as are the next two, each for itself.
        weight_CD: The class rows.
        bias_C: The class biases, or None for 0.
        active_NA: int32 or int64 class ids in [0, C), or -1 for a pad.

    Returns:
        logits (N, A) float32, -inf at pads, NaN at an id out of range.

    Raises:
        ConfigError: A shape, dtype or device does not fit.
    """
    (num_rows, width), num_classes = hidden_ND.shape, weight_CD.shape[0]
    check = Arguments("pair_logits", "hidden_ND", hidden_ND)
    active = check.integers("active_NA", active_NA, (num_rows, active_NA.shape[-1]))
    logits_NA = check.empty(*active.shape)
    _logits.launch(
        blocks_for(num_rows * blocks_for(active.shape[1], _SLOTS), _WARPS),
        _WARPS * WARP,
        check.floats("hidden_ND", hidden_ND, (num_rows, width)),
        check.floats("weight_CD", weight_CD, (num_classes, width)),
        check.floats_or_none("bias_C", bias_C, (num_classes,)),
        active,
        logits_NA,
    )
    return logits_NA


def pair_hidden_grad(grad_NA: torch.Tensor, weight_CD: torch.Tensor, active_NA: torch.Tensor) -> torch.Tensor:
    """Gradient of the hidden vectors, as `slidex.kernels.cpu.pair_hidden_grad`; deterministic.

    Args:
        grad_NA: float32, bfloat16 or float16, gradient of the logits; ignored at pads.
        weight_CD: The class rows, any of the three.
        active_NA: int32 or int64 class ids in [0, C), or -1 for a pad.

    Returns:
        grad_hidden (N, D) float32, NaN in a row with an id out of range.

    Raises:
        ConfigError: A shape, dtype or device does not fit.
    """
    (num_rows, num_slots), (num_classes, width) = grad_NA.shape, weight_CD.shape
    check = Arguments("pair_hidden_grad", "grad_NA", grad_NA)
    hidden_grad_ND = check.empty(num_rows, width)
    grad = check.floats("grad_NA", grad_NA, tuple(active_NA.shape))
    active = check.integers("active_NA", active_NA, (num_rows, num_slots))
    weight = check.floats("weight_CD", weight_CD, (num_classes, width))
    if not num_slots:
        return hidden_grad_ND.zero_()
    no_bias, no_indptr = check.none((width,)), check.integer_none()
    weighted_sums(no_indptr, num_slots, active.view(-1), grad.view(-1), weight, no_bias, hidden_grad_ND)
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
    """Gradient of the active weight rows and biases, and their optimiser step, as `slidex.kernels.cpu.pair_update`.

    Pairs are summed in the order of their position: the same bits in every run.

    Args:
        grad_NA: float32, bfloat16 or float16, gradient of the logits; ignored at pads.
        hidden_ND: Any of the three.
        active_NA: int32 or int64 class ids in [0, C), or -1 for a pad; one out of range is left out.
        weight_CD: Any of the three; updated in place, 16 bits rounded stochastically; contiguous.
        bias_C: Any of the three; updated in place; contiguous; or None.
        weight_state: State of `weight_CD`, float32, updated in place.
        bias_state: State of `bias_C`, float32, updated in place; None where there is no bias.
        settings: The step's settings.

    Raises:
        ConfigError: A shape, dtype or device does not fit.
    """
    (num_rows, num_slots), (num_classes, width) = grad_NA.shape, weight_CD.shape
    check = Arguments("pair_update", "grad_NA", grad_NA)
    update_groups(
        check,
        check.integers("active_NA", active_NA, (num_rows, num_slots)).view(-1),
        None,
        num_slots,
        check.floats("grad_NA", grad_NA, (num_rows, num_slots)).view(-1),
        check.floats("hidden_ND", hidden_ND, (num_rows, width)),
        check.parameter("weight_CD", weight_CD, weight_state, (num_classes, width)),
        check.parameter_or_none("bias_C", bias_C, bias_state, (num_classes,)),
        settings,
    )


@kernel
def _logits(hidden_ND, weight_CD, bias_C, active_NA, logits_NA):
    slots, lane = active_NA.shape[1], cuda.laneid
    groups = (slots + _SLOTS - 1) // _SLOTS
    group = cuda.grid(1) // WARP
    if group >= active_NA.shape[0] * groups:
        return
    n, first = np.uint64(group // groups), group % groups * _SLOTS
    c0, has0 = _class(active_NA, weight_CD, n, first)
    c1, has1 = _class(active_NA, weight_CD, n, first + 1)
    c2, has2 = _class(active_NA, weight_CD, n, first + 2)
    c3, has3 = _class(active_NA, weight_CD, n, first + 3)
    score0 = score1 = score2 = score3 = np.float32(0)
    if has0 or has1 or has2 or has3:
        known = (
            c0 if has0 else (c1 if has1 else (c2 if has2 else c3))
        )  # read in place of a class that is none
        r0, r1 = np.uint64(c0 if has0 else known), np.uint64(c1 if has1 else known)
        r2, r3 = np.uint64(c2 if has2 else known), np.uint64(c3 if has3 else known)
        base, width = np.uint64(0), np.uint64(weight_CD.shape[1])
        while base < width:
            d0 = base + np.uint64(lane)
            d1 = d0 + STRIDE
            e0, e1 = d0 if d0 < width else base, d1 if d1 < width else base
            h, w0, w1, w2, w3 = (
                hidden_ND[n, e0],
                weight_CD[r0, e0],
                weight_CD[r1, e0],
                weight_CD[r2, e0],
                weight_CD[r3, e0],
            )
            g, v0, v1, v2, v3 = (
                hidden_ND[n, e1],
                weight_CD[r0, e1],
                weight_CD[r1, e1],
                weight_CD[r2, e1],
                weight_CD[r3, e1],
            )
            cuda.syncwarp()  # else the compiler would ask for each of them when it is needed
            if d0 < width:
                score0 += wide(h) * wide(w0)
                score1 += wide(h) * wide(w1)
                score2 += wide(h) * wide(w2)
                score3 += wide(h) * wide(w3)
            if d1 < width:
                score0 += wide(g) * wide(v0)
                score1 += wide(g) * wide(v1)
                score2 += wide(g) * wide(v2)
                score3 += wide(g) * wide(v3)
            base += STRIDE + STRIDE
    score0, score1, score2, score3 = warp_sum(score0), warp_sum(score1), warp_sum(score2), warp_sum(score3)
    if lane < _SLOTS and first + lane < slots:
        score = (score0 if lane == 0 else score1) if lane < 2 else (score2 if lane == 2 else score3)
        c, found = _class(active_NA, weight_CD, n, first + lane)
        if found:
            score += wide(bias_C[c]) if bias_C.size else np.float32(0)
        else:
            score = np.float32(-np.inf if c == -1 else np.nan)
        logits_NA[n, np.uint64(first + lane)] = score


@cuda.jit(device=True)
def _class(active_NA, weight_CD, n, slot):
    """The class in a slot, -1 behind the last one, and whether there is such a class."""
    c = np.int64(active_NA[n, np.uint64(slot)]) if slot < active_NA.shape[1] else np.int64(-1)
    return c, 0 <= c < weight_CD.shape[0]
