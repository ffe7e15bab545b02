"""A run directory: settings, log, checkpoints, and what prediction needs of the data set.

run.json        settings, sizes, the data set's fingerprint, versions
log.jsonl       one line for each report, validation and checkpoint
best.json       step and P@1 of the best validation, if there was one
names/          class_counts.npy; labels.jsonl and vectorizer/, copied from the data set, where it has them
checkpoints/    step_NNNNNNNN/, see slidex.train.checkpoint
ranker/         the linear ranker, see slidex.train.kept_ranker, where there is one
prediction/     the index that slidex tune-index chose, see slidex.train.tuned; not there before
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import slidex
from slidex.data import NameList
from slidex.errors import CheckpointError, ConfigError, DataError
from slidex.nn import placement as placements
from slidex.nn.classifier import Classifier
from slidex.nn.initial_weights import allocate
from slidex.nn.memory import require_memory
from slidex.nn.selection import make_config_index
from slidex.settings import check_device
from slidex.train.checkpoint import Checkpoint, list_checkpoints, record_files, verify_files, write_atomically
from slidex.train.config import TrainConfig
from slidex.train.kept_ranker import load_ranker
from slidex.train.records import read_header
from slidex.train.tuned import TunedIndex, load_tuned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slidex.data import Dataset
    from slidex.data.vectorizers import Vectorizer
    from slidex.lsh import CandidateIndex
    from slidex.nn.placement import Placement
    from slidex.nn.ranker import LinearRanker

FORMAT, VERSION = "slidex-run", 2
META_FIELDS = {
    "slidex": str,
    "torch": str,
    "config": dict,
    "num_features": int,
    "num_classes": int,
    "data": dict,
    "train_rows": int,
    "files": dict,
}
"""What ``run.json`` must have beside format and version."""


RESUME_MAY_CHANGE = {
    "epochs",
    "max_steps",
    "patience",
    "checkpoint_every",
    "keep_last",
    "report_every",
    "device",
    "threads",
}
"""Settings that a resumed run may have another value of."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory, open for reading. Make one with `Run.create`, read one with `Run.open`."""

    path: Path
    meta: dict[str, Any]

    @classmethod
    def create(cls, path: str | Path, config: TrainConfig, dataset: Dataset) -> Run:
        """Makes the directory: complete, or not at all.

        Raises:
            CheckpointError: if `path` exists and is not an empty directory.
        """
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise CheckpointError(f"{path}: exists already. Give --resume to continue it, or another --out.")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        try:
            meta = cls._write(temporary, config, dataset)
            temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return cls(path, meta)

    @staticmethod
    def _write(path: Path, config: TrainConfig, dataset: Dataset) -> dict[str, Any]:
        (path / "checkpoints").mkdir(parents=True)
        (path / "names").mkdir()
        labels, vectorizer = dataset.path / "labels.jsonl", dataset.path / "vectorizer"
        if labels.is_file():
            shutil.copyfile(labels, path / "names" / labels.name)
        if vectorizer.is_dir():
            shutil.copytree(vectorizer, path / "names" / vectorizer.name)
        np.save(path / "names" / "class_counts.npy", dataset.class_counts())
        meta = {
            "format": FORMAT,
            "version": VERSION,
            "slidex": slidex.__version__,
            "torch": torch.__version__,
            "config": config.to_mapping(),
            "num_features": dataset.num_features,
            "num_classes": dataset.num_classes,
            "data": {"path": str(dataset.path.resolve()), "fingerprint": fingerprint(dataset)},
            "train_rows": dataset.split("train").num_rows,
            "files": record_files(path),
        }
        write_atomically(path / "run.json", json.dumps(meta, indent=1))
        return meta

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Reads ``run.json``.

        Raises:
            CheckpointError: if `path` is no run directory, of another format version, or a file of it was altered.
        """
        path = Path(path)
        file = path / "run.json"
        meta = read_header(file, (FORMAT, VERSION), META_FIELDS)
        if meta is None:
            raise CheckpointError(f"{path}: is no run directory: it has no run.json.")
        verify_files(path, meta["files"])
        return cls(path, meta)

    @property
    def config(self) -> TrainConfig:
        """The settings it was trained with."""
        return TrainConfig.from_mapping(self.meta["config"])

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints live."""
        return self.path / "checkpoints"

    def class_counts(self) -> np.ndarray:
        """Training frequency of every class: int64 (C,)."""
        file = self.path / "names" / "class_counts.npy"
        try:
            return np.load(file, allow_pickle=False)
        except ValueError as error:
            raise CheckpointError(f"{file}: cannot be read: {error}.") from error

    def label_names(self) -> Sequence[str] | None:
        """Name of every class, or None if the data set had none."""
        file = self.path / "names" / "labels.jsonl"
        return NameList(file) if file.is_file() else None

    def vectorizer(self) -> Vectorizer | None:
        """Turns text into features as the data set did, or None if it was not made from text."""
        from slidex.data.vectorizers import load_vectorizer  # noqa: PLC0415  (imports scikit-learn's text module)

        directory = self.path / "names" / "vectorizer"
        return load_vectorizer(directory) if directory.is_dir() else None

    def best(self) -> dict[str, Any] | None:
        """Step and P@1 of the best validation so far, or None.

        Raises:
            CheckpointError: if ``best.json`` is damaged.
        """
        file = self.path / "best.json"
        if not file.is_file():
            return None
        try:
            best = json.loads(file.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{file}: is not valid JSON: {error}.") from error
        if not (isinstance(best, dict) and isinstance(best.get("step"), int) and "P@1" in best):
            raise CheckpointError(f"{file}: must hold a step and its P@1. Got {best!r} instead.")
        return best

    def log(self) -> list[dict[str, Any]]:
        """Reports, validations and checkpoints so far, oldest first; a line cut off by a crash is left out."""
        file = self.path / "log.jsonl"
        events = []
        for line in file.read_bytes().splitlines() if file.is_file() else []:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and "event" in event:
                events.append(event)
        return events

    def checkpoint(self) -> Checkpoint:
        """The checkpoint to use: of the best validation if there was one, else the last.

        Raises:
            CheckpointError: if there is none, or the chosen one fails its checksums.
        """
        found = {checkpoint.step: checkpoint for checkpoint in list_checkpoints(self.checkpoints)}
        if not found:
            raise CheckpointError(f"{self.checkpoints}: holds no complete checkpoint.")
        best = self.best()
        chosen = found[best["step"]] if best and best["step"] in found else found[max(found)]
        chosen.verify()
        return chosen

    def check_sizes(self, dataset: Dataset) -> None:
        """Compares numbers of classes and features.

        Raises:
            DataError: if the data set has others than the model.
        """
        for name, found, trained in (
            ("classes", dataset.num_classes, self.meta["num_classes"]),
            ("features", dataset.num_features, self.meta["num_features"]),
        ):
            if found != trained:
                raise DataError(
                    f"has {found:,} {name}; the run {self.path} was trained on {trained:,}.",
                    path=dataset.path,
                )

    def tuned(self, checkpoint: Checkpoint | None = None) -> TunedIndex | None:
        """The index that was tuned for the weights of a checkpoint, or None if none was tuned.

        Args:
            checkpoint: None takes the one that `checkpoint` chooses.

        Raises:
            CheckpointError: if it is damaged, or was tuned for the weights of another step.
        """
        tuned = load_tuned(self.path)
        if tuned is None:
            return None
        step = (checkpoint or self.checkpoint()).step
        if tuned.step != step:
            raise CheckpointError(
                f"{tuned.path}: was tuned for the weights of step {tuned.step}; the run now uses step {step}. "
                "Run slidex tune-index again, or remove the file."
            )
        return tuned

    def ranker(self, checkpoint: Checkpoint | None = None) -> LinearRanker | None:
        """The linear ranker fitted beside the weights of a checkpoint, or None where the settings ask for none.

        Args:
            checkpoint: None takes the one that `checkpoint` chooses.

        Raises:
            CheckpointError: if it is missing, damaged, or was fitted beside the weights of another step.
        """
        if not self.config.ranker_candidates:
            return None
        step, found = (checkpoint or self.checkpoint()).step, load_ranker(self.path)
        if found is None or found.step != step:
            what = "none yet" if found is None else f"one for step {found.step}"
            raise CheckpointError(
                f"{self.path}: its settings ask for a ranker for the weights of step {step}; there is {what}. "
                "Continue the run with slidex train --resume."
            )
        return found.ranker(self.config, self.class_counts(), self.meta["train_rows"])

    def network(self, checkpoint: Checkpoint | None = None, placement: Placement | None = None) -> Classifier:
        """The trained model, without ranker and with no index built; it cannot go on to train.

        Args:
            checkpoint: As in `model`, with its errors.
            placement: Where it is to work. None is the CPU, where class weights of 16 bits are widened to float32: the
                same numbers.

        Raises:
            DeviceError: The GPU has too little memory for the weights.
        """
        checkpoint, config = checkpoint or self.checkpoint(), self.config
        if placement is None or placement.waits:
            config = replace(config, weight_dtype="float32")
        sizes = self.meta["num_features"], self.meta["num_classes"], self.class_counts()
        model = Classifier.from_config(config, *sizes, device="meta")
        device = torch.device("cpu") if placement is None else placement.device
        weights = sum(p.nbytes for part in (model.encoder, model.head) for p in part.parameters())
        require_memory({"weights": weights}, device, "Use another GPU, or the CPU.")
        for name, module in (("encoder", model.encoder), ("head", model.head)):
            allocate(module, device)  # of which the checkpoint fills all, or is refused
            try:
                module.load_state_dict(checkpoint.tensors(name))
            except RuntimeError as error:
                raise CheckpointError(
                    f"{checkpoint.path / name}.safetensors: does not fit run.json: {error}"
                ) from error
        if placement is not None:
            model.place(placement)
        return model

    def model(
        self, checkpoint: Checkpoint | None = None, *, indexed: bool = False, device: str = "cpu"
    ) -> Classifier:
        """The trained model, with its ranker, which stays on the CPU, where it has one.

        Args:
            checkpoint: Whose weights; None takes the one that `checkpoint` chooses.
            device: Where it is to score: ``cpu``, ``cuda`` or ``cuda:N``, whatever it was trained on. Class weights
                trained in bfloat16 stay so on a GPU and are widened to float32 on the CPU: the same numbers.
            indexed: Also build an index over these weights: the one that `tuned` gives, else that of training. The
                one in the checkpoint is older than the weights: it is there so that a resumed run takes the very
                steps an unbroken one would, and for what the index has learned from hidden vectors.

        Raises:
            CheckpointError: as `checkpoint`, `ranker` and `tuned`, or if the weights do not fit ``run.json``.
            ConfigError: if `indexed` is asked of a model that was trained without an index, and none was tuned; or of
                one whose index does not work on the device.
            DeviceError: if the device cannot be used.
            MissingExtraError: if packages for it are not installed.
        """
        check_device(device)
        placement = placements.place(torch.device(device))
        checkpoint = checkpoint or self.checkpoint()
        model = replace(self.network(checkpoint, placement), ranker=self.ranker(checkpoint))
        if not indexed:
            return model
        if tuned := self.tuned(checkpoint):
            return replace(
                model,
                index=tuned.build(model.head.weight, model.head.bias),
                candidates=tuned.candidates,
                partition_classes=tuned.partition_classes,
            )
        return replace(model, index=self._trained_index(model, checkpoint))

    def _trained_index(self, model: Classifier, checkpoint: Checkpoint) -> CandidateIndex:
        """The index of the training, built over the model's weights, with what it has learned."""
        index = model.index
        if index is None:
            raise ConfigError(
                f"{self.path}: was trained without an index; use exact scoring, or run slidex tune-index first."
            )
        if index.uses_queries and checkpoint.processes > 1:
            raise ConfigError(
                f"{self.path}: what its index learned is in {checkpoint.processes} parts, of the processes that "
                "trained it, and cannot be joined; use exact scoring, or run slidex tune-index."
            )
        if index.uses_queries:  # what it learned from hidden vectors is in the checkpoint alone
            try:
                index.load_state(checkpoint.tensors("index"), model.head.weight, model.head.bias)
            except ConfigError as error:
                raise CheckpointError(
                    f"{checkpoint.path / 'index'}.safetensors: does not fit run.json: {error}"
                ) from error
        elif own := make_config_index(self.config, index.in_features, index.num_classes):
            index = own  # with as many tables as single rows need
        index.build(model.head.weight, model.head.bias)
        return index


def fingerprint(dataset: Dataset) -> str:
    """A checksum over the data set's own checksums."""
    text = json.dumps(dataset.meta["files"], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def check_same_run(run: Run, dataset: Dataset, config: TrainConfig) -> None:
    """CheckpointError if the run was made from other data or with other settings."""
    if run.meta["data"]["fingerprint"] != fingerprint(dataset):
        raise CheckpointError(f"{run.path}: was trained on another data set ({run.meta['data']['path']}).")
    old, new = run.config.to_mapping(), config.to_mapping()
    for name in old.keys() | new.keys():
        if name not in RESUME_MAY_CHANGE and old.get(name) != new.get(name):
            raise CheckpointError(
                f"{run.path}: cannot be resumed with {name} = {new.get(name)!r}; the run has {old.get(name)!r}."
            )
