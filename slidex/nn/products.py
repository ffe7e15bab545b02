"""The three matrix products of a layer that scores a batch on one set of classes.

On a CPU they are made in pieces of classes, so that what a product needs for a moment stays in the cache and is memory
that the process has already: of 283 thousand classes a step with fresh arrays takes three times as long, most of it for
page faults. On a device, whose memory is kept, pieces only bound what is needed at a time.

In bfloat16 a CPU's products are oneDNN's, which compiles code for every new shape, a millisecond and a megabyte or so,
and keeps a thousand of them. Pools have a size of their own in every step, so there zeros fill them up to few sizes.

Legend: N rows in a batch, U classes, V at least as many, D hidden width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

CLASSES_AT_ONCE = 1 << 16
"""On a device."""
_CPU_PIECE = 3 << 21
"""Scores, or numbers of gradients of rows, in a piece: 12 MiB of bfloat16. What a piece needs at once stays below the
32 MiB that glibc keeps of what is freed, else every piece has page faults; and most pools of `fast` are one."""
_SIZES = 256
"""Of a product in bfloat16 on a CPU the number of classes is a multiple of it, except the last piece of all classes."""


def pieces(like_ND: torch.Tensor, num_classes: int) -> Iterator[slice]:
    """Ranges of classes that are multiplied at once.

    Args:
        like_ND: Hidden vectors, or what has their shape and place.
        num_classes: U.
    """
    size = CLASSES_AT_ONCE
    if like_ND.device.type == "cpu":
        size = max(4, _CPU_PIECE // max(1, *like_ND.shape) // _SIZES) * _SIZES
    for first in range(0, num_classes, size):
        yield slice(first, min(first + size, num_classes))


def pool_rows(rows_UD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A pool's rows as `class_scores` and `hidden_gradient` are to have them: (V, D) in the dtype of the products."""
    return _filled_up(rows_UD, dtype, _size(len(rows_UD), dtype, rows_UD.device), 0)


def class_scores(
    hidden_ND: torch.Tensor, rows_VD: torch.Tensor, dtype: torch.dtype, out_NU: torch.Tensor
) -> torch.Tensor:
    """``hidden rowsᵀ``, which `out_NU` takes.

    Args:
        hidden_ND: float32 or float64.
        rows_VD: float; those beyond the columns of `out_NU` do not count.
        dtype: Of the product.
        out_NU: (N, U) of the dtype of `hidden_ND`, or (N, V) of that of the product.
    """
    if dtype == hidden_ND.dtype == rows_VD.dtype:
        return torch.mm(hidden_ND, rows_VD.T, out=out_NU)
    narrow_ND = hidden_ND.to(dtype)
    for part in pieces(hidden_ND, len(rows_VD)):
        piece_NU = out_NU[:, part]
        piece_NU.copy_((narrow_ND @ rows_VD[part].to(dtype).T)[:, : piece_NU.shape[1]])
    return out_NU


def hidden_gradient(grad_NV: torch.Tensor, rows_VD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``grad rows``, (N, D), float32 or wider.

    Args:
        grad_NV: float; may have fewer columns than there are rows.
        rows_VD: float, finite.
        dtype: Of the product.
    """
    if torch.bfloat16 != dtype == grad_NV.dtype == rows_VD.dtype:
        return grad_NV @ rows_VD
    wide = torch.promote_types(grad_NV.dtype, torch.float32)
    total_ND = grad_NV.new_zeros(len(grad_NV), rows_VD.shape[1], dtype=wide)
    for part in pieces(total_ND, len(rows_VD)):
        total_ND += _filled_up(grad_NV[:, part], dtype, part.stop - part.start, 1) @ rows_VD[part].to(dtype)
    return total_ND


def rows_gradient(grad_NU: torch.Tensor, hidden_ND: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``gradᵀ hidden``, (U, D), in the dtype of `hidden_ND`; for the classes of a piece."""
    grad_UN = grad_NU.T
    grad_VN = _filled_up(grad_UN, dtype, _size(len(grad_UN), dtype, grad_UN.device), 0)
    return (grad_VN @ hidden_ND.to(dtype))[: len(grad_UN)].to(hidden_ND.dtype)


def _size(num_classes: int, dtype: torch.dtype, device: torch.device) -> int:
    """V for U classes."""
    many = device.type == "cpu" and dtype == torch.bfloat16
    return -(-num_classes // _SIZES) * _SIZES if many else num_classes


def _filled_up(x: torch.Tensor, dtype: torch.dtype, size: int, dim: int) -> torch.Tensor:
    """A matrix in another dtype, with zeros up to `size` rows (`dim` 0) or columns (1); as it was in memory.

    But close together: products of rows that lie far apart take half as long again.
    """
    count, across = x.shape[dim], x.stride(0) < x.stride(1)
    if size == count:
        return x.to(dtype).T.contiguous().T if across else x.to(dtype).contiguous()
    shape = (size, x.shape[1]) if dim == 0 else (x.shape[0], size)
    filled = x.new_empty(shape[::-1] if across else shape, dtype=dtype)
    filled = filled.T if across else filled
    filled.narrow(dim, 0, count).copy_(x)
    filled.narrow(dim, count, size - count).zero_()
    return filled
