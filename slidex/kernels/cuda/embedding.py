"""The sparse input layer on the GPU: a weighted sum of feature rows, and its fused update.

Letters: N batch rows, F features, D width, M stored pairs of the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from slidex.kernels.cuda.arguments import Arguments
from slidex.kernels.cuda.sums import weighted_sums
from slidex.kernels.cuda.update import update_groups

if TYPE_CHECKING:
    from slidex.kernels.optimizer import RowState, StepSettings


def embedding_bag(
    indptr: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor | None,
    weight_FD: torch.Tensor,
    bias_D: torch.Tensor | None,
) -> torch.Tensor:
    """Weighted sums of feature rows, as `slidex.kernels.cpu.embedding_bag`; deterministic.

    Args:
        indptr: int64 (N + 1,), from 0 to M.
        indices: int32 or int64 (M,), feature ids in [0, F); repeats within a row add up.
        values: (M,) float32, bfloat16 or float16, or None where each counts 1.
        weight_FD: The feature rows, any of the three.
        bias_D: Any of the three, or None for none.

    Returns:
        out (N, D) float32; an empty bag gives the bias, an id or offset out of range gives NaN in its row.

    Raises:
        ConfigError: A shape, dtype or device does not fit.
    """
    (num_features, width), nnz, num_rows = weight_FD.shape, indices.shape[0], max(indptr.shape[0] - 1, 0)
    check = Arguments("embedding_bag", "weight_FD", weight_FD)
    out_ND = check.empty(num_rows, width)
    weighted_sums(
        check.long_integers("indptr", indptr, (num_rows + 1,)),
        0,
        check.integers("indices", indices, (nnz,)),
        check.floats_or_none("values", values, (nnz,)),
        check.floats("weight_FD", weight_FD, (num_features, width)),
        check.floats_or_none("bias_D", bias_D, (width,)),
        out_ND,
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
    """Gradient of the touched feature rows and their optimiser step, as `slidex.kernels.cpu.embedding_bag_update`.

    Pairs are summed in the order of their position: the same bits in every run.

    Args:
        indptr: int64 (N + 1,), from 0 to M, never falling.
        indices: int32 or int64 (M,), feature ids in [0, F); one out of range is left out.
        values: (M,) float32, bfloat16 or float16, or None where each counts 1.
        grad_ND: Gradient of `embedding_bag`'s result, any of the three.
        weight_FD: Any of the three; updated in place, 16 bits rounded stochastically; contiguous.
        state: State of `weight_FD`, float32, updated in place.
        settings: The step's settings.

    Raises:
        ConfigError: A shape, dtype or device does not fit.
    """
    (num_features, width), nnz, num_rows = weight_FD.shape, indices.shape[0], max(indptr.shape[0] - 1, 0)
    check = Arguments("embedding_bag_update", "weight_FD", weight_FD)
    offsets = check.long_integers("indptr", indptr, (num_rows + 1,))
    positions = torch.arange(nnz, device=check.device)
    rows = torch.searchsorted(offsets[1:].contiguous(), positions, right=True)
    update_groups(
        check,
        check.integers("indices", indices, (nnz,)),
        rows,
        0,
        check.floats_or_none("values", values, (nnz,)),
        check.floats("grad_ND", grad_ND, (num_rows, width)),
        check.parameter("weight_FD", weight_FD, state, (num_features, width)),
        check.parameter_or_none("bias", None, None, (num_features,)),
        settings,
    )
