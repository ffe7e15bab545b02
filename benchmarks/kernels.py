"""Time every kernel at a realistic size, beside its plain torch reference: ``python -m benchmarks --only kernels``.

The losses on a pool overwrite their scores; both sides' time includes a copy of these.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.report import Comparison
from slidex.kernels import RowState, StepSettings, cpu, reference

if TYPE_CHECKING:
    from collections.abc import Callable

ADAM = StepSettings(learning_rate=1e-3, step=10)
OUR_CALLS = 5
"""Calls of ours in a repeat, whose median counts: the first finds the caches as the reference left them."""


def zipf_ids(rng: np.random.Generator, rows: int, per_row: int, bound: int) -> torch.Tensor:
    """Ids (rows, per_row), distinct within a row, drawn with frequency 1 / rank over shuffled ids."""
    cumulative = np.cumsum(1 / np.arange(1, bound + 1))
    shuffled = rng.permutation(bound)
    ids = np.empty((rows, per_row), dtype=np.int64)
    for n in range(rows):
        ranks = np.searchsorted(cumulative, rng.random(8 * per_row) * cumulative[-1])
        _, first_seen = np.unique(ranks, return_index=True)
        ids[n] = shuffled[ranks[np.sort(first_seen)[:per_row]]]
    return torch.from_numpy(ids)


def problems(
    rows: int, slots: int, classes: int, width: int, pool: int
) -> dict[str, tuple[int, Callable[[object], object]]]:
    """For each kernel the number of units it is measured by, and a call of it in a given module."""
    rng = np.random.Generator(np.random.Philox(key=1))
    torch.manual_seed(1)
    active = zipf_ids(rng, rows, slots, classes)
    weight, bias, hidden = torch.randn(classes, width), torch.randn(classes), torch.randn(rows, width)
    weight_state, bias_state = RowState.zeros_like(weight), RowState.zeros_like(bias)
    grad, target = torch.randn(rows, slots), torch.zeros(rows, slots)
    target[:, :2] = 0.5
    features = 200
    indptr = torch.arange(rows + 1) * features
    indices = zipf_ids(rng, rows, features, classes).view(-1).int()
    values = torch.rand(len(indices))
    ids = torch.from_numpy(rng.permutation(classes)[:pool])
    block_grad, pool_bias_grad = torch.randn(pool, width), torch.randn(pool)
    scores, pool_scores = torch.randn(rows, pool), torch.empty(rows, pool)
    targets = (torch.arange(rows + 1) * 2, torch.arange(2 * rows) % pool, torch.full((2 * rows,), 0.5))
    update = (weight, bias, weight_state, bias_state, ADAM)
    pairs, bag = rows * slots, rows * features
    return {
        "embedding_bag": (bag, lambda k: k.embedding_bag(indptr, indices, values, weight, bias[:width])),
        "embedding_bag_update": (
            bag,
            lambda k: k.embedding_bag_update(indptr, indices, values, hidden, weight, weight_state, ADAM),
        ),
        "pair_logits": (pairs, lambda k: k.pair_logits(hidden, weight, bias, active)),
        "softmax_loss": (pairs, lambda k: k.softmax_loss(grad, target, None)),
        "logistic_loss": (pairs, lambda k: k.logistic_loss(grad, target, None)),
        "pair_hidden_grad": (pairs, lambda k: k.pair_hidden_grad(grad, weight, active)),
        "pair_update": (pairs, lambda k: k.pair_update(grad, hidden, active, *update)),
        "gather_rows": (pool, lambda k: k.gather_rows(weight, bias, ids)),
        "rows_update": (pool, lambda k: k.rows_update(ids, block_grad, pool_bias_grad, *update)),
        "shared_softmax_loss": (
            rows * pool,
            lambda k: k.shared_softmax_loss(pool_scores.copy_(scores), *targets, None),
        ),
        "shared_logistic_loss": (
            rows * pool,
            lambda k: k.shared_logistic_loss(pool_scores.copy_(scores), *targets, None),
        ),
    }


def seconds(call: Callable[[object], object], module: object) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call(module)
    return time.perf_counter() - start


def compare(
    rows: int = 256,
    slots: int = 1000,
    classes: int = 283_447,
    width: int = 128,
    pool: int = 8192,
    repeats: int = 5,
) -> list[Comparison]:
    """Milliseconds of every kernel and of its plain torch reference."""
    table = problems(rows, slots, classes, width, pool)
    for _, call in table.values():
        call(cpu)  # compiles it, or loads it from Numba's cache
    taken: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(repeats):
        for name, (_, call) in table.items():
            taken[name, "cpu"].append(statistics.median(seconds(call, cpu) for _ in range(OUR_CALLS)))
            taken[name, "torch"].append(seconds(call, reference))
    return [
        Comparison(
            f"kernel {name}",
            "plain torch",
            "ms",
            [1e3 * second for second in taken[name, "cpu"]],
            [1e3 * second for second in taken[name, "torch"]],
            f"{1e9 * statistics.median(taken[name, 'cpu']) / units:.1f} ns for each of {units:,}",
        )
        for name, (units, _) in table.items()
    ]
