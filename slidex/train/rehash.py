"""Keeps the index over the output layer's rows up to date.

Only rows that a step has touched can have a new code, and the trainer knows which ones: where they are few, a rehash
hashes them alone. Building anew is for the rest: it is cheaper where most rows have moved, it lets an index fit its
means, norms or quantiser to the rows of today, and an index that learns from hidden vectors needs it, as those move
whatever the rows do. Which one is done depends on counts alone, never on the clock, so that a resumed run does the
same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from slidex.lsh import ClassSampler
from slidex.lsh.index import QuerySample
from slidex.nn.classifier import PREDICT_ROWS
from slidex.train.coverage import TOUCHED
from slidex.train.settle import DRIFT_ROWS, STREAM_QUERIES, counter_rng, rehash_schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from slidex.data.csr import CsrArrays
    from slidex.lsh import CandidateIndex
    from slidex.nn.encoder import BagEncoder
    from slidex.nn.head import SampledHead
    from slidex.train.config import TrainConfig
    from slidex.train.coverage import ClassRecord

UPDATE_SHARE = 0.5
"""Up to this share of touched rows an update of hash tables costs less CPU time than a build (docs/performance.md)."""


@dataclass(frozen=True, slots=True)
class Rehash:
    """What a rehash did.

    Args:
        updated: Whether the touched rows alone were hashed.
        rows: How many rows were hashed.
    """

    updated: bool
    rows: int


class Rehasher:
    """Decides when the index is brought up to date, and how.

    Args:
        config: Settings.
        index: Over the rows of `head`.
        head: The output layer.
        record: Says which rows were touched since the last rehash.
        sample_queries: Gives hidden vectors of training rows, drawn anew for every step.
    """

    def __init__(
        self,
        config: TrainConfig,
        index: CandidateIndex,
        head: SampledHead,
        record: ClassRecord,
        sample_queries: Callable[[int], QuerySample],
    ) -> None:
        self._schedule = rehash_schedule(config)
        self._updated_rows = 0  # by updates since the last build
        self._seed, self._index, self._head = config.seed, index, head
        self._record, self._sample_queries = record, sample_queries

    def rehash_if_due(self, step: int) -> Rehash | None:
        """Builds or updates the index if the schedule asks for it after `step` steps; always builds at step 0.

        The index is updated if no more than `UPDATE_SHARE` of its rows were touched, unless it learns from hidden
        vectors, or the rows updated since the last build would outnumber the classes.
        """
        if step > 0 and not self._schedule.due(step, self._drift):
            return None
        index, weight_CD, bias_C = self._index, self._head.weight, self._head.bias
        touched = self._record.ids(TOUCHED)
        few = len(touched) <= UPDATE_SHARE * index.num_classes
        fitted_lately = self._updated_rows + len(touched) <= index.num_classes
        updated = step > 0 and not index.uses_queries and few and fitted_lately
        if updated:
            index.update(weight_CD, bias_C, torch.from_numpy(touched))
            self._updated_rows += len(touched)
        else:
            index.build(weight_CD, bias_C, queries=self._sample_queries(step) if index.uses_queries else None)
            self._updated_rows = 0
        self._record.clear(TOUCHED)
        self._schedule.rehashed(step)
        return Rehash(updated, len(touched) if updated else index.num_classes)

    def state_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {"schedule": self._schedule.state_dict(), "updated_rows": self._updated_rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self._schedule.load_state_dict(state["schedule"])
        self._updated_rows = state["updated_rows"]

    def _drift(self) -> float:
        sample = ClassSampler(self._index.num_classes, seed=self._seed).sample(DRIFT_ROWS, step=0)
        return self._index.drift(self._head.weight, self._head.bias, sample)


def draw_queries(
    encoder: BagEncoder, x: CsrArrays, y: CsrArrays, rows: np.ndarray, count: int, *, seed: int, step: int
) -> QuerySample:
    """Hidden vectors of random training rows with their true classes, a function of seed, step and weights.

    Args:
        encoder: Run without dropout, in blocks of `PREDICT_ROWS`.
        x: Features of all training rows.
        y: Their true classes.
        rows: int64, the rows to draw from.
        count: Rows to draw; all of `rows` where there are no more.
        seed: Of the run.
        step: Steps taken so far.
    """
    rng = counter_rng(seed, STREAM_QUERIES, step)
    chosen = np.sort(rng.choice(rows, min(count, len(rows)), replace=False, shuffle=False))
    with torch.no_grad():
        blocks = [
            encoder(x.take(chosen[first : first + PREDICT_ROWS]))
            for first in range(0, len(chosen), PREDICT_ROWS)
        ]
    labels = y.take(chosen)
    return QuerySample(
        torch.cat(blocks), torch.from_numpy(labels.indptr), torch.from_numpy(labels.indices).long()
    )
