"""Milliseconds of a training step: slidex against a dense softmax and against torch's own sparse tools.

One step of 256 rows at width 128 with the default settings, rehashes included as they fall; the rivals start from the
same weights and take the same kind of batches, by turns with slidex in one process. The sparse rival is given slidex's
candidates and does not pay for finding them. Run it as ``python -m benchmarks --only steps``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.datasets import PYTHON, load
from benchmarks.report import Comparison
from benchmarks.rivals import DenseSoftmax, SparseSoftmax
from slidex.train.config import TrainConfig
from slidex.train.loop import Trainer
from slidex.train.settle import settle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from slidex.data.csr import CsrArrays

    Batch = tuple[CsrArrays, CsrArrays]
    Clock = Callable[[], float]

REPEATS = 5
WARM_UP = 20
OUR_STEPS = 50
LEARNING_RATE = 6e-3


@dataclass(frozen=True, slots=True)
class Case:
    """A data set, a mode, and steps that each rival takes in a repeat (0: it is left out)."""

    name: str
    mode: str
    dense_steps: int
    sparse_steps: int
    quick: bool = False


CASES = (
    Case("eurlex-4k", "auto", 10, 0),
    Case("stdlib", "auto", 4, 4),
    Case("npm-deps-2017", "auto", 4, 4, quick=True),
    Case("site-packages", "auto", 2, 4),
    Case("deb-files-283k", "auto", 2, 4, quick=True),
    Case("deb-files-283k", "per_sample", 0, 2, quick=True),
    Case("deb-files-3m", "auto", 1, 0, quick=True),  # the two rivals apart: together they need 24 GB
    Case("deb-files-3m", "auto", 0, 4),
    Case("deb-files-3m", "per_sample", 0, 2),
)


class OurSteps:
    """A run of slidex whose batches the rivals share.

    Args:
        name: Of the data set.
        data: Directory of the raw sets.
        settings: Over the defaults of `TrainConfig`.
    """

    def __init__(self, name: str, data: Path, **settings: Any) -> None:
        dataset = load(name, data)
        self.num_classes = dataset.num_classes
        config = TrainConfig(epochs=1000, normalize=name not in PYTHON, **settings)
        self.config = settle(config, dataset)
        self.trainer = Trainer(dataset, self.config, lambda *_: None)
        self._batches = self.trainer.batches()

    def batches(self, count: int) -> list[Batch]:
        """The next batches."""
        return [next(self._batches) for _ in range(count)]

    def run(self, steps: int, clock: Clock = time.perf_counter) -> float:
        """Trains on so many batches, reading them included; milliseconds a step by `clock`."""
        start = clock()
        for _ in range(steps):
            self.trainer.train_step(*next(self._batches))
        return 1e3 * (clock() - start) / steps


def dense_steps(rival: DenseSoftmax, batches: list[Batch], clock: Clock = time.perf_counter) -> float:
    """Milliseconds a step of the dense rival."""
    start = clock()
    for batch in batches:
        rival.step(*batch, LEARNING_RATE)
    return 1e3 * (clock() - start) / len(batches)


def sparse_steps(
    rival: SparseSoftmax, ours: OurSteps, batches: list[Batch], clock: Clock = time.perf_counter
) -> float:
    """Milliseconds a step of the sparse rival, on candidates that slidex's index finds for it beforehand."""
    model = ours.trainer.model
    selector = model.head.selector
    if selector is None:
        raise ValueError("exact mode has no candidates to share")
    select = selector.pool if ours.config.mode == "shared" else selector.active_sets
    candidates = [
        select(model.encoder(x).detach(), y, ours.trainer.step + i) for i, (x, y) in enumerate(batches)
    ]
    start = clock()
    for (x, y), found in zip(batches, candidates, strict=True):
        rival.step(x, y, found, LEARNING_RATE)
    return 1e3 * (clock() - start) / len(batches)


def compare(case: Case, data: Path, repeats: int = REPEATS) -> Iterator[Comparison]:
    """One line for each rival of a case."""
    ours = OurSteps(case.name, data, mode=case.mode)
    model, precision = ours.trainer.model, ours.config.precision
    dense = DenseSoftmax(model, ours.config.batch_size, precision) if case.dense_steps else None
    sparse = SparseSoftmax(model, precision) if case.sparse_steps and ours.config.mode != "exact" else None
    ours.run(WARM_UP)
    if dense:
        dense_steps(dense, ours.batches(1))
    if sparse:
        sparse_steps(sparse, ours, ours.batches(1))
    times: dict[str, list[float]] = {"slidex": [], "dense": [], "sparse": []}
    for _ in range(repeats):
        times["slidex"].append(ours.run(OUR_STEPS))
        if dense:
            times["dense"].append(dense_steps(dense, ours.batches(case.dense_steps)))
        if sparse:
            times["sparse"].append(sparse_steps(sparse, ours, ours.batches(case.sparse_steps)))
    what = f"step, {case.name}, C = {ours.num_classes:,}, {ours.config.mode}"
    active = f"{ours.trainer.interval.active / max(1, ours.trainer.interval.rows):,.0f} active classes"
    for rival in ("dense", "sparse"):
        if times[rival]:
            label = f"torch {rival}, {precision}"
            yield Comparison(what, label, "ms", times["slidex"], times[rival], active)


def run_case(case: Case, data: Path) -> list[Comparison]:
    """All lines of a case: fit for a process of its own."""
    return list(compare(case, data))
