"""Accuracy against time while a model trains: the figure that decides between indexes, schedules and settings.

Time is that of training alone (data, encoder, index, kernels, rehashes): accuracy is measured between the laps, on the
same random test rows with all classes scored. Wall-clock seconds, and CPU seconds of all threads.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.rivals import DenseSoftmax
from slidex.train.loop import Trainer
from slidex.train.settle import learning_rate, settle

if TYPE_CHECKING:
    from slidex.data import Dataset
    from slidex.train.config import TrainConfig


@dataclass(frozen=True, slots=True)
class Point:
    """What had been reached after so many steps; seconds of training, P@1 in per cent."""

    step: int
    wall: float
    cpu: float
    rehash: float
    p1: float


def learning_curve(
    dataset: Dataset,
    config: TrainConfig,
    *,
    points: int = 10,
    test_rows: int = 4096,
    dense: bool = False,
) -> list[Point]:
    """Trains and measures P@1 `points` times, evenly over the steps.

    Args:
        dataset: With a test split.
        config: Settings; nothing is written anywhere.
        points: Measurements.
        test_rows: Random rows of the test split that P@1 is measured on.
        dense: Trains `DenseSoftmax` in slidex's place: same initial weights, batches and learning rates.
    """
    config = settle(config, dataset)
    trainer = Trainer(dataset, config, lambda *_: None)
    rival = DenseSoftmax(trainer.model, config.batch_size, config.precision) if dense else None
    split = dataset.split("test")
    labelled = np.flatnonzero(np.diff(split.y.indptr))
    rng = np.random.Generator(np.random.Philox(key=[0, 1]))
    rows = np.sort(rng.choice(labelled, min(test_rows, len(labelled)), replace=False))
    x, y = split.x.take(rows), split.y.take(rows)
    total = trainer.total_steps
    every = max(1, total // points)
    curve: list[Point] = []
    wall = cpu = rehash = 0.0
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    for step, (batch_x, batch_y) in enumerate(trainer.batches(), start=1):
        if rival:
            rival.step(batch_x, batch_y, learning_rate(config, step, total))
        else:
            trainer.train_step(batch_x, batch_y)
        if step % every == 0 or step == total:
            wall += time.perf_counter() - wall_start
            cpu += time.process_time() - cpu_start
            rehash += trainer.interval.watch.seconds.get("rehash", 0.0)
            trainer.interval.watch.seconds.clear()
            if rival:
                best = rival.best_classes(x).numpy()
            else:
                best = np.concatenate([ids[:, 0].numpy() for _, ids in trainer.model.topk(x, 1)])
            hits = [best[i] in y.indices[y.indptr[i] : y.indptr[i + 1]] for i in range(len(rows))]
            curve.append(Point(step, wall, cpu, rehash, 100 * float(np.mean(hits))))
            wall_start, cpu_start = time.perf_counter(), time.process_time()
    return curve


def seconds_to(curve: list[Point], p1: float, *, what: str = "wall") -> float | None:
    """Seconds at which the curve first reaches `p1`, along straight lines between points; None if it never does."""
    before = Point(0, 0.0, 0.0, 0.0, 0.0)
    for point in curve:
        if point.p1 >= p1:
            share = (p1 - before.p1) / max(point.p1 - before.p1, 1e-9)
            return getattr(before, what) + share * (getattr(point, what) - getattr(before, what))
        before = point
    return None
