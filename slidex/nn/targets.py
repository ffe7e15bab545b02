"""What a loss is given as target, in one form: class ids, padded class ids, or compressed sparse rows.

Legend: N rows in a batch, C classes, P labels of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import scipy.sparse
import torch

from slidex.data.csr import CsrArrays
from slidex.errors import ConfigError
from slidex.nn.device_labels import PAD, DeviceLabels

if TYPE_CHECKING:
    from slidex.nn.placement import Placement

TORCH_IGNORE_INDEX = -100
"""`ignore_index` where it is None, as in torch."""


def is_class_ids(input_: torch.Tensor, target: Any) -> bool:
    """Whether the target is one class id for each row of `input_`, as torch's cross-entropy takes them."""
    return (
        isinstance(target, torch.Tensor)
        and target.layout == torch.strided
        and target.shape == input_.shape[:-1]
    )


def as_labels(input_: torch.Tensor, target: Any, num_classes: int, ignore_index: int | None) -> CsrArrays:
    """The true classes of every row of a batch, leading dimensions flattened.

    Args:
        input_: (..., D); its leading dimensions make N rows.
        target: One of

            * integer tensor (...): a class id for each row; `ignore_index` marks a row without a label;
            * integer tensor (..., P): class ids of each row in any order, padded with -1 (or `ignore_index`);
            * compressed sparse rows (N, C), whose stored entries are the labels, all of value 1: a
              ``torch.sparse_csr_tensor``, a scipy sparse matrix, or `slidex.data.CsrArrays`.
        num_classes: C.
        ignore_index: None means -100, as in torch.

    Returns:
        CSR (N, C) without values; ids are distinct and ascending within a row.

    Raises:
        ConfigError: if the target has another form, a class id is out of range, or a row names a class twice.
    """
    num_rows = input_.shape[:-1].numel()
    ignored = TORCH_IGNORE_INDEX if ignore_index is None else ignore_index
    if not isinstance(target, torch.Tensor):
        return _checked(*_sparse_parts(target, num_rows, num_classes), num_classes)
    if target.layout == torch.sparse_csr:
        _require_shape(tuple(target.shape), num_rows, num_classes)
        _require_ones(target.values().detach().cpu().numpy())
        return _checked(target.crow_indices().cpu().numpy(), target.col_indices().cpu().numpy(), num_classes)
    _require_class_ids(target, input_.shape[:-1], num_classes)
    ids_NP = _as_matrix(input_, target).cpu().numpy()
    kept_NP = ids_NP != ignored
    if target.dim() >= input_.dim():
        kept_NP &= ids_NP != PAD
    indptr = np.zeros(num_rows + 1, dtype=np.int64)
    np.cumsum(kept_NP.sum(1), out=indptr[1:])
    return _checked(indptr, ids_NP[kept_NP], num_classes)


def as_device_labels(
    input_: torch.Tensor, target: Any, num_classes: int, ignore_index: int | None, placement: Placement
) -> tuple[DeviceLabels, torch.Tensor | None]:
    """The same on a device, which is not waited for where the target is a tensor of class ids there.

    Arguments are those of `as_labels`. Sparse rows on the device are read by the host first, which waits.

    Returns:
        The labels, and int64 (), what is wrong with them, for `wrong_target`; or None, where the host has checked them.

    Raises:
        ConfigError: as `as_labels`, but for class ids on the device: what is wrong with these stands in the number.
    """
    there = isinstance(target, torch.Tensor) and target.device == placement.device
    if not there or target.layout != torch.strided:
        labels = as_labels(input_, target, num_classes, ignore_index)
        return DeviceLabels.from_csr(labels, placement), None
    lead = input_.shape[:-1]
    _require_class_ids(target, lead, num_classes)
    ids_NP = _as_matrix(input_, target).long()
    absent_NP = ids_NP == (TORCH_IGNORE_INDEX if ignore_index is None else ignore_index)
    if target.dim() > len(lead):
        absent_NP |= ids_NP == PAD
    outside_NP = ((ids_NP < 0) | (ids_NP >= num_classes)) & ~absent_NP
    ids_NP = ids_NP.masked_fill(absent_NP | outside_NP, PAD)
    rank_N = torch.arange(1, 2 * len(ids_NP) + 1, 2, device=ids_NP.device)
    wrong_N = rank_N * outside_NP.any(1)
    if ids_NP.shape[1] > 1:
        rising_NP = ids_NP.sort(1).values
        twice_NP = (rising_NP[:, 1:] == rising_NP[:, :-1]) & (rising_NP[:, 1:] >= 0)
        wrong_N = torch.maximum(wrong_N, (rank_N + 1) * twice_NP.any(1))
    wrong = wrong_N.amax() - 1 if len(wrong_N) else wrong_N.new_full((), -1)
    return DeviceLabels.from_padded(ids_NP, num_classes), wrong


def wrong_target(number: int, num_classes: int, step: int) -> ConfigError:
    """The error for a number of `as_device_labels` that is not negative, found at a step."""
    row, twice = divmod(number, 2)
    constraint = (
        "made of distinct classes in each row" if twice else f"made of class ids from 0 to {num_classes - 1}"
    )
    found = "a class twice" if twice else "another id"
    return _error(constraint, f"{found} in row {row} of step {step:,}, whose update was not applied")


def _as_matrix(input_: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Class ids with one row for each row of the input, (N, P)."""
    width = target.shape[-1] if target.dim() == input_.dim() else 1
    return target.reshape(input_.shape[:-1].numel(), width)


def _require_class_ids(target: torch.Tensor, lead: torch.Size, num_classes: int) -> None:
    fits = target.layout == torch.strided and target.shape[: len(lead)] == lead
    if not fits or target.dim() - len(lead) not in (0, 1) or target.dtype not in (torch.int64, torch.int32):
        _fail(
            f"int64 class ids of shape {tuple(lead)}, or {(*lead, 'P')} padded with -1, or sparse rows "
            f"{(lead.numel(), num_classes)}",
            f"{tuple(target.shape)} of {target.dtype}, {target.layout}",
        )


def _sparse_parts(target: Any, num_rows: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(target, CsrArrays):
        _require_shape((target.num_rows, target.num_columns), num_rows, num_classes)
        indptr, indices, values = target.indptr, target.indices, target.values
    elif scipy.sparse.issparse(target):
        _require_shape(target.shape, num_rows, num_classes)
        rows = target.tocsr()
        indptr, indices, values = rows.indptr, rows.indices, rows.data
    else:
        _fail("a tensor, a scipy sparse matrix, or CsrArrays", type(target).__name__)
    if values is not None:
        _require_ones(values)
    return indptr, indices


def _checked(indptr: np.ndarray, ids: np.ndarray, num_classes: int) -> CsrArrays:
    if len(ids) and not (ids.min() >= 0 and ids.max() < num_classes):
        place = int(np.flatnonzero((ids < 0) | (ids >= num_classes))[0])
        row = int(np.searchsorted(indptr, place, side="right")) - 1
        _fail(f"made of class ids from 0 to {num_classes - 1}", f"{int(ids[place])} in row {row}")
    indptr, ids = indptr.astype(np.int64), ids.astype(np.int32)
    if len(ids) == len(indptr) - 1 and (indptr == np.arange(len(indptr))).all():  # one label a row
        return CsrArrays(indptr, ids, None, num_classes)
    row = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    order = np.lexsort((ids, row))
    ids = ids[order]
    twice = np.flatnonzero((ids[1:] == ids[:-1]) & (row[1:] == row[:-1]))
    if len(twice):
        _fail("made of distinct classes in each row", f"class {ids[twice[0]]} twice in row {row[twice[0]]}")
    return CsrArrays(indptr, ids, None, num_classes)


def _require_shape(shape: tuple[int, ...], num_rows: int, num_classes: int) -> None:
    if shape != (num_rows, num_classes):
        _fail(f"of shape {(num_rows, num_classes)} where it is sparse rows", shape)


def _require_ones(values: np.ndarray) -> None:
    if len(values) and not (values == 1).all():
        _fail("sparse rows whose stored values are all 1", values[values != 1][0])


def _fail(constraint: str, found: object) -> NoReturn:
    raise _error(constraint, found)


def _error(constraint: str, found: object) -> ConfigError:
    return ConfigError(f"The 'target' parameter of LSHSoftmaxLoss must be {constraint}. Got {found} instead.")
