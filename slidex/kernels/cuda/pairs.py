"""Per-sample mode on the GPU: every row of the batch has its own active classes.

Scores take a warp for each (row, slot) pair; the hidden gradient is a weighted sum of rows (`sums`), the update goes
class by class (`update`). Letters: N batch rows, C classes, D hidden width, A active slots per row (-1 is a pad).
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
        blocks_for(active.numel(), _WARPS),
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
    pair = cuda.grid(1) // WARP
    if pair >= active_NA.size:
        return
    n, a = pair // active_NA.shape[1], pair % active_NA.shape[1]
    c = active_NA[n, a]
    found = 0 <= c < weight_CD.shape[0]
    score = np.float32(0)
    if found:
        d, width = np.uint64(cuda.laneid), np.uint64(weight_CD.shape[1])
        while d < width:
            score += wide(hidden_ND[n, d]) * wide(weight_CD[c, d])
            d += STRIDE
    score = warp_sum(score)
    if found:
        score += wide(bias_C[c]) if bias_C.size else np.float32(0)
    else:
        score = np.float32(-np.inf if c == -1 else np.nan)
    if cuda.laneid == 0:
        logits_NA[n, a] = score
