"""Keeps the index over the output layer's rows up to date.

Only rows that a step has touched can have a new code, and `ClassRecord` knows which ones: where they are few, a rehash
hashes them alone. Building anew is for the rest: it is cheaper where most rows have moved, it lets an index fit its
means, norms or quantiser to the rows of today, and an index that learns from hidden vectors needs it, as those move
whatever the rows do. Which one is done depends on counts alone, never on the clock, so that a resumed run does the
same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from slidex.lsh import ClassSampler
from slidex.nn.class_record import TOUCHED
from slidex.nn.selection import DRIFT_ROWS, rehash_schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from slidex.lsh import CandidateIndex
    from slidex.lsh.index import QuerySample
    from slidex.nn.class_record import ClassRecord
    from slidex.nn.options import SamplingSettings

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


class OutputLayer(Protocol):
    """What an index is over."""

    @property
    def weight(self) -> torch.Tensor:
        """Float (C, D)."""
        ...

    @property
    def bias(self) -> torch.Tensor | None:
        """Float (C,), or None."""
        ...


class Rehasher:
    """Decides when the index is brought up to date, and how.

    Args:
        settings: Of the schedule; the seed draws the rows that drift is measured on.
        index: Over the rows of `head`.
        head: The output layer.
        record: Says which rows were touched since the last rehash.
        sample_queries: Gives hidden vectors of training rows, drawn anew for every step.
        any_row_moves: Whether rows move that `record` does not know of, so that the index is never just updated.
    """

    def __init__(
        self,
        settings: SamplingSettings,
        index: CandidateIndex,
        head: OutputLayer,
        record: ClassRecord,
        sample_queries: Callable[[int], QuerySample],
        *,
        any_row_moves: bool = False,
    ) -> None:
        self._schedule = rehash_schedule(settings)
        self._updated_rows = 0  # by updates since the last build
        self._seed, self._index, self._head = settings.seed, index, head
        self._record, self._sample_queries, self._any_row_moves = record, sample_queries, any_row_moves

    def rehash_if_due(self, step: int) -> Rehash | None:
        """Builds or updates the index if the schedule asks for it after `step` steps; always builds at step 0.

        The index is updated if no more than `UPDATE_SHARE` of its rows were touched, unless it learns from hidden
        vectors, or the rows updated since the last build would outnumber the classes.
        """
        if step > 0 and not self._schedule.due(step, self._drift):
            return None
        if step == 0 or self._index.uses_queries or self._any_row_moves:
            return self.build(step)
        touched = self._record.ids(TOUCHED)
        few = len(touched) <= UPDATE_SHARE * self._index.num_classes
        fitted_lately = self._updated_rows + len(touched) <= self._index.num_classes
        if not few or not fitted_lately:
            return self.build(step)
        self._index.update(self._head.weight, self._head.bias, touched)
        self._updated_rows += len(touched)
        return self._done(step, Rehash(updated=True, rows=len(touched)))

    def build(self, step: int) -> Rehash:
        """Builds the index after `step` steps, whatever the schedule says."""
        queries = self._sample_queries(step) if self._index.uses_queries else None
        self._index.build(self._head.weight, self._head.bias, queries=queries)
        self._updated_rows = 0
        return self._done(step, Rehash(updated=False, rows=self._index.num_classes))

    def _done(self, step: int, rehash: Rehash) -> Rehash:
        self._record.clear(TOUCHED)
        self._schedule.rehashed(step)
        return rehash

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
