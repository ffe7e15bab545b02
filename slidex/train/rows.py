"""Which rows are trained on, and which are validated on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from slidex.errors import DataError
from slidex.train.settle import STREAM_VALID, counter_rng

if TYPE_CHECKING:
    from slidex.data import Dataset
    from slidex.data.csr import CsrArrays
    from slidex.train.config import TrainConfig


def split_rows(
    dataset: Dataset, config: TrainConfig
) -> tuple[np.ndarray, tuple[CsrArrays, CsrArrays] | None]:
    """Ids of the training rows that have a label, and features and labels of the validation rows.

    Raises:
        DataError: if there is no such training row, or nothing to validate on where `patience` asks for it.
    """
    train = dataset.split("train")
    labels_per_row = np.diff(train.y.indptr)
    rows = np.flatnonzero(labels_per_row)
    if len(rows) == 0:
        raise DataError("no row of the train split has a label.", path=dataset.path)
    rng = counter_rng(config.seed, STREAM_VALID, 0)
    if "valid" in dataset.splits:
        split = dataset.split("valid")
        chosen = np.arange(split.num_rows)
    elif config.valid_fraction > 0:
        split = train
        chosen = draw_validation(rng, rows, config)
        rows = np.setdiff1d(rows, chosen)
    elif config.patience is None:
        return rows, None
    else:
        raise DataError(
            "the 'patience' setting needs validation rows: give 'valid_fraction', or prepare a valid split.",
            path=dataset.path,
        )
    if len(chosen) > config.valid_rows:
        chosen = rng.choice(chosen, config.valid_rows, replace=False)
    return rows, (split.x.take(chosen), split.y.take(chosen))


def draw_validation(rng: np.random.Generator, rows: np.ndarray, config: TrainConfig) -> np.ndarray:
    """The labelled training rows that `valid_fraction` holds out, drawn with a generator of `STREAM_VALID`."""
    return rng.choice(rows, max(1, int(len(rows) * config.valid_fraction)), replace=False)
