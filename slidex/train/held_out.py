"""Rows that choose and report on an index of prediction, and the training rows that it may learn from.

Legend: N rows, D hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from slidex.errors import DataError
from slidex.lsh import QuerySample
from slidex.nn.classifier import PREDICT_ROWS
from slidex.train.rows import draw_validation
from slidex.train.run import fingerprint
from slidex.train.settle import STREAM_VALID, counter_rng

if TYPE_CHECKING:
    from slidex.data import CsrArrays, Dataset
    from slidex.nn.classifier import Classifier
    from slidex.train.run import Run

_STREAM_TUNE = 16
_QUERY_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Rows to choose and report on.

    Args:
        source: Where they are from, for people.
        x: Features.
        y: True classes.
        excluded: int64, training rows that no index may learn from.
    """

    source: str
    x: CsrArrays
    y: CsrArrays
    excluded: np.ndarray

    def half(self, second: bool) -> tuple[CsrArrays, CsrArrays]:
        """The rows that choose, or those that report."""
        middle, rows = self.x.num_rows // 2, self.x.num_rows
        part = (middle, rows) if second else (0, middle)
        return self.x.slice(*part), self.y.slice(*part)


def held_out(run: Run, dataset: Dataset, split: str | None, count: int) -> HeldOut:
    """At most `count` labelled rows in random order: of the split asked for, else validation rows, else training rows.

    Raises:
        DataError: there is no such split, it has fewer than 2 labelled rows, or rows of the training are wanted and
            this is another data set.
    """
    config, none = run.config, np.empty(0, dtype=np.int64)
    if split is None and "valid" in dataset.splits:
        split = "valid"
    name = split or "train"
    rows = dataset.split(name)
    labelled = np.flatnonzero(np.diff(rows.y.indptr))
    source, excluded, own = f"the {name} split", none, name == "train"
    if split is None:
        if run.meta["data"]["fingerprint"] != fingerprint(dataset):
            raise DataError(
                f"is not the data set that {run.path} was trained on, so its held-out rows are unknown: give --split.",
                path=dataset.path,
            )
        source = "the train split: rows the model was trained on"
        if config.valid_fraction > 0:
            source = "the run's validation rows"
            labelled = draw_validation(counter_rng(config.seed, STREAM_VALID, 0), labelled, config)
            excluded = labelled
    if len(labelled) < 2:
        raise DataError(
            f"expected at least 2 labelled rows in {source}, found {len(labelled)}", path=dataset.path
        )
    if own and len(excluded) == 0:  # an index needs rows to learn from
        count = min(count, max(2, len(labelled) // 5))
    rng = counter_rng(config.seed, _STREAM_TUNE, 0)
    chosen = rng.choice(labelled, min(count, len(labelled)), replace=False)
    if own and len(excluded) == 0:
        excluded = chosen
    return HeldOut(source, rows.x.take(chosen), rows.y.take(chosen), np.sort(excluded))


def training_queries(
    model: Classifier, dataset: Dataset, excluded: np.ndarray, most: int | None
) -> QuerySample:
    """Hidden vectors of labelled training rows, random ones where there are too many, without those excluded."""
    split = dataset.split("train")
    rows = np.setdiff1d(np.flatnonzero(np.diff(split.y.indptr)), excluded)
    most = _QUERY_BYTES // (4 * model.encoder.out_features) if most is None else most
    if len(rows) > most:
        rows = np.sort(counter_rng(0, _STREAM_TUNE, 1).choice(rows, most, replace=False))
    y = split.y.take(rows)
    hidden_ND = torch.empty(len(rows), model.encoder.out_features)
    for first in range(0, len(rows), PREDICT_ROWS):
        part = slice(first, first + PREDICT_ROWS)
        hidden_ND[part] = hidden_vectors(model, split.x.take(rows[part]))
    return QuerySample(hidden_ND, torch.from_numpy(y.indptr), torch.from_numpy(y.indices.astype(np.int64)))


def hidden_vectors(model: Classifier, x: CsrArrays) -> torch.Tensor:
    """float32 (N, D)."""
    with torch.no_grad():
        blocks = [
            model.encoder(x.take(np.arange(first, min(first + PREDICT_ROWS, x.num_rows))))
            for first in range(0, x.num_rows, PREDICT_ROWS)
        ]
    return torch.cat(blocks) if blocks else torch.empty(0, model.encoder.out_features)
