"""Time every kernel at a realistic size, beside the plain torch reference: ``python -m benchmarks.kernels``.

Medians of interleaved repeats, so that a burst of other work on the machine hits all rows of the table alike. The
first call of each kernel is reported too: Numba compiles it, or loads it from its cache. Under a minute on two cores.
Letters: N batch rows, A active classes a row, C classes, D hidden width, F features, U pool size.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import click
import numba
import numpy as np
import torch

from slidex.kernels import RowState, StepSettings, cpu, reference

if TYPE_CHECKING:
    from collections.abc import Callable

ADAM = StepSettings(learning_rate=1e-3, step=10)
_REFERENCE_REPEATS = 3


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
        "(copy of the scores)": (rows * pool, lambda _: pool_scores.copy_(scores)),
    }


def seconds(call: Callable[[object], object], module: object) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call(module)
    return time.perf_counter() - start


@click.command()
@click.option("--rows", default=256, show_default=True, help="N, samples in a batch.")
@click.option("--slots", default=1000, show_default=True, help="A, active classes per sample.")
@click.option("--classes", default=283_447, show_default=True, help="C, classes (and features).")
@click.option("--width", default=128, show_default=True, help="D, hidden width.")
@click.option("--pool", default=8192, show_default=True, help="U, size of the shared pool.")
@click.option("--repeats", default=21, show_default=True, help="Interleaved repeats; the median counts.")
def main(rows: int, slots: int, classes: int, width: int, pool: int, repeats: int) -> None:
    """Print ms per call and ns per unit (a pair, a pool row, or a score) of every kernel."""
    table = problems(rows, slots, classes, width, pool)
    first = {name: seconds(call, cpu) for name, (_, call) in table.items()}
    taken: dict[tuple[str, str], list[float]] = {
        (name, side): [] for name in table for side in ("cpu", "torch")
    }
    for repeat in range(repeats):
        for name, (_, call) in table.items():
            taken[name, "cpu"].append(seconds(call, cpu))
            if repeat < _REFERENCE_REPEATS:
                taken[name, "torch"].append(seconds(call, reference))
    distinct = len(zipf_ids(np.random.Generator(np.random.Philox(key=1)), rows, slots, classes).unique())
    click.echo(
        f"N={rows} A={slots} ({distinct} distinct) C={classes} D={width} U={pool}, "
        f"{numba.get_num_threads()} numba threads"
    )
    click.echo(f"{'kernel':<22}{'units':>10}{'ms':>9}{'best':>9}{'ns/unit':>9}{'torch ms':>10}{'first s':>9}")
    for name, (units, _) in table.items():
        median = statistics.median(taken[name, "cpu"])
        plain = statistics.median(taken[name, "torch"])
        click.echo(
            f"{name:<22}{units:>10}{median * 1e3:>9.2f}{min(taken[name, 'cpu']) * 1e3:>9.2f}"
            f"{median / units * 1e9:>9.2f}{plain * 1e3:>10.1f}{first[name]:>9.2f}"
        )
    click.echo(f"first calls together: {sum(first.values()):.2f} s (compiled, or loaded from Numba's cache)")


if __name__ == "__main__":
    main()
