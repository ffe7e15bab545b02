"""Seconds of training to the P@1 of a dense softmax: who gets there first.

Both train with the same initial weights, batch size and learning-rate schedule; slidex may take more steps, as its
steps cost less. The P@1 to reach is the best of the dense run. Run it as ``python -m benchmarks --only race``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from benchmarks.datasets import PYTHON, load
from benchmarks.report import Comparison
from benchmarks.training import learning_curve, seconds_to
from slidex.train.config import TrainConfig

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Race:
    """A data set, the dense run's settings, what slidex changes in them, and repeats."""

    name: str
    dense: dict[str, Any]
    ours: dict[str, Any] = field(default_factory=dict)
    repeats: int = 1
    quick: bool = False


RACES = (
    Race("eurlex-4k", {"batch_size": 128, "epochs": 10}, repeats=5, quick=True),
    Race("npm-deps-2017", {"batch_size": 128, "epochs": 2}),
    # Dense takes too long here for an epoch of 8,000 steps.
    Race("site-packages", {"max_steps": 500}, {"max_steps": 800}),
)
POINTS, TEST_ROWS = 10, 4096


def run_race(race: Race, data: Path) -> list[Comparison]:
    """The line of a race."""
    dataset = load(race.name, data)
    base = {"epochs": 50, "normalize": race.name not in PYTHON}
    dense_config = TrainConfig.from_mapping({**base, **race.dense})
    our_config = TrainConfig.from_mapping({**base, **race.dense, **race.ours})
    for config, dense in ((our_config, False), (dense_config, True)):  # compiles, warms up
        learning_curve(dataset, replace(config, max_steps=2), points=1, test_rows=1, dense=dense)
    ours, theirs, ends = [], [], []
    for _ in range(race.repeats):
        dense_curve = learning_curve(dataset, dense_config, points=POINTS, test_rows=TEST_ROWS, dense=True)
        our_curve = learning_curve(dataset, our_config, points=POINTS, test_rows=TEST_ROWS)
        best = max(point.p1 for point in dense_curve)
        reached = seconds_to(our_curve, best)
        for label, curve in (("dense", dense_curve), ("slidex", our_curve)):
            print(
                f"  {race.name}, {label}: "
                + ", ".join(f"{point.wall:.1f} s {point.p1:.2f}" for point in curve),
                file=sys.stderr,
            )
        theirs.append(seconds_to(dense_curve, best))
        ours.append(float("inf") if reached is None else reached)
        ends.append((our_curve[-1].p1, our_curve[-1].cpu, dense_curve[-1].p1))
    final, cpu, dense_final = ends[-1]
    return [
        Comparison(
            f"seconds to P@1 {best:.2f}, {race.name}, C = {dataset.num_classes:,}",
            f"torch dense, {dense_curve[-1].step:,} steps",
            "s",
            ours,
            theirs,
            f"final P@1 {final:.2f} (dense {dense_final:.2f}), {cpu:.1f} CPU s in all",
        )
    ]
