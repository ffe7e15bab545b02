"""Ranking metrics of a trained model on a split of a data set, by class frequency if asked, and its worst mistakes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from slidex.frequency import FrequencyAccumulator
from slidex.metrics import MetricAccumulator
from slidex.train.mistakes import MistakeKeeper

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from slidex.data import Dataset
    from slidex.nn.classifier import Classifier
    from slidex.train.run import Run


def evaluate(
    run: Run,
    dataset: Dataset,
    *,
    split: str = "test",
    ks: Sequence[int] = (1, 3, 5),
    indexed: bool = False,
    by_frequency: bool = False,
    errors: int = 0,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Scores every row of a split against its labels.

    Args:
        run: A trained run; its best checkpoint is used, or the last if nothing was validated.
        dataset: Of the sizes the run was trained on.
        split: Name of the split.
        ks: Cut-offs of the metrics.
        indexed: Score only the classes that the index proposes, instead of all.
        by_frequency: Also by deciles of class frequency.
        errors: Also so many of the worst mistakes; 0 for none.
        device: Where to score; see `Run.model`.
        progress: Called with rows done and rows in all.

    Returns:
        The metrics of `slidex.metrics.MetricAccumulator.compute`, with ``scoring`` ("exact" or "index"), ``rows``,
        ``step`` and ``microseconds_per_row`` (of prediction alone). With `indexed`, where an index was tuned, also
        ``tuned_index``: what it is and what `slidex.train.tuning.tune` measured. With `by_frequency` the records of
        `slidex.frequency.FrequencyAccumulator.compute` as ``by_frequency``, with `errors` those of
        `slidex.train.mistakes.MistakeKeeper.worst` as ``errors``.

    Raises:
        DataError: if the data set has other sizes than the model, or no such split.
        CheckpointError: if the run's files are missing or altered.
        DeviceError: if the device cannot be used.
        MissingExtraError: if packages for it are not installed.
    """
    run.check_sizes(dataset)
    rows = dataset.split(split)
    checkpoint = run.checkpoint()
    model = run.model(checkpoint, indexed=indexed, device=device)
    tuned = run.tuned(checkpoint) if indexed else None
    counts, train_rows = run.class_counts(), run.meta["train_rows"]
    metrics = MetricAccumulator(counts, train_rows, ks=tuple(ks))
    deciles = FrequencyAccumulator(counts, train_rows, tuple(ks)) if by_frequency else None
    mistakes = _mistake_keeper(model, errors, counts, dataset) if errors else None
    done, seconds, started = 0, 0.0, time.perf_counter()
    for scores, ids in model.topk(rows.x, max(ks), indexed=indexed):
        seconds += time.perf_counter() - started
        part = slice(done, done + len(ids))
        labels = rows.y.slice(part.start, part.stop)
        metrics.update(ids.numpy(), labels)
        if deciles is not None:
            deciles.update(ids.numpy(), labels)
        if mistakes is not None:
            mistakes.update(done, rows.x.slice(part.start, part.stop), labels, scores, ids)
        done += len(ids)
        if progress is not None:
            progress(done, rows.num_rows)
        started = time.perf_counter()
    return {
        "split": split,
        "scoring": "index" if indexed else "exact",
        "rows": rows.num_rows,
        "step": checkpoint.step,
        "microseconds_per_row": 1e6 * seconds / max(1, rows.num_rows),
        **metrics.compute(),
        **(
            {}
            if tuned is None
            else {"tuned_index": {"index": tuned.describe(), **tuned.rows, **tuned.report}}
        ),
        **({} if deciles is None else {"by_frequency": deciles.compute()}),
        **({} if mistakes is None else {"errors": mistakes.worst()}),
    }


def _mistake_keeper(model: Classifier, errors: int, counts: np.ndarray, dataset: Dataset) -> MistakeKeeper:
    return MistakeKeeper(
        model, errors, counts, label_names=dataset.label_names(), feature_names=dataset.feature_names()
    )
