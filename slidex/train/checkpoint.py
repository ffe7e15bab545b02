"""Checkpoints that are complete or invisible, and never execute code when read.

A checkpoint is a directory: tensors in safetensors files, everything else in ``state.json``, and a ``MANIFEST.json``
with the size and checksum of each. It is written under a temporary name, synced to disk, and renamed.

Where several processes have each a part of the classes, each writes files of its own, ``head-00001-of-00003`` for
``head``, with its rows of every tensor; the parts are in the order of classes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from slidex.errors import CheckpointError
from slidex.train.distributed import Solo

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

MANIFEST = "MANIFEST.json"
STATE = "state.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory written by `save_checkpoint`."""

    path: Path

    @property
    def step(self) -> int:
        """The training step it was taken after."""
        return int(self.path.name.removeprefix("step_"))

    def verify(self) -> None:
        """Compares every file with the manifest.

        Raises:
            CheckpointError: naming the first file that is missing, or of another size or checksum.
        """
        verify_files(self.path, self._manifest())

    def state(self) -> dict[str, Any]:
        """The JSON values saved with it."""
        return json.loads((self.path / STATE).read_text(encoding="utf-8"))

    @property
    def processes(self) -> int:
        """How many processes wrote it, each its part of the classes."""
        return len(self._parts("head"))

    def tensors(self, name: str, prefixes: tuple[str, ...] = ("",)) -> dict[str, torch.Tensor]:
        """The tensors saved under `name` whose own names begin with one of the prefixes; parts are put together."""
        found: dict[str, list[torch.Tensor]] = {}
        whole, parts = self.path / f"{name}.safetensors", self._parts(name)
        for file in parts if whole in parts or not whole.is_file() else [whole, *parts]:
            with _opened(file) as stored:
                for key in stored.keys():  # noqa: SIM118  (it is no dictionary)
                    if key.startswith(prefixes):
                        found.setdefault(key, []).append(stored.get_tensor(key))
        return {key: pieces[0] if len(pieces) == 1 else torch.cat(pieces) for key, pieces in found.items()}

    def rows(self, name: str, keys: Sequence[str], begin: int, end: int) -> dict[str, torch.Tensor]:
        """The rows of some classes of the tensors saved under `name`; of each no more is read.

        Args:
            name: Of tensors with a row for each class.
            keys: Names of tensors; one without any rows comes back as it is.
            begin: First class.
            end: One past the last; what lies beyond the tensor's end is left out.
        """
        found: dict[str, list[torch.Tensor]] = {key: [] for key in keys}
        passed = dict.fromkeys(keys, 0)
        for file in self._parts(name):
            with _opened(file) as stored:
                for key in keys:
                    rows = stored.get_slice(key)
                    first, count = passed[key], rows.get_shape()[0]
                    low, high = max(begin - first, 0), min(end - first, count)
                    if low < high:
                        found[key].append(rows[low:high])
                    elif not found[key] and count == 0:
                        found[key].append(stored.get_tensor(key))
                    passed[key] += count
        return {key: pieces[0] if len(pieces) == 1 else torch.cat(pieces) for key, pieces in found.items()}

    def _parts(self, name: str) -> list[Path]:
        """The files with rows of classes, in the order of classes."""
        parts = sorted(self.path.glob(f"{name}-?????-of-?????.safetensors"))
        return parts or [self.path / f"{name}.safetensors"]

    def _manifest(self) -> dict[str, dict[str, Any]]:
        try:
            manifest = json.loads((self.path / MANIFEST).read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path / MANIFEST}: cannot be read: {error}.") from error
        if not isinstance(manifest, dict):
            raise CheckpointError(f"{self.path / MANIFEST}: must be a JSON object. Got {manifest!r} instead.")
        return manifest


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as stored:
            yield stored
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}.") from error


def part_name(name: str, processes: Solo) -> str:
    """What a process calls its part of `name`."""
    return name if processes.size == 1 else f"{name}-{processes.rank + 1:05}-of-{processes.size:05}"


def save_checkpoint(
    directory: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    processes: Solo | None = None,
) -> Checkpoint:
    """Writes ``directory/step_NNNNNNNN``.

    Args:
        directory: Where checkpoints live; made if it does not exist.
        step: The training step, part of the name.
        tensors: Name of a safetensors file to its tensors; every process gives its own files.
        state: JSON values; those of process 0 are saved.
        processes: Which write it together; None is this one alone.

    Raises:
        CheckpointError: if there is no room on the disk or it cannot be written; nothing is left behind.
    """
    ranks = processes or Solo()
    final = directory / f"step_{step:08d}"
    (needed,) = ranks.totals(sum(t.nbytes for group in tensors.values() for t in group.values()))

    temporary = None
    try:
        temporary = directory / ranks.on_main(lambda: _begin(final, int(needed)))
        target = temporary
        written = ranks.everywhere(lambda: _write_tensors(final, target, tensors))
        ranks.on_main(lambda: _finish(final, target, state, written))
    finally:
        if ranks.main and temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return Checkpoint(final)


def _begin(final: Path, needed: int) -> str:
    """Makes the temporary directory, if there is room on the disk; its name."""
    directory = final.parent
    with _failing_as_checkpoint_error(final):
        directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free
        if needed * 1.01 > free:
            raise CheckpointError(
                f"{directory}: a checkpoint needs {needed:,} bytes, the disk has {free:,} left."
            )
        temporary = directory / f".tmp-{final.name}-{os.getpid()}"
        temporary.mkdir()
    return temporary.name


def _write_tensors(
    final: Path, temporary: Path, tensors: Mapping[str, Mapping[str, torch.Tensor]]
) -> dict[str, dict[str, Any]]:
    """Writes and syncs one process's files; what the manifest will say of them."""
    files = [temporary / f"{name}.safetensors" for name in tensors]
    with _failing_as_checkpoint_error(final):
        for file, group in zip(files, tensors.values(), strict=True):
            save_file(dict(group), file)
            sync(file)
        return record_files(temporary, files)


def _finish(
    final: Path, temporary: Path, state: Mapping[str, Any], written: Sequence[dict[str, dict[str, Any]]]
) -> None:
    """Adds the values and the manifest, and makes the checkpoint visible."""
    state_file, manifest_file = temporary / STATE, temporary / MANIFEST
    with _failing_as_checkpoint_error(final):
        state_file.write_text(json.dumps(state, indent=1), encoding="utf-8")
        manifest = record_files(temporary, [state_file])
        for files in written:
            manifest |= files
        manifest_file.write_text(json.dumps(dict(sorted(manifest.items())), indent=1), encoding="utf-8")
        for path in (state_file, manifest_file, temporary):
            sync(path)
        temporary.rename(final)
        sync(final.parent)


@contextmanager
def _failing_as_checkpoint_error(final: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # a full disk is the second in safetensors
        raise CheckpointError(f"{final}: cannot be written: {error}.") from error


def list_checkpoints(directory: Path) -> list[Checkpoint]:
    """Complete checkpoints in `directory`, oldest first."""
    found = [Checkpoint(path) for path in directory.glob("step_*") if path.name[5:].isdecimal()]
    complete = [checkpoint for checkpoint in found if (checkpoint.path / MANIFEST).is_file()]
    return sorted(complete, key=lambda checkpoint: checkpoint.step)


def prune_checkpoints(directory: Path, keep_last: int, keep_step: int | None) -> None:
    """Removes all but the newest `keep_last` and the one taken at `keep_step`; also what a killed run left."""
    for checkpoint in list_checkpoints(directory)[:-keep_last]:
        if checkpoint.step != keep_step:  # invisible at once: a kill must not leave half of it under its name
            checkpoint.path.rename(directory / f".tmp-pruned-{checkpoint.path.name}")
    for leftover in directory.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def write_atomically(file: Path, text: str) -> None:
    """Replaces a small text file: readers see the old text or the new, never a part."""
    temporary = file.with_name(f".tmp-{file.name}-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.rename(file)


def sync(path: Path) -> None:
    """Flushes a file or a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def record_files(directory: Path, files: Sequence[Path] | None = None) -> dict[str, dict[str, Any]]:
    """Size and checksum of files below `directory`, by relative name; of all unless some are given."""
    if files is None:
        files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        file.relative_to(directory).as_posix(): {"bytes": file.stat().st_size, "blake2b": _checksum(file)}
        for file in files
    }


def verify_files(directory: Path, recorded: Mapping[str, Mapping[str, Any]]) -> None:
    """Compares files with what `record_files` said of them.

    Raises:
        CheckpointError: naming the first file that is missing, or of another size or checksum, or not recorded as
            `record_files` does.
    """
    for name, expected in recorded.items():
        file = directory / name
        if not (
            isinstance(expected, dict) and isinstance(expected.get("bytes"), int) and "blake2b" in expected
        ):
            raise CheckpointError(f"{file}: is recorded as {expected!r}; expected bytes and blake2b.")
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing; it should have {expected['bytes']:,} bytes.")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{file}: has {size:,} bytes; it should have {expected['bytes']:,}.")
        if _checksum(file) != expected["blake2b"]:
            raise CheckpointError(f"{file}: its checksum is not the one recorded: it was altered.")


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
