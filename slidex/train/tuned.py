"""The index that `slidex tune-index` chose for prediction, kept in the run directory.

prediction/index.json                kind, settings, step of the weights, what was measured; its own checksum
prediction/state_HASH.safetensors    what a hash index learned or had inserted; codes are hashed anew. HASH begins its
                                     checksum

``index.json`` is written last and atomically and names the state with size and checksum, so that readers see one
choice or the other, whole. FAISS indexes are trained and filled anew from the weights: a file that FAISS itself would
read is not kept, as reading one can do harm.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import slidex
from slidex.errors import CheckpointError, ConfigError
from slidex.lsh import HashIndex, make_index
from slidex.train.checkpoint import record_files, sync, verify_files, write_atomically

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
        file = self.path.parent / next(iter(self.files))
        try:
            state = load_file(file)
            index.family.load_parameters(state)
            codes = index.family.hash_rows(weight_CD, bias_C)
            index.load_state(state | {"codes": torch.from_numpy(codes)}, weight_CD, bias_C)
        except (OSError, SafetensorError, ConfigError, KeyError) as error:
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
    folder = run / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        files = _save_state(folder, state) if state else {}
        body = {"format": FORMAT, "version": VERSION, "slidex": slidex.__version__}
        body |= {name: value for name, value in asdict(tuned).items() if name in _FIELDS} | {"files": files}
        text = json.dumps(body | {"checksum": _digest(body)}, indent=1)
        write_atomically(folder / FILE, text)
        sync(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}.") from error
    for old in folder.glob("state_*.safetensors"):
        if old.name not in files:
            old.unlink(missing_ok=True)
    return folder / FILE


def load_tuned(run: Path) -> TunedIndex | None:
    """The choice kept in the run directory `run`, or None if there is none.

    Raises:
        CheckpointError: it is damaged, of another version, or its state is missing or altered.
    """
    file = run / FOLDER / FILE
    try:
        body = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}.") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CheckpointError(f"{file}: its 'format' must be {FORMAT!r}.")
    if body.get("version") != VERSION:
        raise CheckpointError(
            f"{file}: is of version {body.get('version')}; this slidex ({slidex.__version__}) reads {VERSION}."
        )
    checksum = body.pop("checksum", None)
    if checksum != _digest(body):
        raise CheckpointError(f"{file}: its checksum is not the one recorded: it was altered.")
    for name, kind in {**_FIELDS, "files": dict}.items():
        if not isinstance(body.get(name), kind):
            raise CheckpointError(f"{file}: its {name!r} is missing or damaged.")
    if any("/" in name or os.sep in name for name in body["files"]):
        raise CheckpointError(f"{file}: its 'files' must lie beside it. Got {list(body['files'])} instead.")
    verify_files(file.parent, body["files"])
    return TunedIndex(**{name: body[name] for name in _FIELDS}, path=file, files=body["files"])


def _save_state(folder: Path, state: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """Writes the tensors under a name made of their checksum, so that an earlier state is never overwritten."""
    temporary = folder / f".tmp-{os.getpid()}"
    temporary.mkdir()
    try:
        save_file({name: value.contiguous() for name, value in state.items()}, temporary / "state")
        record = record_files(temporary)["state"]
        name = f"state_{record['blake2b'][:8]}.safetensors"
        sync(temporary / "state")
        (temporary / "state").replace(folder / name)
    finally:
        (temporary / "state").unlink(missing_ok=True)
        temporary.rmdir()
    sync(folder)
    return {name: record}


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
