"""JSON files of a run directory that say what else lies there, and the tensors beside them.

A record has a format, a version and a checksum of its own, and names its tensor files with size and checksum. It is
written last and atomically, so that readers see the old one or the new, whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import slidex
from slidex.errors import CheckpointError
from slidex.train.checkpoint import record_files, sync, verify_files, write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    Kinds = Mapping[str, type]


def write_record(
    file: Path,
    kind: tuple[str, int],
    body: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes `body` to `file` and the tensors beside it, in place of what an earlier call wrote.

    Args:
        file: In a folder that holds nothing else; made if need be.
        kind: Format and version.
        body: Plain values.
        tensors: Named; None or none for no file of tensors.

    Raises:
        CheckpointError: It cannot be written; what was there before is then still there.
    """
    folder = file.parent
    try:
        folder.mkdir(exist_ok=True)
        files = _save_tensors(folder, tensors) if tensors else {}
        whole = {"format": kind[0], "version": kind[1], "slidex": slidex.__version__, **body, "files": files}
        write_atomically(file, json.dumps(whole | {"checksum": _digest(whole)}, indent=1))
        sync(folder)
    except (OSError, SafetensorError) as error:  # a full disk is the second in safetensors
        raise CheckpointError(f"{folder}: cannot be written: {error}.") from error
    for old in folder.glob("state_*.safetensors"):
        if old.name not in files:
            old.unlink(missing_ok=True)


def read_record(file: Path, kind: tuple[str, int], fields: Kinds) -> dict[str, Any] | None:
    """What `write_record` wrote, checked, with ``files``; None if there is no such file.

    Raises:
        CheckpointError: It is damaged, of another version, or a file that it names is missing or altered.
    """
    body = read_header(file, kind, {})
    if body is None:
        return None
    checksum = body.pop("checksum", None)
    if checksum != _digest(body):
        raise CheckpointError(f"{file}: its checksum is not the one recorded: it was altered.")
    check_fields(file, body, {**fields, "files": dict})
    if any("/" in name or os.sep in name for name in body["files"]):
        raise CheckpointError(f"{file}: its 'files' must lie beside it. Got {list(body['files'])} instead.")
    verify_files(file.parent, body["files"])
    return {name: body[name] for name in (*fields, "files")}


def read_header(file: Path, kind: tuple[str, int], fields: Kinds) -> dict[str, Any] | None:
    """A JSON file of this format and version that has these fields; None if there is no such file.

    Raises:
        CheckpointError: It is damaged, or of another format or version.
    """
    try:
        body = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}.") from error
    if not isinstance(body, dict) or body.get("format") != kind[0]:
        raise CheckpointError(f"{file}: its 'format' must be {kind[0]!r}.")
    if body.get("version") != kind[1]:
        raise CheckpointError(
            f"{file}: is of version {body.get('version')}; this slidex ({slidex.__version__}) reads {kind[1]}."
        )
    check_fields(file, body, fields)
    return body


def check_fields(file: Path, body: Mapping[str, Any], fields: Kinds) -> None:
    """CheckpointError if a field is missing or of another type."""
    for name, kind in fields.items():
        if not isinstance(body.get(name), kind):
            raise CheckpointError(f"{file}: its {name!r} is missing or damaged.")


def load_tensors(file: Path, files: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors beside a record that has passed `read_record`.

    Raises:
        CheckpointError: They cannot be read.
    """
    path = file.parent / next(iter(files))
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: does not fit {file}: {error}.") from error


def _save_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """Writes the tensors under a name made of their checksum, so that an earlier file is never overwritten."""
    temporary = folder / f".tmp-{os.getpid()}"
    temporary.mkdir()
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary / "state")
        record = record_files(temporary)["state"]
        name = f"state_{record['blake2b'][:8]}.safetensors"
        sync(temporary / "state")
        (temporary / "state").replace(folder / name)
    finally:
        shutil.rmtree(temporary)
    sync(folder)
    return {name: record}


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
