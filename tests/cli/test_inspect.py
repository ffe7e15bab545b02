"""`slidex inspect` and `doctor`, and damaged runs and data sets: each named in one clear line."""

from __future__ import annotations

import json
import shutil

import pytest

from slidex.train.checkpoint import list_checkpoints


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the trained run that a test may damage."""
    return shutil.copytree(trained, tmp_path / "run")


def first_checkpoint(run):
    return list_checkpoints(run / "checkpoints")[-1].path


@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b"\xff", b'{"step": "x"}'])
@pytest.mark.parametrize("name", ["run.json", "best.json", "MANIFEST.json", "state.json"])
def test_damaged_json_of_a_run(invoke, easy_data, run, name, content):
    folder = run if name in {"run.json", "best.json"} else first_checkpoint(run)
    best = json.loads((run / "best.json").read_text())
    (run / "best.json").write_text(
        json.dumps(best | {"step": list_checkpoints(run / "checkpoints")[-1].step})
    )
    (folder / name).write_bytes(content)
    result = invoke("eval", run, easy_data.path, code=1)
    assert name in result.stderr or str(folder) in result.stderr
    assert result.stdout == ""
    result = invoke("inspect", run, "--verify", code=1)
    assert name in result.stderr or str(folder) in result.stderr


def test_run_json_without_a_field(invoke, run):
    meta = json.loads((run / "run.json").read_text())
    for name in ("config", "files", "num_classes"):
        (run / "run.json").write_text(json.dumps({key: value for key, value in meta.items() if key != name}))
        assert f"its '{name}' is missing or damaged" in invoke("inspect", run, code=1).stderr


def test_a_damaged_log_is_read_over(invoke, run):
    with (run / "log.jsonl").open("ab") as log:
        log.write(b'3\n[]\n{"event": "rep\xff')
    assert "last report" in invoke("inspect", run).stdout


@pytest.mark.parametrize("name", ["head.safetensors", "encoder.safetensors"])
def test_altered_weights(invoke, easy_data, run, name):
    best = json.loads((run / "best.json").read_text())["step"]
    file = run / "checkpoints" / f"step_{best:08d}" / name
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    for words in (
        ("eval", run, easy_data.path),
        ("predict", run, easy_data.path),
        ("inspect", run, "--verify"),
    ):
        result = invoke(*words, code=1)
        assert f"{name}: its checksum is not the one recorded: it was altered." in result.stderr
    file.unlink()
    assert f"{name}: is missing" in invoke("eval", run, easy_data.path, code=1).stderr


def test_a_run_without_checkpoints(invoke, easy_data, run):
    shutil.rmtree(run / "checkpoints")
    assert "holds no complete checkpoint" in invoke("eval", run, easy_data.path, code=1).stderr


def test_inspect_a_data_set(invoke, easy_data, tmp_path):
    text = invoke("inspect", easy_data.path).stdout
    assert "rows 1,200" in text
    facts = json.loads(invoke("inspect", easy_data.path, "--json", "--verify").stdout)
    assert (facts["classes"], facts["features"], facts["checksums"]) == (300, 320, "verified")
    copy = shutil.copytree(easy_data.path, tmp_path / "data")
    file = copy / "train" / "x_indices.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "x_indices.npy: expected blake2b" in invoke("inspect", copy, "--verify", code=3).stderr
    file.unlink()
    assert "x_indices.npy: expected a file named in meta.json" in invoke("inspect", copy, code=3).stderr


def test_inspect_a_run(invoke, trained):
    text = invoke("inspect", trained).stdout
    assert "hidden_width           32" in text
    facts = json.loads(invoke("inspect", trained, "--json", "--verify").stdout)
    assert facts["settings"]["mode"] == "shared"
    assert facts["best validation"]["P@1"] > 0.9
    assert "index_recall" in facts["last report"]  # None where probing had taken its share of so short a run


def test_inspect_anything_else(invoke, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file"):
        assert "is neither a data set" in invoke("inspect", path, code=3).stderr
    assert "does not exist" in invoke("inspect", tmp_path / "nothing", code=3).stderr


def test_doctor(invoke):
    facts = json.loads(invoke("doctor", "--classes", 1000000, "--width", 64, "--batch", 32, "--json").stdout)
    assert "plan" in facts
    text = invoke("doctor", "--classes", 1000000).stdout
    assert "plan for 1,000,000 classes, width 128, batch 256" in text
    less = json.loads(
        invoke("doctor", "--classes", 1000000, "--optimizer", "rowwise_adagrad", "--json").stdout
    )
    full = json.loads(invoke("doctor", "--classes", 1000000, "--json").stdout)
    state = [found["plan"]["costs"]["shared"]["optimizer_bytes"] for found in (less, full)]
    assert 0 < state[0] < state[1] / 100
    assert "threads numba layer" in invoke("doctor").stdout
    assert "not in the range" in invoke("doctor", "--classes", 0, code=2).stderr
