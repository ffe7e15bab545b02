"""Checkpoints that are complete or invisible, and never execute code when read.

A checkpoint is a directory: tensors in safetensors files, everything else in ``state.json``, and a ``MANIFEST.json``
with the size and checksum of each. It is written under a temporary name, synced to disk, and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from slidex.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

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

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors saved under `name`."""
        file = self.path / f"{name}.safetensors"
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be read: {error}.") from error

    def _manifest(self) -> dict[str, dict[str, Any]]:
        try:
            manifest = json.loads((self.path / MANIFEST).read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path / MANIFEST}: cannot be read: {error}.") from error
        if not isinstance(manifest, dict):
            raise CheckpointError(f"{self.path / MANIFEST}: must be a JSON object. Got {manifest!r} instead.")
        return manifest


def save_checkpoint(
    directory: Path, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any]
) -> Checkpoint:
    """Writes ``directory/step_NNNNNNNN``.

    Args:
        directory: Where checkpoints live; made if it does not exist.
        step: The training step, part of the name.
        tensors: Name of a safetensors file to its tensors.
        state: JSON values.

    Raises:
        CheckpointError: if there is no room on the disk or it cannot be written; nothing is left behind.
    """
    final = directory / f"step_{step:08d}"
    directory.mkdir(parents=True, exist_ok=True)
    needed = sum(t.nbytes for group in tensors.values() for t in group.values())
    free = shutil.disk_usage(directory).free
    if needed * 1.01 > free:
        raise CheckpointError(
            f"{directory}: a checkpoint needs {needed:,} bytes, the disk has {free:,} left."
        )
    temporary = directory / f".tmp-{final.name}-{os.getpid()}"
    try:
        temporary.mkdir()
        for name, group in tensors.items():
            save_file(dict(group), temporary / f"{name}.safetensors")
        (temporary / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        manifest = record_files(temporary)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        temporary.rename(final)
        sync(directory)
    except OSError as error:
        raise CheckpointError(f"{final}: cannot be written: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Checkpoint(final)


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


def record_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of every file below `directory`, by relative name."""
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
