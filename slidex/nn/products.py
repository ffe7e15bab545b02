"""The three matrix products of a layer that scores a batch on one set of classes.

On a CPU they are made in pieces of classes, so that what a product needs for a moment stays in the cache and is memory
that the process has already: of 283 thousand classes a step with fresh arrays takes three times as long, most of it for
page faults. On a device, whose memory is kept, pieces only bound what is needed at a time.

Legend: N rows in a batch, U classes, D hidden width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

CLASSES_AT_ONCE = 1 << 16
"""On a device."""
_CPU_PIECE = 1 << 23
"""Scores, or numbers of gradients of rows, in a piece: 16 MiB of bfloat16. For arrays beyond 32 MiB glibc asks the
system each time."""


def pieces(like_ND: torch.Tensor, num_classes: int) -> Iterator[slice]:
    """Ranges of classes that are multiplied at once.

    Args:
        like_ND: Hidden vectors, or what has their shape and place.
        num_classes: U.
    """
    size = CLASSES_AT_ONCE
    if like_ND.device.type == "cpu":
        size = max(1024, _CPU_PIECE // max(1, *like_ND.shape))
    for first in range(0, num_classes, size):
        yield slice(first, min(first + size, num_classes))


def class_scores(
    hidden_ND: torch.Tensor, rows_UD: torch.Tensor, dtype: torch.dtype, out_NU: torch.Tensor | None = None
) -> torch.Tensor:
    """``hidden rowsᵀ``, (N, U), in the dtype of `hidden_ND`.

    Args:
        hidden_ND: float32 or float64.
        rows_UD: float.
        dtype: Of the product.
        out_NU: Takes the result; None makes a new tensor.
    """
    if out_NU is None:
        out_NU = hidden_ND.new_empty(len(hidden_ND), len(rows_UD))
    if dtype == hidden_ND.dtype == rows_UD.dtype:
        return torch.mm(hidden_ND, rows_UD.T, out=out_NU)
    narrow_ND = hidden_ND.to(dtype)
    for part in pieces(hidden_ND, len(rows_UD)):
        out_NU[:, part] = narrow_ND @ rows_UD[part].to(dtype).T
    return out_NU


def hidden_gradient(grad_NU: torch.Tensor, rows_UD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``grad rows``, (N, D), in the dtype of `grad_NU`; arguments as above."""
    if dtype == grad_NU.dtype == rows_UD.dtype:
        return grad_NU @ rows_UD
    total_ND = grad_NU.new_zeros(len(grad_NU), rows_UD.shape[1])
    for part in pieces(total_ND, len(rows_UD)):
        total_ND += grad_NU[:, part].to(dtype) @ rows_UD[part].to(dtype)
    return total_ND


def rows_gradient(grad_NU: torch.Tensor, hidden_ND: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``gradᵀ hidden``, (U, D), in the dtype of `grad_NU`; for the classes of a piece."""
    return (grad_NU.T.to(dtype) @ hidden_ND.to(dtype)).to(grad_NU.dtype)
