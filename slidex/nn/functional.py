"""The functional twins of `slidex.nn`'s modules.

Legend: N rows in a batch, C classes, D hidden width, P labels in all.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from slidex.errors import ConfigError
from slidex.nn.candidates import label_weights
from slidex.nn.targets import TORCH_IGNORE_INDEX, as_labels, is_class_ids

if TYPE_CHECKING:
    from collections.abc import Callable

    from slidex.data.csr import CsrArrays
    from slidex.nn.sampling import Sampling

REDUCTIONS = ("mean", "sum", "none")
SCORES_AT_ONCE = 1 << 26
"""Scores that the exact loss keeps; more rows are taken in pieces, whose scores are computed again in backward."""


def lsh_softmax(
    input: torch.Tensor,  # noqa: A002  (torch's name)
    linear_weight: torch.Tensor,
    target: Any,
    *,
    linear_bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    sampling: Sampling | None = None,
) -> torch.Tensor:
    """Softmax cross-entropy of a linear layer, exact or on sampled classes; see `slidex.nn.LSHSoftmaxLoss`.

    Args:
        input: floating (..., D).
        linear_weight: floating (C, D).
        target: As for `slidex.nn.LSHSoftmaxLoss.forward`.
        linear_bias: floating (C,), or None.
        weight: floating (C,), what each class counts, or None for 1.
        reduction: ``mean``, ``sum`` or ``none``.
        ignore_index: Class id of rows without a label; None means -100.
        label_smoothing: In [0, 1].
        sampling: Chooses the classes of this batch, and may update the layer itself in backward; None scores all
            classes.

    Returns:
        The loss: a number, or (...) without a reduction.

    Raises:
        ConfigError: An argument has another shape or type or is out of its range; with `sampling`, if the layer is
            neither in float32 or float64 on the CPU nor in float32, bfloat16 or float16 on a CUDA device.
        MissingExtraError: with `sampling`, the packages for a CUDA device are not installed.
        DeviceError: with `sampling`, the device cannot be used.
    """
    check_arguments(input, linear_weight, linear_bias, reduction, label_smoothing)
    check_class_weights(weight, len(linear_weight) if sampling is None else sampling.total_classes)
    if sampling is not None:
        loss = type(sampling).loss
        if torch.compiler.is_compiling():
            from slidex.nn.uncompiled import sampled_loss as loss  # noqa: PLC0415  (it needs torch's compiler)
        return loss(
            sampling,
            input,
            linear_weight,
            linear_bias,
            target,
            class_weights=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    hidden_ND = input.reshape(-1, input.shape[-1])
    layer = linear_weight, linear_bias, weight, label_smoothing
    if is_class_ids(input, target):
        ids_N = target.reshape(-1).long()
        ignored = TORCH_IGNORE_INDEX if ignore_index is None else ignore_index
        parts = _pieces(hidden_ND, linear_weight)
        losses = _class_id_losses if len(parts) == 1 else _scored_again(_class_id_losses)
        pieces = [losses(hidden_ND[rows], ids_N[rows], ignored, *layer) for rows in parts]
        kept_N = ids_N != ignored
        mass_N = kept_N if weight is None else weight[ids_N.where(kept_N, 0)] * kept_N
    else:
        labels = as_labels(input, target, linear_weight.shape[0], ignore_index)
        indptr = torch.from_numpy(labels.indptr)
        row_P = torch.repeat_interleave(torch.arange(len(hidden_ND)), indptr.diff()).to(input.device)
        ids_P = torch.from_numpy(labels.indices).long().to(input.device)
        mass_P = label_mass(labels, weight).to(input.device)
        parts, pieces = _pieces(hidden_ND, linear_weight), []
        losses = _multi_label_losses if len(parts) == 1 else _scored_again(_multi_label_losses)
        for rows in parts:
            stored = slice(*indptr[[rows.start, rows.stop]].tolist())
            places = row_P[stored] - rows.start, ids_P[stored], mass_P[stored]
            pieces.append(losses(hidden_ND[rows], *places, *layer))
        mass_N = mass_P.new_zeros(len(hidden_ND)).index_add_(0, row_P, mass_P)
    loss_N = torch.cat(pieces)
    if reduction == "none":
        return loss_N.reshape(input.shape[:-1])
    return loss_N.sum() if reduction == "sum" else loss_N.sum() / mass_N.sum()


def label_mass(labels: CsrArrays, weight: torch.Tensor | None) -> torch.Tensor:
    """What every stored label counts: the weight of its class over the number of its row's labels, float64 (P,)."""
    mass_P = label_weights(labels)
    if weight is None:
        return mass_P
    return mass_P * weight.detach().cpu()[torch.from_numpy(labels.indices).long()]


def _pieces(hidden_ND: torch.Tensor, weight_CD: torch.Tensor) -> list[slice]:
    """The rows in pieces of `SCORES_AT_ONCE` scores."""
    num_rows = len(hidden_ND)
    most = max(1, SCORES_AT_ONCE // len(weight_CD))
    return [slice(first, min(first + most, num_rows)) for first in range(0, max(1, num_rows), most)]


def _scored_again(losses: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The function, whose scores are not kept for backward but computed again."""
    return functools.partial(checkpoint, losses, use_reentrant=False)


def _class_id_losses(
    hidden_ND: torch.Tensor,
    ids_N: torch.Tensor,
    ignored: int,
    weight_CD: torch.Tensor,
    bias_C: torch.Tensor | None,
    class_weight_C: torch.Tensor | None,
    smoothing: float,
) -> torch.Tensor:
    logits_NC = F.linear(hidden_ND, weight_CD, bias_C)
    return F.cross_entropy(
        logits_NC,
        ids_N,
        None if class_weight_C is None else class_weight_C.to(logits_NC.dtype),
        reduction="none",
        ignore_index=ignored,
        label_smoothing=smoothing,
    )


def _multi_label_losses(
    hidden_ND: torch.Tensor,
    row_P: torch.Tensor,
    ids_P: torch.Tensor,
    mass_P: torch.Tensor,
    weight_CD: torch.Tensor,
    bias_C: torch.Tensor | None,
    class_weight_C: torch.Tensor | None,
    smoothing: float,
) -> torch.Tensor:
    """As `F.cross_entropy` with a distribution for each row; rows without labels have 0."""
    log_share_NC = F.linear(hidden_ND, weight_CD, bias_C).log_softmax(1)
    loss_P = -(1 - smoothing) * mass_P.to(log_share_NC.dtype) * log_share_NC[row_P, ids_P]
    loss_N = log_share_NC.new_zeros(len(hidden_ND)).index_add(0, row_P, loss_P)
    if smoothing > 0:
        spread_NC = log_share_NC if class_weight_C is None else log_share_NC * class_weight_C
        labelled_N = torch.zeros_like(loss_N, dtype=torch.bool).index_fill(0, row_P, value=True)
        loss_N = loss_N - smoothing * spread_NC.mean(1) * labelled_N
    return loss_N


def check_arguments(
    input_: torch.Tensor,
    weight_CD: torch.Tensor,
    bias_C: torch.Tensor | None,
    reduction: str,
    label_smoothing: float,
) -> None:
    """Raises ConfigError, naming the argument of `lsh_softmax`, unless shapes, types and values fit."""
    num_classes, width = weight_CD.shape
    if input_.dim() < 1 or input_.shape[-1] != width or not input_.is_floating_point():
        _fail("input", f"floating of shape (..., {width})", f"{tuple(input_.shape)} of {input_.dtype}")
    _check_vector("linear_bias", bias_C, num_classes)
    if reduction not in REDUCTIONS:
        _fail("reduction", f"one of {', '.join(REDUCTIONS)}", repr(reduction))
    if not 0 <= label_smoothing <= 1:
        _fail("label_smoothing", "from 0 to 1", label_smoothing)


def check_class_weights(class_weight_C: torch.Tensor | None, num_classes: int) -> None:
    """Raises ConfigError, naming `lsh_softmax`'s argument `weight`, unless it has a number for each class."""
    _check_vector("weight", class_weight_C, num_classes)


def _check_vector(name: str, tensor: torch.Tensor | None, size: int) -> None:
    if tensor is not None and (tuple(tensor.shape) != (size,) or not tensor.is_floating_point()):
        _fail(name, f"floating of shape {(size,)}", f"{tuple(tensor.shape)} of {tensor.dtype}")


def _fail(name: str, constraint: str, found: object) -> NoReturn:
    raise ConfigError(f"The {name!r} parameter of lsh_softmax must be {constraint}. Got {found} instead.")
