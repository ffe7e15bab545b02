"""Losses and their gradients in one go, on each row's own classes or on a pool the batch shares.

A row of scores is read once from memory and its gradient written once; the passes in between (maximum,
exponentials and their sum, scaling) stay in cache, and the float32 exponential vectorises (`intrinsics`).
Scores in bfloat16 are widened by blocks, as a row of millions would not stay there.
Letters: N batch rows, A active slots per row (-inf marks a pad), U pool size, P targets of a row.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit, prange

from slidex.kernels.cpu.arguments import Arguments, num_chunks
from slidex.kernels.cpu.intrinsics import (
    FUSE,
    exp_nonpositive,
    lane_sum,
    log1p_unit,
    maximum,
    narrow,
    widen,
)

BLOCK = 4096
"""Scores in bfloat16 that are widened at once: they stay in the first-level cache until they are exponentials."""
LOWEST = np.finfo(np.float32).min


def softmax_loss(
    logits_NA: torch.Tensor, target_NA: torch.Tensor, offset_NA: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax cross-entropy with any number of targets a row, over its active slots.

    ``loss = -sum_a target[a] * log_softmax(logits + offset)[a]``, ``grad = softmax * sum(target) - target``.
    A row without a target has loss 0 and gradient 0. NaN or +inf scores give a loss of NaN. Deterministic.
    Reference: `slidex.kernels.reference.softmax_loss`.

    Args:
        logits_NA: float32 or float64; -inf marks a pad, whose target must be 0.
        target_NA: Target weights >= 0, dtype of `logits_NA`.
        offset_NA: Log importance weights added to the scores, dtype of `logits_NA`, or None.

    Returns:
        loss (N,) and grad (N, A), the derivative of each row's loss by its logits.

    Raises:
        ConfigError: A shape or dtype does not fit.
    """
    shape = tuple(logits_NA.shape)
    check = Arguments("softmax_loss", logits_NA.dtype)
    loss_N, grad_NA = torch.empty(shape[0], dtype=logits_NA.dtype), torch.empty(shape, dtype=logits_NA.dtype)
    np.add(
        check.floats("logits_NA", logits_NA, shape),
        check.floats_or(0, "offset_NA", offset_NA, shape),
        out=grad_NA.numpy(),
    )
    _softmax_dense(grad_NA.numpy(), check.floats("target_NA", target_NA, shape), loss_N.numpy())
    return loss_N, grad_NA


def logistic_loss(
    logits_NA: torch.Tensor, target_NA: torch.Tensor, weight_NA: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One-vs-all logistic loss over each row's active slots.

    ``loss = sum_a weight[a] * (log(1 + exp(logits[a])) - target[a] * logits[a])``, ``grad = weight *
    (sigmoid(logits) - target)``. Deterministic. Reference: `slidex.kernels.reference.logistic_loss`.

    Args:
        logits_NA: float32 or float64; -inf marks a pad, whose target must be 0.
        target_NA: Targets in [0, 1], dtype of `logits_NA`.
        weight_NA: Importance weights, finite, dtype of `logits_NA`, or None for 1.

    Returns:
        loss (N,) and grad (N, A), the derivative of each row's loss by its logits.

    Raises:
        ConfigError: A shape or dtype does not fit.
    """
    shape = tuple(logits_NA.shape)
    check = Arguments("logistic_loss", logits_NA.dtype)
    loss_N, grad_NA = torch.empty(shape[0], dtype=logits_NA.dtype), torch.empty(shape, dtype=logits_NA.dtype)
    _logistic_dense(
        check.floats("logits_NA", logits_NA, shape),
        check.floats("target_NA", target_NA, shape),
        check.floats_or(1, "weight_NA", weight_NA, shape),
        loss_N.numpy(),
        grad_NA.numpy(),
    )
    return loss_N, grad_NA


def shared_softmax_loss(
    logits_NU: torch.Tensor,
    target_indptr: torch.Tensor,
    target_positions: torch.Tensor,
    target_weights: torch.Tensor,
    offset_U: torch.Tensor | None,
) -> torch.Tensor:
    """`softmax_loss` over a shared pool; **overwrites `logits_NU` with the gradient**.

    Reads and writes N * U scores once each; deterministic. Reference:
    `slidex.kernels.reference.shared_softmax_loss`.

    Args:
        logits_NU: float32, float64 or bfloat16, contiguous; on return the derivative of each row's loss by its logits.
            All else is float32 for bfloat16, and of the dtype of `logits_NU` for the others.
        target_indptr: int64 (N + 1,), CSR offsets of the rows' targets.
        target_positions: int32 or int64, positions in the pool, in [0, U), distinct within a row.
        target_weights: Target weights.
        offset_U: Log importance weights added to the scores, or None; -inf marks a pad.

    Returns:
        loss (N,).

    Raises:
        ConfigError: A shape, dtype, offset or position does not fit.
    """
    dtype = torch.float32 if logits_NU.dtype == torch.bfloat16 else logits_NU.dtype
    check = Arguments("shared_softmax_loss", dtype)
    scores, targets = _shared(check, logits_NU, target_indptr, target_positions, target_weights)
    offset = check.floats_or(0, "offset_U", offset_U, scores.shape[1:])
    loss_N = torch.empty(scores.shape[0], dtype=dtype)
    if logits_NU.dtype == dtype:
        _softmax_shared(scores, *targets, offset, loss_N.numpy())
    else:
        _softmax_shared_narrow(scores, *targets, offset, loss_N.numpy(), num_chunks())
    return loss_N


def shared_logistic_loss(
    logits_NU: torch.Tensor,
    target_indptr: torch.Tensor,
    target_positions: torch.Tensor,
    target_weights: torch.Tensor,
    weight_U: torch.Tensor | None,
) -> torch.Tensor:
    """`logistic_loss` over a shared pool; **overwrites `logits_NU` with the gradient**.

    Reads and writes N * U scores once each; deterministic. Reference:
    `slidex.kernels.reference.shared_logistic_loss`.

    Args:
        logits_NU: float32 or float64, contiguous; on return the derivative of each row's loss by its logits.
        target_indptr: int64 (N + 1,), CSR offsets of the rows' targets.
        target_positions: int32 or int64, positions in the pool, in [0, U), distinct within a row.
        target_weights: Targets in [0, 1], dtype of `logits_NU`; classes not listed have target 0.
        weight_U: Importance weights, finite, dtype of `logits_NU`, or None for 1.

    Returns:
        loss (N,).

    Raises:
        ConfigError: A shape, dtype, offset or position does not fit.
    """
    check = Arguments("shared_logistic_loss", logits_NU.dtype)
    scores, targets = _shared(check, logits_NU, target_indptr, target_positions, target_weights)
    loss_N = torch.empty(scores.shape[0], dtype=logits_NU.dtype)
    weight = check.floats_or(1, "weight_U", weight_U, scores.shape[1:])
    _logistic_shared(scores, *targets, weight, loss_N.numpy())
    return loss_N


def _shared(
    check: Arguments,
    logits_NU: torch.Tensor,
    indptr: torch.Tensor,
    positions: torch.Tensor,
    weights: torch.Tensor,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    num_rows, pool_size = logits_NU.shape
    nnz = positions.shape[0]
    return check.scores("logits_NU", logits_NU, (num_rows, pool_size)), (
        check.offsets("target_indptr", indptr, num_rows, nnz),
        check.ids("target_positions", positions, (nnz,), 0, pool_size),
        check.floats("target_weights", weights, (nnz,)),
    )


@njit(nogil=True, error_model="numpy", fastmath=FUSE)
def _softmax(x, most, mass):
    """Overwrite scores with ``mass * softmax``; returns the log of the sum of ``exp(x - most)``."""
    for i in range(x.size):
        x[i] = exp_nonpositive(x[i] - most)
    total = lane_sum(x)
    scale = mass / total
    for i in range(x.size):
        x[i] *= scale
    return math.log(total)


@njit(cache=True, nogil=True, parallel=True)
def _softmax_dense(scores_NA, target_NA, loss_N):
    for n in prange(loss_N.size):
        loss_N[n] = _softmax_dense_row(scores_NA[n], target_NA[n])


@njit(nogil=True, error_model="numpy", fastmath=FUSE)
def _softmax_dense_row(scores_A, target_A):
    mass = aligned = scores_A.dtype.type(0)
    if not np.any(target_A):
        scores_A[:] = 0
        return mass
    most = maximum(scores_A)
    for a in range(scores_A.size):
        if target_A[a] != 0:
            mass += target_A[a]
            aligned += target_A[a] * (scores_A[a] - most)
    log_total = _softmax(scores_A, most, mass)
    for a in range(scores_A.size):
        scores_A[a] -= target_A[a]
    return mass * log_total - aligned


@njit(cache=True, nogil=True, parallel=True)
def _softmax_shared(scores_NU, indptr, positions, weights, offset_U, loss_N):
    for n in prange(loss_N.size):
        targets = slice(indptr[n], indptr[n + 1])
        loss_N[n] = _softmax_shared_row(scores_NU[n], positions[targets], weights[targets], offset_U)


@njit(cache=True, nogil=True, parallel=True)
def _softmax_shared_narrow(scores_NU, indptr, positions, weights, offset_U, loss_N, chunks):
    for chunk in prange(chunks):
        wide_U = np.empty_like(offset_U)
        for n in range(chunk * loss_N.size // chunks, (chunk + 1) * loss_N.size // chunks):
            targets = slice(indptr[n], indptr[n + 1])
            loss_N[n] = _softmax_narrow_row(
                scores_NU[n], positions[targets], weights[targets], offset_U, wide_U
            )


@njit(nogil=True, error_model="numpy", fastmath=FUSE)
def _softmax_shared_row(scores_U, positions_P, weights_P, offset_U):
    mass = aligned = scores_U.dtype.type(0)
    if not np.any(weights_P):
        scores_U[:] = 0
        return mass
    for u in range(scores_U.size):
        scores_U[u] += offset_U[u]
    most = maximum(scores_U)
    for j in range(positions_P.size):
        if weights_P[j] != 0:
            mass += weights_P[j]
            aligned += weights_P[j] * (scores_U[positions_P[j]] - most)
    log_total = _softmax(scores_U, most, mass)
    for j in range(positions_P.size):
        scores_U[positions_P[j]] -= weights_P[j]
    return mass * log_total - aligned


@njit(nogil=True, error_model="numpy", fastmath=FUSE)
def _softmax_narrow_row(scores_U, positions_P, weights_P, offset_U, wide_U):
    """Scores in bfloat16: exponentials by blocks, each against its own maximum, in one sweep; a second one scales them.

    A row of millions of classes leaves the cache between sweeps.
    """
    zero = wide_U.dtype.type(0)
    mass = aligned = total = zero
    if not np.any(weights_P):
        scores_U[:] = 0
        return mass
    blocks = (wide_U.size + BLOCK - 1) // BLOCK
    most_B, total_B = np.empty(blocks, dtype=wide_U.dtype), np.empty(blocks, dtype=wide_U.dtype)
    for b in range(blocks):
        part = slice(b * BLOCK, (b + 1) * BLOCK)
        wide_B, narrow_B, offset_B = wide_U[part], scores_U[part], offset_U[part]
        for i in range(wide_B.size):
            wide_B[i] = widen(narrow_B[i]) + offset_B[i]
        most = max(maximum(wide_B), LOWEST)  # of pads alone it is -inf
        for i in range(wide_B.size):
            wide_B[i] = exp_nonpositive(wide_B[i] - most)
        most_B[b], total_B[b] = most, lane_sum(wide_B)
    most = maximum(most_B)
    for b in range(blocks):
        most_B[b] = exp_nonpositive(most_B[b] - most)
        total += total_B[b] * most_B[b]
    for j in range(positions_P.size):
        if weights_P[j] != 0:
            mass += weights_P[j]
            aligned += weights_P[j] * (widen(scores_U[positions_P[j]]) + offset_U[positions_P[j]] - most)
    for b in range(blocks):
        part = slice(b * BLOCK, (b + 1) * BLOCK)
        wide_B, narrow_B, scale = wide_U[part], scores_U[part], mass / total * most_B[b]
        for i in range(wide_B.size):
            narrow_B[i] = narrow(wide_B[i] * scale)
    for j in range(positions_P.size):
        u = positions_P[j]
        scores_U[u] = narrow(wide_U[u] * (mass / total * most_B[u // BLOCK]) - weights_P[j])
    return mass * math.log(total) - aligned


@njit(nogil=True, error_model="numpy", fastmath=FUSE)
def _logistic(z, target, one):
    """Loss and derivative of one score; large terms cancel before the small logarithm is added.

    `one` is 1 in the dtype of the score, so that nothing widens.
    """
    zero = one - one
    decay = exp_nonpositive(-abs(z))
    linear = (z if z > zero else zero) - (target * z if target != zero else zero)
    return linear + log1p_unit(decay), (one if z >= zero else decay) / (one + decay) - target


@njit(cache=True, nogil=True, parallel=True)
def _logistic_dense(logits_NA, target_NA, weight_NA, loss_N, grad_NA):
    for n in prange(loss_N.size):
        loss_N[n] = _logistic_dense_row(logits_NA[n], target_NA[n], weight_NA[n], grad_NA[n])


@njit(nogil=True, fastmath=FUSE)
def _logistic_dense_row(logits_A, target_A, weight_A, grad_A):
    loss_A, one = np.empty_like(logits_A), logits_A.dtype.type(1)
    for a in range(logits_A.size):
        loss, slope = _logistic(logits_A[a], target_A[a], one)
        loss_A[a] = weight_A[a] * loss
        grad_A[a] = weight_A[a] * slope
    return lane_sum(loss_A)


@njit(cache=True, nogil=True, parallel=True)
def _logistic_shared(scores_NU, indptr, positions, weights, weight_U, loss_N):
    kept = np.empty_like(weights)
    for n in prange(loss_N.size):
        targets = slice(indptr[n], indptr[n + 1])
        loss_N[n] = _logistic_shared_row(
            scores_NU[n], positions[targets], weights[targets], weight_U, kept[targets]
        )


@njit(nogil=True, fastmath=FUSE)
def _logistic_shared_row(scores_U, positions_P, weights_P, weight_U, kept_P):
    """Settles the targets first; then their scores are -inf, which adds nothing to the sweep over the rest."""
    total, zero, one = scores_U.dtype.type(0), scores_U.dtype.type(0), scores_U.dtype.type(1)
    for j in range(positions_P.size):
        u = positions_P[j]
        loss, slope = _logistic(scores_U[u], weights_P[j], one)
        total += weight_U[u] * loss
        kept_P[j] = weight_U[u] * slope
        scores_U[u] = -np.inf
    loss_U = np.empty_like(scores_U)
    for u in range(scores_U.size):
        loss, slope = _logistic(scores_U[u], zero, one)
        loss_U[u] = weight_U[u] * loss
        scores_U[u] = weight_U[u] * slope
    for j in range(positions_P.size):
        scores_U[positions_P[j]] = kept_P[j]
    return total + lane_sum(loss_U)
