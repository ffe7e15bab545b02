"""What people use on a GPU without slidex: three ways to train a large output layer, as well as torch allows.

A step is the loss of a batch, gradients and update of the layer, and the gradient of what comes before it. All of them
keep the layer in one dtype (bfloat16 on a GPU) and let torch's optimisers keep their state in it.
Letters: N rows in a batch, C classes, D hidden width, U sampled classes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """Hidden vectors (N, D) that need a gradient and class ids (N,) to the loss, with the update done."""

LEARNING_RATE = 1e-3
SCORES_AT_ONCE = 1 << 27
"""Of the chunked softmax: 512 MiB of float32."""


def layer(num_classes: int, width: int, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    """Rows as `torch.nn.Linear` draws them."""
    weight = torch.empty(num_classes, width, device=device, dtype=dtype)
    return nn.Parameter(weight.uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width)))


def dense(weight_CD: nn.Parameter) -> Step:
    """(a) Scores of all classes by `F.linear`, cross-entropy, and fused Adam over all rows."""
    optimizer = torch.optim.Adam([weight_CD], LEARNING_RATE, fused=True)

    def step(hidden_ND: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(F.linear(hidden_ND, weight_CD), target_N)
        return _finish(loss, optimizer)

    return step


def chunked(weight_CD: nn.Parameter) -> Step:
    """(b) The same loss without all scores at once: torch's own where it has one (2.13), else pieces of rows, twice."""
    optimizer = torch.optim.Adam([weight_CD], LEARNING_RATE, fused=True)
    fused = getattr(F, "linear_cross_entropy", None)
    options = (
        None if fused is None else nn.LinearCrossEntropyOptions()
    )  # without, torch makes all scores at once

    def step(hidden_ND: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        if fused is not None:
            return _finish(fused(hidden_ND, weight_CD, target_N, options=options), optimizer)
        return _finish(in_pieces(hidden_ND, weight_CD, target_N), optimizer)

    return step


def in_pieces(hidden_ND: torch.Tensor, weight_CD: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over pieces of rows, whose scores are computed again in backward."""
    rows = max(1, SCORES_AT_ONCE // len(weight_CD))

    def total(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight_CD).float(), target, reduction="sum")

    losses = [
        checkpoint(total, hidden, target, use_reentrant=False)
        for hidden, target in zip(hidden_ND.split(rows), target_N.split(rows), strict=True)
    ]
    return torch.stack(losses).sum() / len(hidden_ND)


def sampled(weight_CD: nn.Parameter, count: int) -> Step:
    """(c) Uniform sampled softmax: a batch's classes and `count` random ones, gathered, with row-sparse Adam.

    Each random class stands for C / `count` of all; a row's own class counts once, and is left out among the random.
    """
    optimizer = torch.optim.SparseAdam([weight_CD], LEARNING_RATE)
    num_classes = len(weight_CD)
    log_weight = math.log(num_classes / count)

    def step(hidden_ND: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        random_U = torch.randint(num_classes, (count,), device=hidden_ND.device)
        own_ND = F.embedding(target_N, weight_CD, sparse=True)
        others_UD = F.embedding(random_U, weight_CD, sparse=True)
        own_N1 = (hidden_ND * own_ND).sum(1, keepdim=True).float()
        others_NU = (hidden_ND @ others_UD.T).float() + log_weight
        others_NU = others_NU.masked_fill(random_U == target_N[:, None], -torch.inf)
        logits = torch.cat([own_N1, others_NU], 1)
        return _finish(F.cross_entropy(logits, torch.zeros_like(target_N)), optimizer)

    return step


def _finish(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()
