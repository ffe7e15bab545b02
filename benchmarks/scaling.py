"""What more classes cost: time of a step and peak memory of a process, on synthetic sets that differ in C alone.

Run it as ``python -m benchmarks --only scaling``.
"""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

from benchmarks.report import Comparison, in_child
from benchmarks.rivals import DenseSoftmax
from benchmarks.steps import OUR_STEPS, REPEATS, WARM_UP, OurSteps, dense_steps
from slidex.kernels import OPTIMIZERS

if TYPE_CHECKING:
    from pathlib import Path

SMALL, LARGE = 145_000, (3_400_000, 10_000_000)
AMAZON = 670_091
"""Classes of Amazon-670K, on which SLIDE is best known."""


def peak_gigabytes() -> float:
    """The most memory this process has held, in 10^9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def step_times(num_classes: int, data: Path) -> list[Comparison]:
    """How much longer a step takes at `num_classes` than at `SMALL`; the note has the peak memory of both together."""
    small, large = (OurSteps(f"synthetic-{count}", data) for count in (SMALL, num_classes))
    large.run(WARM_UP)
    small.run(WARM_UP)
    times = [(large.run(OUR_STEPS), small.run(OUR_STEPS)) for _ in range(REPEATS)]
    return [
        Comparison(
            f"step at C = {SMALL:,}, synthetic, {small.config.mode}",
            f"slidex at C = {num_classes:,}, {large.config.mode}",
            "ms",
            [b for _, b in times],
            [a for a, _ in times],
            f"peak {peak_gigabytes():.1f} GB, two models in one process",
        )
    ]


def peaks(data: Path, num_classes: int = AMAZON) -> list[Comparison]:
    """Peak memory of a process that trains at `num_classes`, for each optimizer, against a dense softmax."""
    dense = in_child(dense_peak, num_classes, data)
    return [
        Comparison(
            f"peak memory at {num_classes:,} x 128, {optimizer}",
            "torch dense",
            "GB",
            [in_child(our_peak, num_classes, data, optimizer)],
            [dense],
        )
        for optimizer in OPTIMIZERS
    ]


def our_peak(num_classes: int, data: Path, optimizer: str) -> float:
    """Peak memory in GB of this process once it has trained `WARM_UP` steps and written all of its state."""
    ours = OurSteps(f"synthetic-{num_classes}", data, optimizer=optimizer)
    ours.run(WARM_UP)
    # Pages that no step has written yet do not count for the system, but would in a longer run.
    for state in (ours.trainer.model.head.weight_state, ours.trainer.model.encoder.bag_state):
        for moment in state:
            moment.fill_(0)
    return peak_gigabytes()


def dense_peak(num_classes: int, data: Path) -> float:
    """The same of a dense softmax, less the weights that it starts from."""
    ours = OurSteps(f"synthetic-{num_classes}", data)
    model = ours.trainer.model
    rival = DenseSoftmax(model, ours.config.batch_size, ours.config.precision)
    dense_steps(rival, ours.batches(1))
    started_from = model.head.weight.nbytes + model.encoder.bag.nbytes
    return peak_gigabytes() - started_from / 1e9
