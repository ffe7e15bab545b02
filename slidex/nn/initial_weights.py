"""Initial weights of layers that may be larger than the host's memory: drawn there in blocks, sent where the layer is.

Legend: R rows of a matrix, M of them that a process keeps, D its width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

BLOCK_BYTES = 1 << 26
"""Of float32 numbers that are drawn at once."""
_DRAWN_TOGETHER = 16


def allocate(module: nn.Module, device: torch.device) -> None:
    """Gives the parameters of a module on ``meta`` memory on a device, which holds no numbers yet.

    As torch's ``to_empty``, which imports sympy and more: 0.3 s of CPU at every start.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(part, name, torch.nn.Parameter(empty, requires_grad=parameter.requires_grad))


@torch.no_grad()
def draw_normal(
    out_MD: torch.Tensor,
    deviation: float,
    generator: torch.Generator,
    *,
    begin: int = 0,
    num_rows: int | None = None,
) -> None:
    """Fills rows of a matrix with what ``normal_(0, deviation)`` would make of all of it on the CPU, in float32.

    The host holds `BLOCK_BYTES` of it, and the same cast to another dtype. The generator ends where the whole draw
    would leave it.

    Args:
        out_MD: floating (M, D), on any device: rows `begin` to `begin` + M of the matrix, cast from float32.
        deviation: Standard deviation.
        generator: Of the CPU.
        begin: The first row that is kept; those before and after are drawn as well.
        num_rows: R; None means M.
    """
    width, end = out_MD.shape[1], begin + len(out_MD)
    total = end if num_rows is None else num_rows
    # torch makes sixteen numbers of sixteen, so blocks of a multiple of sixteen give what the whole would. Fewer than
    # sixteen at the end would be drawn one by one: such rows are joined to the block before.
    rows = max(1, BLOCK_BYTES // (4 * max(1, width) * _DRAWN_TOGETHER)) * _DRAWN_TOGETHER
    buffer_RD, first = torch.empty(min(total, rows + _DRAWN_TOGETHER), width), 0
    while first < total:
        left = total - first
        block_RD = buffer_RD[: left if left < rows + _DRAWN_TOGETHER else rows]
        block_RD.normal_(0, deviation, generator=generator)
        low, high = max(first, begin), min(first + len(block_RD), end)
        if low < high:
            out_MD[low - begin : high - begin] = block_RD[low - first : high - first].to(out_MD.dtype)
        first += len(block_RD)
