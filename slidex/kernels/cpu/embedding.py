"""The sparse input layer: a weighted sum of feature rows, and its fused update.

Forward walks the batch, one output row in cache while the feature rows stream past; the update is the same as
the output layer's (`update.update_groups`) with a feature's value as the factor and the gradient rows as the
source. Letters: N batch rows, F features, D width, M stored pairs of the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit, prange

from slidex.kernels.cpu.arguments import Arguments, num_chunks
from slidex.kernels.cpu.intrinsics import FUSE, prefetch_row
from slidex.kernels.cpu.transpose import group_by_id
from slidex.kernels.cpu.update import update_groups

if TYPE_CHECKING:
    from slidex.kernels.optimizer import RowState, StepSettings

_PAIRS_AHEAD = 8


def embedding_bag(
    indptr: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor | None,
    weight_FD: torch.Tensor,
    bias_D: torch.Tensor | None,
) -> torch.Tensor:
    """Weighted sums of feature rows.

    ``out[n] = bias + sum_j values[j] * weight[indices[j]]`` over the pairs j of row n. Reads M weight rows,
    writes the result; deterministic. Reference: `slidex.kernels.reference.embedding_bag`.

    Args:
        indptr: int64 (N + 1,), from 0 to M.
        indices: int32 or int64 (M,), feature ids in [0, F); repeats within a row add up.
        values: (M,) of `weight_FD`'s dtype, or None where each counts 1.
        weight_FD: float32 or float64.
        bias_D: dtype of `weight_FD`, or None for none.

    Returns:
        out (N, D) of the dtype of `weight_FD`; an empty bag gives the bias.

    Raises:
        ConfigError: A shape, dtype, offset or id does not fit.
    """
    (num_features, width), nnz, num_rows = weight_FD.shape, indices.shape[0], max(indptr.shape[0] - 1, 0)
    check = Arguments("embedding_bag", weight_FD.dtype)
    out_ND = torch.empty((num_rows, width), dtype=weight_FD.dtype)
    _bags(
        check.offsets("indptr", indptr, num_rows, nnz),
        check.ids("indices", indices, (nnz,), 0, num_features),
        check.floats_or(1, "values", values, (nnz,)),
        check.floats("weight_FD", weight_FD, (num_features, width)),
        check.floats_or(0, "bias_D", bias_D, (width,)),
        out_ND.numpy(),
    )
    return out_ND


def embedding_bag_update(
    indptr: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor | None,
    grad_ND: torch.Tensor,
    weight_FD: torch.Tensor,
    state: RowState,
    settings: StepSettings,
) -> None:
    """Gradient of the touched feature rows and their optimiser step, in one pass and in place.

    ``grad_weight[f] = sum over pairs j of row n with indices[j] = f of values[j] * grad[n]``; untouched rows
    keep weights and state. Cost O(M), whatever F. Deterministic: pairs are summed in the order of their
    position. Reference: `slidex.kernels.reference.embedding_bag_update`.

    Args:
        indptr: int64 (N + 1,), from 0 to M.
        indices: int32 or int64 (M,), feature ids in [0, F).
        values: (M,) of `weight_FD`'s dtype, or None where each counts 1.
        grad_ND: Gradient of `embedding_bag`'s result, dtype of `weight_FD`.
        weight_FD: float32 or float64, updated in place; contiguous.
        state: State of `weight_FD`, updated in place.
        settings: The step's settings.

    Raises:
        ConfigError: A shape, dtype, offset or id does not fit.
    """
    (num_features, width), nnz, num_rows = weight_FD.shape, indices.shape[0], max(indptr.shape[0] - 1, 0)
    check = Arguments("embedding_bag_update", weight_FD.dtype)
    offsets = check.offsets("indptr", indptr, num_rows, nnz)
    ids = check.ids("indices", indices, (nnz,), 0, num_features)
    factors = check.floats_or(1, "values", values, (nnz,))
    grad = check.floats("grad_ND", grad_ND, (num_rows, width))
    weights = check.parameter("weight_FD", weight_FD, state, (num_features, width))
    no_bias = np.empty(0, dtype=grad.dtype)
    groups = group_by_id(ids, offsets, num_features, num_chunks())
    update_groups(groups, factors, grad, weights, (no_bias, no_bias, no_bias), settings)


@njit(cache=True, nogil=True, parallel=True)
def _bags(indptr, indices, values, weight_FD, bias_D, out_ND):
    for n in prange(out_ND.shape[0]):
        pairs = slice(indptr[n], indptr[n + 1])
        _bag(indices[pairs], values[pairs], weight_FD, bias_D, out_ND[n])


@njit(nogil=True, fastmath=FUSE)
def _bag(ids, values, weight_FD, bias_D, out_D):
    for d in range(out_D.size):
        out_D[d] = bias_D[d]
    for j in range(ids.size):
        if j + _PAIRS_AHEAD < ids.size:
            prefetch_row(weight_FD, ids[j + _PAIRS_AHEAD])
        row, value = ids[j], values[j]  # read here: the compiler must fear that out_D overwrites them
        for d in range(out_D.size):
            out_D[d] += value * weight_FD[row, d]
