"""Shared-pool mode: the batch scores one pool of U classes, so the products are dense and belong to BLAS.

What is left for kernels is at the two ends: gather the pool's weight rows into a block, and scatter the
block's gradient back with the optimiser's step applied on the way. Letters: C classes, D hidden width, U pool size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from numba import njit, prange

from slidex.kernels.cpu.arguments import Arguments, num_chunks
from slidex.kernels.cpu.intrinsics import FUSE, prefetch_row
from slidex.kernels.cpu.update import AHEAD, coefficients, prefetch_parameter, update_entry, update_row

if TYPE_CHECKING:
    from slidex.kernels.optimizer import RowState, StepSettings

_ROWS_AHEAD = 8


def gather_rows(
    weight_CD: torch.Tensor, bias_C: torch.Tensor | None, ids_U: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy the pool's rows and biases into contiguous blocks.

    Reads and writes U rows; deterministic. Reference: `slidex.kernels.reference.gather_rows`.

    Args:
        weight_CD: float32 or float64.
        bias_C: dtype of `weight_CD`, or None for 0.
        ids_U: int64 class ids in [0, C).

    Returns:
        block (U, D) and bias (U,) of the same dtype.

    Raises:
        ConfigError: A shape, dtype or id does not fit.
    """
    num_classes, width = weight_CD.shape
    pool_size = ids_U.shape[0]
    check = Arguments("gather_rows", weight_CD.dtype)
    block_UD = torch.empty((pool_size, width), dtype=weight_CD.dtype)
    bias_U = torch.empty(pool_size, dtype=weight_CD.dtype)
    _gather(
        check.floats("weight_CD", weight_CD, (num_classes, width)),
        check.floats_or_none("bias_C", bias_C, (num_classes,)),
        check.ids("ids_U", ids_U, (pool_size,), 0, num_classes),
        block_UD.numpy(),
        bias_U.numpy(),
        num_chunks(),
    )
    return block_UD, bias_U


def rows_update(
    ids_U: torch.Tensor,
    grad_UD: torch.Tensor,
    grad_bias_U: torch.Tensor | None,
    weight_CD: torch.Tensor,
    bias_C: torch.Tensor | None,
    weight_state: RowState,
    bias_state: RowState | None,
    settings: StepSettings,
) -> None:
    """Optimiser step of the pool's rows and biases, in place.

    Reads U gradient rows, reads and writes U rows of weight and state; deterministic. Reference:
    `slidex.kernels.reference.rows_update`.

    Args:
        ids_U: int64 class ids in [0, C), each at most once.
        grad_UD: Gradient of the rows, dtype of `weight_CD`.
        grad_bias_U: Gradient of the biases, dtype of `weight_CD`; None where there is no bias.
        weight_CD: float32 or float64, updated in place; contiguous.
        bias_C: Updated in place; contiguous; or None.
        weight_state: State of `weight_CD`, updated in place.
        bias_state: State of `bias_C`, updated in place; None where there is no bias.
        settings: The step's settings.

    Raises:
        ConfigError: A shape, dtype or id does not fit.
    """
    num_classes, width = weight_CD.shape
    pool_size = ids_U.shape[0]
    check = Arguments("rows_update", weight_CD.dtype)
    grad = check.floats("grad_UD", grad_UD, (pool_size, width))
    _rows_update(
        check.ids("ids_U", ids_U, (pool_size,), 0, num_classes),
        grad,
        check.floats_or(0, "grad_bias_U", grad_bias_U if bias_C is not None else None, (pool_size,)),
        check.parameter("weight_CD", weight_CD, weight_state, (num_classes, width)),
        check.parameter_or_none("bias_C", bias_C, bias_state, (num_classes,)),
        coefficients(settings, grad.dtype),
        num_chunks(),
    )


@njit(cache=True, nogil=True, parallel=True)
def _gather(weight_CD, bias_C, ids_U, block_UD, bias_U, chunks):
    for chunk in prange(chunks):
        part = slice(ids_U.size * chunk // chunks, ids_U.size * (chunk + 1) // chunks)
        _gather_chunk(weight_CD, bias_C, ids_U[part], block_UD[part], bias_U[part])


@njit(nogil=True)
def _gather_chunk(weight_CD, bias_C, ids_U, block_UD, bias_U):
    for u in range(ids_U.size):
        if u + _ROWS_AHEAD < ids_U.size:
            prefetch_row(weight_CD, ids_U[u + _ROWS_AHEAD])
        c = ids_U[u]
        bias_U[u] = bias_C[c] if bias_C.size else bias_U.dtype.type(0)
        for d in range(block_UD.shape[1]):
            block_UD[u, d] = weight_CD[c, d]


@njit(cache=True, nogil=True, parallel=True)
def _rows_update(ids_U, grad_UD, grad_bias_U, weights, biases, step, chunks):
    for chunk in prange(chunks):
        part = slice(ids_U.size * chunk // chunks, ids_U.size * (chunk + 1) // chunks)
        _rows_chunk(ids_U[part], grad_UD[part], grad_bias_U[part], weights, biases, step)


@njit(nogil=True, fastmath=FUSE)
def _rows_chunk(ids_U, grad_UD, grad_bias_U, weights, biases, step):
    for u in range(ids_U.size):
        if u + AHEAD < ids_U.size:
            prefetch_parameter(weights, ids_U[u + AHEAD])
        update_row(grad_UD[u], weights, ids_U[u], step)
        if biases[0].size:
            update_entry(grad_bias_U[u], biases, ids_U[u], step)
