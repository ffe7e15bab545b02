"""A checkpoint is complete or invisible, and an altered one is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from slidex.errors import CheckpointError
from slidex.train import checkpoint as module
from slidex.train.checkpoint import list_checkpoints, prune_checkpoints, save_checkpoint

TENSORS = {
    "head": {"weight": torch.arange(6.0).view(2, 3)},
    "progress": {"seen": torch.tensor([True, False])},
}


def test_round_trip(tmp_path):
    saved = save_checkpoint(tmp_path, 7, TENSORS, {"step": 7})
    saved.verify()
    assert saved.path.name == "step_00000007"
    assert saved.step == 7
    assert saved.state() == {"step": 7}
    assert torch.equal(saved.tensors("head")["weight"], TENSORS["head"]["weight"])
    assert torch.equal(saved.tensors("progress")["seen"], TENSORS["progress"]["seen"])
    assert [c.step for c in list_checkpoints(tmp_path)] == [7]


@pytest.mark.parametrize("name", ["head.safetensors", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found_and_named(tmp_path, name, damage):
    saved = save_checkpoint(tmp_path, 1, TENSORS, {"step": 1})
    file = saved.path / name
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 0x15
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(data[:-3])
    else:
        file.unlink()
    with pytest.raises(CheckpointError, match="step_00000001"):
        saved.verify()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("save_file", OSError(28, "No space left on device")),
        ("save_file", SafetensorError("I/O error: No space left on device")),
        ("sync", OSError(28, "No space left on device")),
        ("record_files", OSError(28, "No space left on device")),
    ],
    ids=repr,
)
@pytest.mark.parametrize("nth", [1, 2])
def test_a_failing_disk_leaves_nothing_behind(tmp_path, monkeypatch, call, error, nth):
    real, calls = getattr(module, call), []

    def failing(*args):
        calls.append(args)
        if len(calls) == nth:
            raise error
        return real(*args)

    save_checkpoint(tmp_path, 1, TENSORS, {"step": 1})
    monkeypatch.setattr(module, call, failing)
    if call == "record_files" and nth == 2:
        monkeypatch.setattr(Path, "rename", lambda *_: failing(tmp_path) and failing(tmp_path))
    with pytest.raises(CheckpointError, match=r"step_00000002: cannot be written.*No space"):
        save_checkpoint(tmp_path, 2, TENSORS, {"step": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    list_checkpoints(tmp_path)[0].verify()


def test_no_room_is_said_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(CheckpointError, match="needs 26 bytes, the disk has 10 left"):
        save_checkpoint(tmp_path, 1, TENSORS, {})


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, TENSORS, {"step": step})
    (tmp_path / ".tmp-step_00000009-1").mkdir()
    prune_checkpoints(tmp_path, keep_last=2, keep_step=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000004", "step_00000005"]


def test_nothing_is_unpickled(tmp_path):
    saved = save_checkpoint(tmp_path, 1, TENSORS, {})
    file = saved.path / "head.safetensors"
    torch.save({"weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="cannot be read"):
        saved.tensors("head")
    manifest = json.loads((saved.path / "MANIFEST.json").read_text())
    assert set(manifest) == {"head.safetensors", "progress.safetensors", "state.json"}
    assert np.isfinite(manifest["state.json"]["bytes"])
