"""Shared-pool mode on the GPU: the products are cuBLAS's, through torch; here are the two ends of them.

Letters: C classes, D hidden width, U pool size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slidex.kernels.cuda.arguments import Arguments
from slidex.kernels.cuda.update import update_rows

if TYPE_CHECKING:
    import torch

    from slidex.kernels.optimizer import RowState, StepSettings


def gather_rows(
    weight_CD: torch.Tensor, bias_C: torch.Tensor | None, ids_U: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy the pool's rows and biases into contiguous blocks, as `slidex.kernels.cpu.gather_rows`.

    Args:
        weight_CD: float32, bfloat16 or float16.
        bias_C: Any of the three, or None for 0.
        ids_U: int32 or int64 class ids in [0, C); torch stops the device at one out of range.

    Returns:
        block (U, D) and bias (U,), of the dtypes of `weight_CD` and `bias_C`; float32 zeros without a bias.

    Raises:
        ConfigError: A shape, dtype or device does not fit.
    """
    num_classes, width = weight_CD.shape
    check = Arguments("gather_rows", "weight_CD", weight_CD)
    ids = check.integers("ids_U", ids_U, (ids_U.shape[0],))
    block_UD = check.floats("weight_CD", weight_CD, (num_classes, width)).index_select(0, ids)
    if bias_C is None:
        return block_UD, check.empty(len(ids)).zero_()
    return block_UD, check.floats("bias_C", bias_C, (num_classes,)).index_select(0, ids)


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
    """Optimiser step of the pool's rows and biases, in place, as `slidex.kernels.cpu.rows_update`; deterministic.

    Args:
        ids_U: int32 or int64 class ids in [0, C), each at most once; one out of range is left out.
        grad_UD: Gradient of the rows, float32, bfloat16 or float16.
        grad_bias_U: Gradient of the biases, any of the three; None where there is no bias.
        weight_CD: Any of the three; updated in place, 16 bits rounded stochastically; contiguous.
        bias_C: Any of the three; updated in place; contiguous; or None.
        weight_state: State of `weight_CD`, float32, updated in place.
        bias_state: State of `bias_C`, float32, updated in place; None where there is no bias.
        settings: The step's settings.

    Raises:
        ConfigError: A shape, dtype or device does not fit.
    """
    num_classes, width = weight_CD.shape
    pool_size = ids_U.shape[0]
    check = Arguments("rows_update", "weight_CD", weight_CD)
    update_rows(
        check,
        check.integers("ids_U", ids_U, (pool_size,)),
        check.floats("grad_UD", grad_UD, (pool_size, width)),
        check.floats_or_none("grad_bias_U", grad_bias_U if bias_C is not None else None, (pool_size,)),
        check.parameter("weight_CD", weight_CD, weight_state, (num_classes, width)),
        check.parameter_or_none("bias_C", bias_C, bias_state, (num_classes,)),
        settings,
    )
