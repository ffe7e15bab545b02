"""What the kernels compute, in plain torch: the oracle of the tests and the baseline of the benchmarks.

Written for the eye, not for speed: each function is the formula of its docstring, in any float dtype (weights may be
of a narrower one, and are rounded to one of 16 bits as `slidex.kernels.rounding` says) and on any device. The full
contract (shapes, dtypes, errors) stands at the function of the same name in `slidex.kernels.cpu`. Letters: N batch
rows, C classes, F features, D hidden width, A active slots per row (-1 is a pad), U pool size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from slidex.kernels.inverted_index import InvertedIndex
from slidex.kernels.linear_weights import LinearWeights
from slidex.kernels.rounding import stochastic_round

if TYPE_CHECKING:
    from torch import Tensor

    from slidex.kernels.optimizer import RowState, StepSettings
    from slidex.kernels.rough_rows import RoughRows
    from slidex.kernels.row_labels import RowLabels


def embedding_bag(
    indptr: Tensor, indices: Tensor, values: Tensor | None, weight_FD: Tensor, bias_D: Tensor | None
) -> Tensor:
    """``out[n] = bias + sum_j values[j] * weight[indices[j]]`` over the pairs j of row n."""
    pairs_MD = weight_FD[indices.long()] if values is None else weight_FD[indices.long()] * values[:, None]
    out_ND = weight_FD.new_zeros(len(indptr) - 1, weight_FD.shape[1]).index_add_(0, _rows(indptr), pairs_MD)
    return out_ND if bias_D is None else out_ND + bias_D


@torch.no_grad()
def embedding_bag_update(
    indptr: Tensor,
    indices: Tensor,
    values: Tensor | None,
    grad_ND: Tensor,
    weight_FD: Tensor,
    state: RowState,
    settings: StepSettings,
) -> None:
    """Optimiser step in place on the touched rows f, ``grad_weight[f] = sum_j values[j] * grad[row of j]``."""
    grad_MD = grad_ND[_rows(indptr)] if values is None else grad_ND[_rows(indptr)] * values[:, None]
    ids, group = indices.long().unique(return_inverse=True)
    _update(
        ids,
        grad_MD.new_zeros(len(ids), weight_FD.shape[1]).index_add_(0, group, grad_MD),
        weight_FD,
        state,
        settings,
    )


def pair_logits(hidden_ND: Tensor, weight_CD: Tensor, bias_C: Tensor | None, active_NA: Tensor) -> Tensor:
    """``logits[n, a] = hidden[n] . weight[c] + bias[c]`` with ``c = active[n, a]``; -inf at pads."""
    classes_NA = active_NA.clamp(min=0).long()
    logits_NA = torch.einsum("nad,nd->na", weight_CD[classes_NA].to(hidden_ND.dtype), hidden_ND)
    if bias_C is not None:
        logits_NA += bias_C[classes_NA]
    return logits_NA.masked_fill(active_NA < 0, -torch.inf)


def pair_hidden_grad(grad_NA: Tensor, weight_CD: Tensor, active_NA: Tensor) -> Tensor:
    """``grad_hidden[n] = sum_a grad[n, a] * weight[active[n, a]]``; pads are left out."""
    weight_NAD = weight_CD[active_NA.clamp(min=0).long()].to(grad_NA.dtype)
    return torch.einsum("na,nad->nd", grad_NA.masked_fill(active_NA < 0, 0), weight_NAD)


@torch.no_grad()
def pair_update(
    grad_NA: Tensor,
    hidden_ND: Tensor,
    active_NA: Tensor,
    weight_CD: Tensor,
    bias_C: Tensor | None,
    weight_state: RowState,
    bias_state: RowState | None,
    settings: StepSettings,
) -> None:
    """Optimiser step in place on the active classes c.

    ``grad_weight[c] = sum of grad[n, a] * hidden[n]``, ``grad_bias[c] = sum of grad[n, a]``, over ``active[n,
    a] = c``.
    """
    rows, slots = (active_NA >= 0).nonzero(as_tuple=True)
    ids, group = active_NA[rows, slots].long().unique(return_inverse=True)
    scale = grad_NA[rows, slots]
    grad_UD = scale.new_zeros(len(ids), weight_CD.shape[1]).index_add_(
        0, group, scale[:, None] * hidden_ND[rows]
    )
    grad_U = scale.new_zeros(len(ids)).index_add_(0, group, scale)
    rows_update(ids, grad_UD, grad_U, weight_CD, bias_C, weight_state, bias_state, settings)


def softmax_loss(logits_NA: Tensor, target_NA: Tensor, offset_NA: Tensor | None) -> tuple[Tensor, Tensor]:
    """``loss = -sum_a target[a] * log_softmax(logits + offset)[a]`` and its derivative by the logits.

    A row without a target has loss 0 and gradient 0.
    """
    log_share_NA = torch.log_softmax(logits_NA if offset_NA is None else logits_NA + offset_NA, dim=1)
    loss_N = -torch.where(target_NA != 0, target_NA * log_share_NA, 0).sum(1)
    grad_NA = log_share_NA.exp() * target_NA.sum(1, keepdim=True) - target_NA
    return loss_N, torch.where((target_NA != 0).any(1, keepdim=True), grad_NA, 0)


def logistic_loss(logits_NA: Tensor, target_NA: Tensor, weight_NA: Tensor | None) -> tuple[Tensor, Tensor]:
    """``loss = sum_a weight[a] * (log(1 + exp(z)) - target[a] * z)``, z = logits[a], and its derivative."""
    linear_NA = logits_NA.relu() - torch.where(target_NA != 0, target_NA * logits_NA, 0)
    loss_NA = linear_NA + (-logits_NA.abs()).exp().log1p()
    grad_NA = logits_NA.sigmoid() - target_NA
    if weight_NA is None:
        return loss_NA.sum(1), grad_NA
    return (weight_NA * loss_NA).sum(1), weight_NA * grad_NA


def gather_rows(weight_CD: Tensor, bias_C: Tensor | None, ids_U: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of the rows and biases of the classes `ids_U`; without a bias, zeros."""
    return weight_CD[ids_U], weight_CD.new_zeros(len(ids_U)) if bias_C is None else bias_C[ids_U]


@torch.no_grad()
def rows_update(
    ids_U: Tensor,
    grad_UD: Tensor,
    grad_bias_U: Tensor | None,
    weight_CD: Tensor,
    bias_C: Tensor | None,
    weight_state: RowState,
    bias_state: RowState | None,
    settings: StepSettings,
) -> None:
    """Optimiser step in place on the rows and biases of the classes `ids_U`, which are distinct but for pads, -1."""
    _update(ids_U, grad_UD, weight_CD, weight_state, settings)
    if bias_C is not None and bias_state is not None and grad_bias_U is not None:
        _update(ids_U, grad_bias_U, bias_C, bias_state, settings)


def shared_softmax_loss(
    logits_NU: Tensor,
    target_indptr: Tensor,
    target_positions: Tensor,
    target_weights: Tensor,
    offset_U: Tensor | None,
) -> Tensor:
    """`softmax_loss` over a pool, targets in CSR; overwrites `logits_NU` with the gradient."""
    wide_NU = logits_NU.to(torch.promote_types(logits_NU.dtype, target_weights.dtype))
    target_NU = _dense_targets(wide_NU, target_indptr, target_positions, target_weights)
    offset_NU = None if offset_U is None else offset_U.expand_as(logits_NU)
    loss_N, grad_NU = softmax_loss(wide_NU, target_NU, offset_NU)
    logits_NU.copy_(grad_NU)
    return loss_N


def shared_logistic_loss(
    logits_NU: Tensor,
    target_indptr: Tensor,
    target_positions: Tensor,
    target_weights: Tensor,
    weight_U: Tensor | None,
) -> Tensor:
    """`logistic_loss` over a pool, targets in CSR; overwrites `logits_NU` with the gradient."""
    target_NU = _dense_targets(logits_NU, target_indptr, target_positions, target_weights)
    weight_NU = None if weight_U is None else weight_U.expand_as(logits_NU)
    loss_N, grad_NU = logistic_loss(logits_NU, target_NU, weight_NU)
    logits_NU.copy_(grad_NU)
    return loss_N


def linear_fit(
    class_indptr: Tensor,
    rows: Tensor,
    positive: Tensor,
    indptr: Tensor,
    indices: Tensor,
    values: Tensor,
    num_features: int,
    *,
    cost: float | Tensor,
    centroid: float = 0.0,
    origin: float = 0.0,
    threshold: float = 0.0,
    passes: int = 20,
    tolerance: float = 1e-12,
) -> LinearWeights:
    """``min_w |w - w0|^2 / 2 + cost * sum_p max(0, 1 - y_p w . x_p)^2``, ``w0`` is centroid, origin; Newton steps."""
    x_NF = values.new_zeros(len(indptr) - 1, num_features + 1)
    x_NF[_rows(indptr), indices.long()], x_NF[:, -1] = values, 1
    w_CF = values.new_zeros(len(class_indptr) - 1, num_features + 1)
    w_CF[class_indptr.diff() == 0, -1] = -1
    cost_C = cost if torch.is_tensor(cost) else values.new_full((len(w_CF),), cost)
    for c, (first, last) in enumerate(
        zip(class_indptr[:-1].tolist(), class_indptr[1:].tolist(), strict=True)
    ):
        x_PF, y_P = x_NF[rows[first:last].long()], 2 * positive[first:last].to(values.dtype) - 1
        m_F = torch.nn.functional.normalize(x_PF[y_P > 0, :-1].sum(0), dim=0, eps=1e-30)
        w0_F = torch.cat([centroid * m_F, values.new_tensor([origin])])
        for _ in range(passes if last > first else 0):
            inside = y_P * (x_PF @ w_CF[c]) < 1
            form = (
                torch.eye(num_features + 1, dtype=values.dtype)
                + 2 * cost_C[c] * x_PF[inside].T @ x_PF[inside]
            )
            before = w_CF[c].clone()
            w_CF[c] = torch.linalg.solve(form, w0_F + 2 * cost_C[c] * x_PF[inside].T @ y_P[inside])
            if (w_CF[c] - before).abs().max() <= tolerance:
                break
    kept = (w_CF[:, :-1] != 0) & (w_CF[:, :-1].abs() >= threshold)
    offsets = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    return LinearWeights(
        offsets, kept.nonzero()[:, 1].int(), w_CF[:, :-1][kept], w_CF[:, -1].clone(), num_features
    )


def linear_scores(
    weights: LinearWeights, indptr: Tensor, indices: Tensor, values: Tensor, candidates_NA: Tensor
) -> Tensor:
    """``scores[n, a] = x[n] . w[c] + bias[c]`` with ``c = candidates[n, a]``; -inf at pads."""
    w_CF = weights.values.new_zeros(len(weights.bias), weights.num_features)
    w_CF[_rows(weights.indptr), weights.features.long()] = weights.values
    x_NF = values.new_zeros(len(indptr) - 1, weights.num_features)
    x_NF[_rows(indptr), indices.long()] = values
    classes_NA = candidates_NA.clamp(min=0).long()
    scores_NA = torch.einsum("naf,nf->na", w_CF[classes_NA], x_NF) + weights.bias[classes_NA]
    return scores_NA.masked_fill(candidates_NA < 0, -torch.inf)


def inverted_index(
    indptr: Tensor, indices: Tensor, values: Tensor, num_features: int, *, longest: int
) -> InvertedIndex:
    """Of every feature the rows with the `longest` largest values."""
    x_NF = values.new_zeros(len(indptr) - 1, num_features)
    has_NF = torch.zeros_like(x_NF, dtype=torch.bool)
    x_NF[_rows(indptr), indices.long()] = values
    has_NF[_rows(indptr), indices.long()] = True
    size_NF = x_NF.abs().masked_fill(~has_NF, -1)
    rank_NF = size_NF.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    kept_FN = (has_NF & (rank_NF < longest)).T
    ends = torch.nn.functional.pad(kept_FN.sum(1).cumsum(0), (1, 0))
    return InvertedIndex(ends, kept_FN.nonzero()[:, 1].int(), x_NF.T[kept_FN], len(x_NF))


def best_classes(
    hidden_ND: Tensor, weight_CD: Tensor, bias_C: Tensor, k: int, rough: RoughRows
) -> tuple[Tensor, Tensor]:
    """The k largest ``h . w_c + b_c``, best first, and their classes; `rough` is for kernels in a hurry."""
    del rough
    score_NC = hidden_ND @ weight_CD.T + bias_C
    best_NC, ids_NC = score_NC.sort(dim=1, descending=True, stable=True)
    pad, missing = torch.nn.functional.pad, max(0, k - score_NC.shape[1])
    return pad(best_NC[:, :k], (0, missing), value=-torch.inf), pad(ids_NC[:, :k], (0, missing), value=-1)


def nearest_rows(
    index: InvertedIndex,
    indptr: Tensor,
    indices: Tensor,
    values: Tensor,
    k: int,
    *,
    share: float = 1.0,
    own_Q: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k rows of largest ``x[q] . index[n]``, of those above 0, by the largest values of x; -1 for none."""
    kept_FN = values.new_zeros(index.num_features, index.num_rows)
    kept_FN[_rows(index.indptr), index.rows.long()] = index.values
    x_QF = values.new_zeros(len(indptr) - 1, index.num_features)
    for q, (first, last) in enumerate(zip(indptr[:-1].tolist(), indptr[1:].tolist(), strict=True)):
        order = values[first:last].abs().argsort(descending=True, stable=True)
        square = values[first:last][order].double().square()
        order = order[square.cumsum(0) - square < share * square.sum()]
        x_QF[q, indices[first:last][order].long()] = values[first:last][order]
    products_QN = x_QF @ kept_FN
    if own_Q is not None:
        products_QN[torch.arange(len(own_Q))[own_Q >= 0], own_Q[own_Q >= 0]] = 0
    return _best_above_0(products_QN, k)


def neighbor_classes(
    near_QK: Tensor, weights_QK: Tensor, labels: RowLabels, count: int
) -> tuple[Tensor, Tensor]:
    """The classes of largest ``sum_k weights[q, k] * [c is a class of near[q, k]]``, of those above 0."""
    true_NC = weights_QK.new_zeros(labels.num_rows, labels.num_classes)
    true_NC[_rows(labels.indptr), labels.classes.long()] = 1
    weight_QN = weights_QK.new_zeros(len(near_QK), len(true_NC) + 1)  # the last is for pads
    weight_QN.scatter_add_(1, near_QK.long().where(near_QK >= 0, len(true_NC)), weights_QK)
    return _best_above_0(weight_QN[:, :-1] @ true_NC, count)


def _best_above_0(score_QN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best_QN, ids_QN = score_QN.sort(dim=1, descending=True, stable=True)
    ids_QN, missing = ids_QN.masked_fill(best_QN <= 0, -1)[:, :k], max(0, k - score_QN.shape[1])
    pad = torch.nn.functional.pad
    return pad(ids_QN, (0, missing), value=-1), pad(best_QN[:, :k].clamp(min=0), (0, missing))


def _rows(indptr: Tensor) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(indptr) - 1, device=indptr.device), indptr.diff())


def _dense_targets(logits_NU: Tensor, indptr: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    target_NU, rows_P = torch.zeros_like(logits_NU), _rows(indptr)
    target_NU[rows_P, positions[: len(rows_P)].long()] = weights[: len(rows_P)]
    return target_NU


def _update(ids: Tensor, grad: Tensor, parameter: Tensor, state: RowState, settings: StepSettings) -> None:
    ids, grad = ids[ids >= 0], grad[ids >= 0]
    square = grad * grad
    if state.moment2.shape != parameter.shape:
        square = square.mean(1, keepdim=True)
    if state.sums:
        direction = grad * settings.learning_rate
        moment2 = state.moment2[ids] + square
    else:
        moment1 = state.moment1[ids] + (grad - state.moment1[ids]) * (1 - settings.beta1)
        moment2 = state.moment2[ids] + (square - state.moment2[ids]) * (1 - settings.beta2)
        direction = moment1 * settings.step_size
        state.moment1[ids] = moment1
    state.moment2[ids] = moment2
    before = parameter[ids].to(torch.promote_types(parameter.dtype, moment2.dtype))
    updated = before * settings.shrink - direction / (moment2.sqrt() + settings.epsilon)
    if parameter.dtype.itemsize == 2:
        updated = stochastic_round(updated, parameter.dtype, ids, settings.rounding_key)
    parameter[ids] = updated.to(parameter.dtype)
