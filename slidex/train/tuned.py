"""The index that `slidex tune-index` chose for prediction, kept in the run directory.

prediction/index.json                kind, settings, step of the weights, what was measured; its own checksum
prediction/state_HASH.safetensors    what a hash index learned or had inserted; codes are hashed anew. HASH begins its
                                     checksum

``index.json`` is written last and atomically and names the state with size and checksum, so that readers see one
choice or the other, whole. FAISS indexes are trained and filled anew from the weights: a file that FAISS itself would
read is not kept, as reading one can do harm.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from slidex.errors import CheckpointError, ConfigError
from slidex.lsh import HashIndex, make_index
from slidex.train.records import load_tensors, read_record, write_record

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from slidex.lsh import CandidateIndex

FORMAT, VERSION = "slidex-tuned-index", 1
FOLDER, FILE = "prediction", "index.json"
_FIELDS = {
    "index": str,
    "options": dict,
    "seed": int,
    "candidates": int,
    "partition_classes": int,
    "step": int,
    "rows": dict,
    "report": dict,
    "trials": list,
}


@dataclass(frozen=True, slots=True)
class TunedIndex:
    """A choice of index with the settings it was chosen with.

    Args:
        index: Name for `slidex.lsh.make_index`.
        options: Its settings.
        seed: Its seed.
        candidates: Classes asked of it for each row.
        partition_classes: Random classes for the partition function.
        step: Of the checkpoint whose weights it was tuned on.
        rows: Which rows it was chosen and reported on, and how many training rows it learned from.
        report: What was measured on the rows that did not choose.
        trials: What was tried: settings, cost and recall of each.
        path: Where it was read from; None for one that was not.
        files: Name of the state file to its size and checksum; empty where nothing was learned.
    """

    index: str
    options: dict[str, Any]
    seed: int
    candidates: int
    partition_classes: int
    step: int
    rows: dict[str, Any]
    report: dict[str, Any]
    trials: list[dict[str, Any]]
    path: Path | None = field(default=None, compare=False)
    files: dict[str, Any] = field(default_factory=dict, compare=False)

    def describe(self) -> str:
        """One line: ``simhash (bits 12, tables 16), 64 candidates``."""
        options = ", ".join(f"{name} {value}" for name, value in self.options.items())
        return f"{self.index}{f' ({options})' if options else ''}, {self.candidates:,} candidates"

    def build(self, weight_CD: torch.Tensor, bias_C: torch.Tensor) -> CandidateIndex:
        """The index over these weights, with what it had learned.

        Raises:
            CheckpointError: the state file cannot be read, or does not fit the settings.
        """
        index = make_index(self.index, weight_CD.shape[1], weight_CD.shape[0], seed=self.seed, **self.options)
        if not self.files:
            index.build(weight_CD, bias_C)
            return index
        if self.path is None or not isinstance(index, HashIndex):
            raise CheckpointError(f"{self.path}: has a state for an index that keeps none: {self.index!r}.")
        state = load_tensors(self.path, self.files)
        try:
            index.family.load_parameters(state)
            codes = index.family.hash_rows(weight_CD, bias_C)
            index.load_state(state | {"codes": torch.from_numpy(codes)}, weight_CD, bias_C)
        except (ConfigError, KeyError) as error:
            file = self.path.parent / next(iter(self.files))
            raise CheckpointError(f"{file}: does not fit {self.path}: {error}.") from error
        return index


def learned_state(index: CandidateIndex) -> dict[str, torch.Tensor]:
    """What `TunedIndex.build` needs beside the settings: nothing for an index that made no use of queries."""
    if not (isinstance(index, HashIndex) and index.uses_queries):
        return {}
    return {name: value for name, value in index.state().items() if name != "codes"}


def save_tuned(run: Path, tuned: TunedIndex, state: Mapping[str, torch.Tensor]) -> Path:
    """Writes the choice into the run directory `run`, in place of an earlier one; returns the JSON file.

    Raises:
        CheckpointError: it cannot be written; an earlier choice is then still there.
    """
    file = run / FOLDER / FILE
    body = {name: value for name, value in asdict(tuned).items() if name in _FIELDS}
    write_record(file, (FORMAT, VERSION), body, state)
    return file


def load_tuned(run: Path) -> TunedIndex | None:
    """The choice kept in the run directory `run`, or None if there is none.

    Raises:
        CheckpointError: it is damaged, of another version, or its state is missing or altered.
    """
    file = run / FOLDER / FILE
    body = read_record(file, (FORMAT, VERSION), _FIELDS)
    return None if body is None else TunedIndex(**body, path=file)
