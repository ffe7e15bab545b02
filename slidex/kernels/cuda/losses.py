"""Losses and their gradients in one go, on each row's own classes or on a pool the batch shares.

A block makes a row: a pass for the maximum, one for the sums, one that writes. Sums are float32, whatever the scores
are. Letters: N batch rows, A active slots per row (-inf marks a pad), U pool size, P targets of a row.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from slidex.kernels.cuda.arguments import Arguments
from slidex.kernels.cuda.device import block_max, block_sum, store, wide
from slidex.kernels.cuda.launch import WARP, Kernel, cuda, kernel

if TYPE_CHECKING:
    import torch

_MOST_WARPS = 16
_SCORES = 4  # of a thread, before a row gets more warps; those of a pool are asked for together


def softmax_loss(
    logits_NA: torch.Tensor, target_NA: torch.Tensor, offset_NA: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax cross-entropy with any number of targets a row, as `slidex.kernels.cpu.softmax_loss`; deterministic.

    Args:
        logits_NA: float32, bfloat16 or float16, as are the next two, each for itself; -inf marks a pad.
        target_NA: Target weights >= 0; 0 at pads.
        offset_NA: Log importance weights added to the scores, or None.

    Returns:
        loss (N,) and grad (N, A), float32.

    Raises:
        ConfigError: A shape, dtype or device does not fit.
    """
    return _dense_loss("softmax_loss", _softmax_dense, logits_NA, target_NA, "offset_NA", offset_NA)


def logistic_loss(
    logits_NA: torch.Tensor, target_NA: torch.Tensor, weight_NA: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One-vs-all logistic loss over each row's active slots, as `slidex.kernels.cpu.logistic_loss`; deterministic.

    Args:
        logits_NA: float32, bfloat16 or float16, as are the next two, each for itself; -inf marks a pad.
        target_NA: Targets in [0, 1]; 0 at pads.
        weight_NA: Importance weights, finite, or None for 1.

    Returns:
        loss (N,) and grad (N, A), float32.

    Raises:
        ConfigError: A shape, dtype or device does not fit.
    """
    return _dense_loss("logistic_loss", _logistic_dense, logits_NA, target_NA, "weight_NA", weight_NA)


def shared_softmax_loss(
    logits_NU: torch.Tensor,
    target_indptr: torch.Tensor,
    target_positions: torch.Tensor,
    target_weights: torch.Tensor,
    offset_U: torch.Tensor | None,
) -> torch.Tensor:
    """`softmax_loss` over a shared pool; **overwrites `logits_NU` with the gradient**.

    Args:
        logits_NU: float32, bfloat16 or float16, contiguous.
        target_indptr: int64 (N + 1,), CSR offsets of the rows' targets.
        target_positions: int32 or int64, positions in the pool, in [0, U), distinct within a row.
        target_weights: Target weights, any of the three dtypes.
        offset_U: Log importance weights added to the scores, any of the three, or None.

    Returns:
        loss (N,) float32; NaN in a row with an offset or position out of range.

    Raises:
        ConfigError: A shape, dtype or device does not fit.
    """
    targets = target_indptr, target_positions, target_weights
    return _shared_loss("shared_softmax_loss", _softmax_shared, logits_NU, targets, "offset_U", offset_U)


def shared_logistic_loss(
    logits_NU: torch.Tensor,
    target_indptr: torch.Tensor,
    target_positions: torch.Tensor,
    target_weights: torch.Tensor,
    weight_U: torch.Tensor | None,
) -> torch.Tensor:
    """`logistic_loss` over a shared pool; **overwrites `logits_NU` with the gradient**.

    Args:
        logits_NU: float32, bfloat16 or float16, contiguous.
        target_indptr: int64 (N + 1,), CSR offsets of the rows' targets.
        target_positions: int32 or int64, positions in the pool, in [0, U), distinct within a row.
        target_weights: Targets in [0, 1], any of the three dtypes; classes not listed have target 0.
        weight_U: Importance weights, finite, any of the three, or None for 1.

    Returns:
        loss (N,) float32; NaN in a row with an offset or position out of range.

    Raises:
        ConfigError: A shape, dtype or device does not fit.
    """
    targets = target_indptr, target_positions, target_weights
    return _shared_loss("shared_logistic_loss", _logistic_shared, logits_NU, targets, "weight_U", weight_U)


def _dense_loss(
    caller: str,
    compute: Kernel,
    logits_NA: torch.Tensor,
    target_NA: torch.Tensor,
    extra_name: str,
    extra_NA: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = num_rows, num_slots = logits_NA.shape
    check = Arguments(caller, "logits_NA", logits_NA)
    loss_N, grad_NA = check.empty(num_rows), check.empty(*shape)
    compute.launch(
        num_rows,
        _threads(num_slots),
        check.floats("logits_NA", logits_NA, shape),
        check.floats("target_NA", target_NA, shape),
        check.floats_or_none(extra_name, extra_NA, shape),
        loss_N,
        grad_NA,
    )
    return loss_N, grad_NA


def _shared_loss(
    caller: str,
    compute: Kernel,
    logits_NU: torch.Tensor,
    targets: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    extra_name: str,
    extra_U: torch.Tensor | None,
) -> torch.Tensor:
    num_rows, pool_size = logits_NU.shape
    check = Arguments(caller, "logits_NU", logits_NU)
    indptr, positions, weights = targets
    nnz = positions.shape[0]
    loss_N = check.empty(num_rows)
    compute.launch(
        num_rows,
        _threads(pool_size),
        check.in_place("logits_NU", logits_NU, (num_rows, pool_size)),
        check.long_integers("target_indptr", indptr, (num_rows + 1,)),
        check.integers("target_positions", positions, (nnz,)),
        check.floats("target_weights", weights, (nnz,)),
        check.floats_or_none(extra_name, extra_U, (pool_size,)),
        check.empty(nnz),
        loss_N,
    )
    return loss_N


def _threads(length: int) -> int:
    """Threads for a row of so many scores: whole warps, a power of two of them."""
    warps = 1
    while warps < _MOST_WARPS and warps * WARP * _SCORES < length:
        warps *= 2
    return warps * WARP


@kernel
def _softmax_dense(logits_NA, target_NA, offset_NA, loss_N, grad_NA):
    n, width = np.uint64(cuda.blockIdx.x), np.uint64(logits_NA.shape[1])
    first, step = np.uint64(cuda.threadIdx.x), np.uint64(cuda.blockDim.x)
    most, zero = np.float32(-np.inf), np.float32(0)
    a = first
    while a < width:
        most = max(most, _shifted(logits_NA, offset_NA, n, a))
        a += step
    most = block_max(most)
    total = mass = aligned = zero
    a = first
    while a < width:
        score, target = _shifted(logits_NA, offset_NA, n, a) - most, wide(target_NA[n, a])
        total += math.exp(score)
        if target != zero:
            mass += target
            aligned += target * score
        a += step
    total, mass, aligned = block_sum(total), block_sum(mass), block_sum(aligned)
    a = first
    while a < width:
        grad_NA[n, a] = zero
        if mass != zero:
            score, target = _shifted(logits_NA, offset_NA, n, a) - most, wide(target_NA[n, a])
            grad_NA[n, a] = math.exp(score) * (mass / total) - target
        a += step
    if cuda.threadIdx.x == 0:
        loss_N[n] = mass * math.log(total) - aligned if mass != zero else zero


@kernel
def _softmax_shared(scores_NU, indptr, positions, weights, offset_U, kept, loss_N):
    """Settles the gradients of the targets in `kept` before their scores are overwritten."""
    n, width = np.uint64(cuda.blockIdx.x), np.uint64(scores_NU.shape[1])
    first, step = np.uint64(cuda.threadIdx.x), np.uint64(cuda.blockDim.x)
    start, end, fault = _targets(indptr, positions, n)
    most, zero = np.float32(-np.inf), np.float32(0)
    base, stride = np.uint64(0), step * np.uint64(_SCORES)
    while base < width:
        x0, x1, x2, x3 = _four(scores_NU, offset_U, n, base)
        most = max(most, x0, x1, x2, x3)
        base += stride
    most = block_max(most)
    total = aligned = zero
    base = np.uint64(0)
    while base < width:
        x0, x1, x2, x3 = _four(scores_NU, offset_U, n, base)
        total += math.exp(x0 - most)
        total += math.exp(x1 - most)
        total += math.exp(x2 - most)
        total += math.exp(x3 - most)
        base += stride
    mass = fault
    j = start + first
    while j < end:
        u, weight = np.uint64(positions[j]), wide(weights[j])
        if u >= width:
            mass = np.float32(np.nan)
        elif weight != zero:
            mass += weight
            aligned += weight * (_offset(scores_NU, offset_U, n, u) - most)
        j += step
    total, mass, aligned = block_sum(total), block_sum(mass), block_sum(aligned)
    scale = mass / total if mass != zero else zero
    j = start + first
    while j < end:
        u = np.uint64(positions[j])
        if u < width:
            kept[j] = math.exp(_offset(scores_NU, offset_U, n, u) - most) * scale - wide(weights[j])
        j += step
    cuda.syncthreads()
    base = np.uint64(0)
    while base < width:
        x0, x1, x2, x3 = _four(scores_NU, offset_U, n, base)
        _put(scores_NU, n, base + first, x0 - most, mass, scale)
        _put(scores_NU, n, base + first + step, x1 - most, mass, scale)
        _put(scores_NU, n, base + first + step * np.uint64(2), x2 - most, mass, scale)
        _put(scores_NU, n, base + first + step * np.uint64(3), x3 - most, mass, scale)
        base += stride
    cuda.syncthreads()
    if mass != zero:
        _put_back(scores_NU, positions, kept, n, start, end)
    if cuda.threadIdx.x == 0:
        loss_N[n] = mass * math.log(total) - aligned if mass != zero else zero


@kernel
def _logistic_dense(logits_NA, target_NA, weight_NA, loss_N, grad_NA):
    n, width = np.uint64(cuda.blockIdx.x), np.uint64(logits_NA.shape[1])
    total = np.float32(0)
    a = np.uint64(cuda.threadIdx.x)
    while a < width:
        loss, slope = _logistic(wide(logits_NA[n, a]), wide(target_NA[n, a]))
        weight = wide(weight_NA[n, a]) if weight_NA.size else np.float32(1)
        total += weight * loss
        grad_NA[n, a] = weight * slope
        a += np.uint64(cuda.blockDim.x)
    total = block_sum(total)
    if cuda.threadIdx.x == 0:
        loss_N[n] = total


@kernel
def _logistic_shared(scores_NU, indptr, positions, weights, weight_U, kept, loss_N):
    """Settles the targets in `kept`; then their scores are -inf, which adds nothing to the sweep over the rest."""
    n, width = np.uint64(cuda.blockIdx.x), np.uint64(scores_NU.shape[1])
    first, step = np.uint64(cuda.threadIdx.x), np.uint64(cuda.blockDim.x)
    start, end, total = _targets(indptr, positions, n)
    j = start + first
    while j < end:
        u = np.uint64(positions[j])
        if u >= width:
            total = np.float32(np.nan)
        else:
            loss, slope = _logistic(wide(scores_NU[n, u]), wide(weights[j]))
            weight = wide(weight_U[u]) if weight_U.size else np.float32(1)
            total += weight * loss
            kept[j] = weight * slope
            store(scores_NU, (n, u), np.float32(-np.inf))
        j += step
    cuda.syncthreads()
    u = first
    while u < width:
        loss, slope = _logistic(wide(scores_NU[n, u]), np.float32(0))
        weight = wide(weight_U[u]) if weight_U.size else np.float32(1)
        total += weight * loss
        store(scores_NU, (n, u), weight * slope)
        u += step
    cuda.syncthreads()
    _put_back(scores_NU, positions, kept, n, start, end)
    total = block_sum(total)
    if cuda.threadIdx.x == 0:
        loss_N[n] = total


@cuda.jit(device=True)
def _shifted(logits_NA, offset_NA, n, a):
    return wide(logits_NA[n, a]) + wide(offset_NA[n, a]) if offset_NA.size else wide(logits_NA[n, a])


@cuda.jit(device=True)
def _offset(scores_NU, offset_U, n, u):
    return wide(scores_NU[n, u]) + wide(offset_U[u]) if offset_U.size else wide(scores_NU[n, u])


@cuda.jit(device=True)
def _four(scores_NU, offset_U, n, base):
    """A thread's scores at `base` and one, two, three blocks of threads behind, -inf behind the last.

    All of the block's warps call it: they ask for four numbers before they need the first.
    """
    width, step = np.uint64(scores_NU.shape[1]), np.uint64(cuda.blockDim.x)
    u0 = base + np.uint64(cuda.threadIdx.x)
    u1 = u0 + step
    u2 = u1 + step
    u3 = u2 + step
    e0, e1 = u0 if u0 < width else base, u1 if u1 < width else base
    e2, e3 = u2 if u2 < width else base, u3 if u3 < width else base
    x0, x1, x2, x3 = scores_NU[n, e0], scores_NU[n, e1], scores_NU[n, e2], scores_NU[n, e3]
    o0 = o1 = o2 = o3 = np.float32(0)
    if offset_U.size:
        o0, o1, o2, o3 = wide(offset_U[e0]), wide(offset_U[e1]), wide(offset_U[e2]), wide(offset_U[e3])
    cuda.syncwarp()  # else the compiler would ask for each of them when it is needed
    none = np.float32(-np.inf)
    return (
        wide(x0) + o0 if u0 < width else none,
        wide(x1) + o1 if u1 < width else none,
        wide(x2) + o2 if u2 < width else none,
        wide(x3) + o3 if u3 < width else none,
    )


@cuda.jit(device=True)
def _put(scores_NU, n, u, score, mass, scale):
    """The gradient at a place, if there is one; 0 in a row without targets."""
    if u < np.uint64(scores_NU.shape[1]):
        grad = np.float32(0)
        if mass != grad:
            grad = math.exp(score) * scale
        store(scores_NU, (n, u), grad)


@cuda.jit(device=True)
def _targets(indptr, positions, n):
    """Where the targets of row n lie, and 0; or none, and NaN, where the offsets are out of range."""
    start, end = indptr[n], indptr[n + np.uint64(1)]
    if start < 0 or end < start or end > positions.size:
        return np.uint64(0), np.uint64(0), np.float32(np.nan)
    return np.uint64(start), np.uint64(end), np.float32(0)


@cuda.jit(device=True)
def _put_back(scores_NU, positions, kept, n, start, end):
    """The gradients of the row's targets, each of which one thread has settled and the same thread puts back."""
    j = start + np.uint64(cuda.threadIdx.x)
    while j < end:
        u = np.uint64(positions[j])
        if u < np.uint64(scores_NU.shape[1]):
            store(scores_NU, (n, u), kept[j])
        j += np.uint64(cuda.blockDim.x)


@cuda.jit(device=True)
def _logistic(z, target):
    """Loss and derivative of one score; large terms cancel before the small logarithm is added."""
    zero, one = np.float32(0), np.float32(1)
    decay = math.exp(-abs(z))
    linear = (z if z > zero else zero) - (target * z if target != zero else zero)
    return linear + math.log1p(decay), (one if z >= zero else decay) / (one + decay) - target
