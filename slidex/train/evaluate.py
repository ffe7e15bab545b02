"""Ranking metrics of a trained model on a split of a data set."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from slidex.errors import DataError
from slidex.metrics import MetricAccumulator

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from slidex.data import Dataset
    from slidex.train.run import Run


def evaluate(
    run: Run,
    dataset: Dataset,
    *,
    split: str = "test",
    ks: Sequence[int] = (1, 3, 5),
    indexed: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Scores every row of a split against its labels.

    Args:
        run: A trained run; its best checkpoint is used, or the last if nothing was validated.
        dataset: Of the sizes the run was trained on.
        split: Name of the split.
        ks: Cut-offs of the metrics.
        indexed: Score only the classes that the index proposes, instead of all.
        progress: Called with rows done and rows in all.

    Returns:
        The metrics of `slidex.metrics.MetricAccumulator.compute`, with ``scoring`` ("exact" or "index"), ``rows``,
        ``step`` and ``microseconds_per_row``.

    Raises:
        DataError: if the data set has other sizes than the model, or no such split.
        CheckpointError: if the run's files are missing or altered.
    """
    for name, found, trained in (
        ("classes", dataset.num_classes, run.meta["num_classes"]),
        ("features", dataset.num_features, run.meta["num_features"]),
    ):
        if found != trained:
            raise DataError(
                f"has {found:,} {name}; the run {run.path} was trained on {trained:,}.", path=dataset.path
            )
    rows = dataset.split(split)
    checkpoint = run.checkpoint()
    model = run.model(checkpoint, indexed=indexed)
    metrics = MetricAccumulator(run.class_counts(), run.meta["train_rows"], ks=tuple(ks))
    started = time.perf_counter()
    done = 0
    for _, ids in model.topk(rows.x, max(ks), indexed=indexed):
        metrics.update(ids.numpy(), rows.y.slice(done, done + len(ids)))
        done += len(ids)
        if progress is not None:
            progress(done, rows.num_rows)
    seconds = time.perf_counter() - started
    return {
        "split": split,
        "scoring": "index" if indexed else "exact",
        "rows": rows.num_rows,
        "step": checkpoint.step,
        "microseconds_per_row": 1e6 * seconds / max(1, rows.num_rows),
        **metrics.compute(),
    }
