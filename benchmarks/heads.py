"""When sampling pays in a head of one's own: `slidex.nn.LSHSoftmaxLoss` against all classes, by C, D and N.

``python -m benchmarks --only heads``. A step is loss, gradients and update of the output layer, and the gradient of
what comes before it. Hidden vectors are random, ReLU'd; classes are drawn with frequency 1 / rank. The index is
simhash, rehashes included.
Letters: N rows in a batch, C classes, D hidden width.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn

from benchmarks.report import Comparison
from benchmarks.rivals import DenseHead
from slidex.doctor import has_native_bf16
from slidex.nn import LSHSoftmaxLoss, SamplingOptions

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS, REPEATS, WARM_UP = 10, 5, 3
BATCHES = 16


class Case(NamedTuple):
    """A size of layer and batch.

    Args:
        classes: C.
        width: D.
        rows: N.
        quick: Whether it is part of ``--quick``.
    """

    classes: int
    width: int
    rows: int
    quick: bool = False


CASES = [
    *(Case(classes, 128, 256) for classes in (4_000, 16_000, 32_000)),
    Case(128_000, 128, 256, quick=True),
    Case(512_000, 128, 256),
    *(Case(128_000, 128, rows) for rows in (32, 2_048)),
    *(Case(classes, 768, 256) for classes in (16_000, 128_000)),
]


def batches(case: Case) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Hidden vectors (N, D) and class ids (N,) of some batches."""
    rng, generator = np.random.default_rng(1), torch.Generator().manual_seed(1)
    cumulative = np.cumsum(1 / np.arange(1, case.classes + 1))
    drawn = []
    for _ in range(BATCHES):
        hidden_ND = torch.randn(case.rows, case.width, generator=generator).relu_()
        ids = np.searchsorted(cumulative, rng.random(case.rows) * cumulative[-1])
        drawn.append((hidden_ND, torch.from_numpy(np.minimum(ids, case.classes - 1))))
    return drawn


def run_case(case: Case) -> list[Comparison]:
    """Lines for one size: fused sampled steps against all classes, and against torch's sparse optimiser."""
    data = batches(case)
    torch.manual_seed(0)
    linear = nn.Linear(case.width, case.classes)
    fused = LSHSoftmaxLoss(case.width, case.classes, bias=True, options=SamplingOptions(optimizer="adam"))
    fused.load_state_dict(linear.state_dict())
    plain = LSHSoftmaxLoss(case.width, case.classes, bias=True, options=SamplingOptions())
    plain.load_state_dict(linear.state_dict())
    sides = {"fused": _sampled_step(fused), "dense": _dense_step(linear, case)}
    if case.rows == 256 and case.width == 128:
        sides["autograd"] = _sampled_step(plain, torch.optim.SparseAdam(plain.parameters()))
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(WARM_UP + REPEATS):
        for name, step in sides.items():
            count = STEPS if name == "fused" else max(1, STEPS // 5)
            started = time.perf_counter()
            for i in range(count):
                step(*data[(repeat * STEPS + i) % BATCHES])
            if repeat >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - started) / count)
    size = f"head, C = {case.classes:,}, D = {case.width}, N = {case.rows}"
    note = f"{fused.stats().active_classes:,.0f} active classes"
    precision = "bfloat16" if has_native_bf16() is True else "float32"
    lines = [Comparison(size, f"all classes, {precision}", "ms", times["fused"], times["dense"], note)]
    if "autograd" in times:
        lines.append(
            Comparison(size, "the same with SparseAdam", "ms", times["fused"], times["autograd"], note)
        )
    return lines


def _sampled_step(
    head: LSHSoftmaxLoss, optimizer: torch.optim.Optimizer | None = None
) -> Callable[[torch.Tensor, torch.Tensor], None]:
    def step(hidden_ND: torch.Tensor, target_N: torch.Tensor) -> None:
        head(hidden_ND.requires_grad_(), target_N).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        hidden_ND.grad = None

    return step


def _dense_step(linear: nn.Linear, case: Case) -> Callable[[torch.Tensor, torch.Tensor], None]:
    precision = "bfloat16" if has_native_bf16() is True else "float32"
    head = DenseHead(linear.weight, linear.bias, case.rows, precision)
    optimizer = torch.optim.Adam([head.weight, head.bias], fused=True)
    rows, mass = torch.arange(case.rows), torch.ones(case.rows)

    def step(hidden_ND: torch.Tensor, target_N: torch.Tensor) -> None:
        head.loss_and_grad(hidden_ND.detach(), rows, target_N, mass)
        optimizer.step()
        head.updated()

    return step
