"""Two and three processes train what one does; a checkpoint of any number of them goes on with any other number."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import slidex
from slidex.errors import CheckpointError, ConfigError
from slidex.train.checkpoint import Checkpoint, list_checkpoints
from slidex.train.config import TrainConfig

if TYPE_CHECKING:
    from slidex.data import Dataset

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("distributed_worker.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
EXACT: dict[str, Any] = {
    "mode": "exact", "hidden_width": 16, "dense_widths": [12], "input_dropout": 0.2, "hidden_dropout": 0.2,
    "batch_size": 47, "max_steps": 8, "checkpoint_every": 4, "keep_last": 9, "learning_rate": 0.01,
    "lr_schedule": "constant", "precision": "float32", "threads": 1, "report_every": 3,
}  # fmt: skip
SAMPLED = EXACT | {"index_options": {"bits": 3, "tables": 6}, "rehash_every": 3, "correction": "stratified"}
SHARED = SAMPLED | {"mode": "shared", "pool_size": 41}
LEARNED = SHARED | {"index": "learned", "index_options": {}, "index_sample": 200, "rehash": "fixed"}
UPDATES = SHARED | {"batch_size": 4, "pool_size": 5, "rehash": "fixed", "rehash_every": 1}
PER_SAMPLE = SAMPLED | {
    "mode": "per_sample", "active_size": 31, "rehash": "drift", "rehash_drift": 0.01, "loss": "logistic",
    "optimizer": "rowwise_adagrad", "dense_widths": [],
}  # fmt: skip
STEP_8 = "step_00000008"


def together(
    size: int, folder: Path, data: Dataset, jobs: list[tuple[str, dict[str, Any], bool]]
) -> list[str]:
    """Runs jobs in `size` processes; what each printed."""
    words = [
        str(folder / f"store-{size}"),
        str(data.path),
        json.dumps([[str(folder / n), s, r] for n, s, r in jobs]),
    ]
    workers = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), str(size), *words],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    outputs = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * size, "\n".join(error for _, error in outputs)
    return [output for output, _ in outputs]


def start_from(folder: Path, name: str, source: str) -> None:
    """A copy of a run that has nothing after its checkpoint of step 4."""
    shutil.copytree(folder / source, folder / name)
    for checkpoint in list_checkpoints(folder / name / "checkpoints"):
        if checkpoint.step > 4:
            shutil.rmtree(checkpoint.path)


@pytest.fixture(scope="module")
def runs(easy_data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one, two and three processes, by name."""
    folder = tmp_path_factory.mktemp("runs")
    slidex.fit(easy_data, folder / "one", TrainConfig.from_mapping(EXACT))
    start_from(folder, "one-two", "one")
    start_from(folder, "one-three", "one")
    even = EXACT | {"batch_size": 6, "max_steps": 1}
    jobs = [("two", EXACT, False), ("one-two", EXACT, True), ("even", even, False)]
    jobs += [("ranked", SHARED | {"ranker_candidates": 20}, False)]
    sampled = {"shared": SHARED, "updates": UPDATES, "per_sample": PER_SAMPLE, "learned": LEARNED}
    for name, settings in sampled.items():
        jobs += [(name, settings, False), (f"{name}-parts", settings | {"signal_after": 4}, False)]
        jobs += [(f"{name}-parts", settings, True)]
    (folder / "printed-two").write_text("".join(together(2, folder, easy_data, jobs)))
    start_from(folder, "two-three", "two")
    start_from(folder, "shared-three", "shared")
    few = EXACT | {"batch_size": 2, "max_steps": 3, "dense_widths": [12]}  # one process has no rows
    stopped = EXACT | {"patience": 1, "valid_every": 1, "learning_rate": 0.0, "max_steps": 6}
    slidex.fit(easy_data, folder / "few-one", TrainConfig.from_mapping(few))
    jobs = [
        ("even-three", even, False),
        ("three", EXACT, False),
        ("one-three", EXACT, True),
        ("two-three", EXACT, True),
    ]
    jobs += [("shared-three", SHARED, True), ("few", few, False), ("stopped", stopped, False)]
    jobs += [("three", EXACT, False), ("none", SHARED | {"pool_size": 2}, False)]
    (folder / "printed-three").write_text("".join(together(3, folder, easy_data, jobs)))
    for name in ("two", "three"):
        start_from(folder, f"{name}-one", name)
        slidex.fit(easy_data, folder / f"{name}-one", TrainConfig.from_mapping(EXACT), resume=True)
    return folder


def state_of(folder: Path, name: str, step: str = STEP_8) -> dict[str, torch.Tensor]:
    """Weights and optimiser state."""
    checkpoint = Checkpoint(folder / name / "checkpoints" / step)
    checkpoint.verify()
    groups = {group: checkpoint.tensors(group) for group in ("encoder", "head", "optimizer")}
    return {f"{group}.{key}": tensor for group, tensors in groups.items() for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    "name", ["two", "three", "one-two", "one-three", "two-three", "two-one", "three-one"]
)
def test_exact_mode_ends_as_one_process_does(runs: Path, name: str) -> None:
    expected, got = state_of(runs, "one"), state_of(runs, name)
    assert expected.keys() == got.keys()
    for key, tensor in expected.items():
        assert tensor.shape == got[key].shape, key
        assert float((tensor - got[key]).abs().max()) <= 1e-6, key
    losses = [
        [event["loss"] for event in slidex.Run.open(runs / run).log() if event["event"] == "report"]
        for run in ("one", name)
    ]
    assert losses[0][-1] == pytest.approx(losses[1][-1], abs=1e-6)


def test_one_process_fits_the_ranker_of_the_whole_layer(runs: Path, easy_data: Dataset) -> None:
    run = slidex.Run.open(runs / "ranked")
    assert len(run.ranker().weights.bias) == easy_data.num_classes
    plain, ranked = (
        slidex.evaluate(slidex.Run.open(runs / name), easy_data)["P@1"] for name in ("shared", "ranked")
    )
    assert ranked > plain


def test_a_batch_of_fewer_rows_than_processes(runs: Path) -> None:
    expected, got = (state_of(runs, name, "step_00000003") for name in ("few-one", "few"))
    for key, tensor in expected.items():
        assert float((tensor - got[key]).abs().max()) <= 1e-6, key


@pytest.mark.parametrize("name", ["shared", "updates", "per_sample", "learned"])
def test_stopped_by_a_signal_in_one_process_and_resumed_equals_unbroken(runs: Path, name: str) -> None:
    assert "InterruptedRunError: stopped by SIGTERM after step 4" in (runs / "printed-two").read_text()
    whole, parts = (Checkpoint(runs / run / "checkpoints" / STEP_8) for run in (name, f"{name}-parts"))
    files = sorted(file.name for file in whole.path.glob("*.safetensors"))
    assert {"encoder.safetensors", "index-00001-of-00002.safetensors", "index-00002-of-00002.safetensors"} < {
        *files
    }
    for file in files:
        expected, got = whole.tensors(Path(file).stem), parts.tensors(Path(file).stem)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[key], got[key]) for key in expected), file
    assert whole.state()["rehash"] == parts.state()["rehash"]
    assert len(whole.state()["rehash"]) == 2
    if name == "updates":  # each process counts its own
        first, second = whole.state()["rehash"]
        assert 0 < first["updated_rows"] != second["updated_rows"] > 0


def test_each_process_writes_its_rows_and_only_those_are_read(runs: Path) -> None:
    checkpoint = Checkpoint(runs / "three" / "checkpoints" / STEP_8)
    assert checkpoint.processes == 3
    weight_CD = checkpoint.tensors("head")["weight"]
    assert weight_CD.shape == (300, 12)
    for part in range(3):
        own = checkpoint.tensors(f"head-{part + 1:05}-of-00003")["weight"]
        assert torch.equal(own, weight_CD[100 * part : 100 * part + 100])
    for begin, end in ((0, 300), (0, 1), (99, 101), (150, 300), (200, 200)):
        rows = checkpoint.rows("head", ("weight", "bias"), begin, end) if begin < end else {}
        assert all(torch.equal(rows[key], checkpoint.tensors("head")[key][begin:end]) for key in rows)


def test_sampled_modes_log_what_all_processes_do(runs: Path) -> None:
    # Of the 31 that a row asks for, the index gives less; one process alone would have 18 at most.
    for name, least, most in (("shared", 41, 41 + 2 * 47), ("per_sample", 20, 31 + 2)):
        report = next(e for e in slidex.Run.open(runs / name).log() if e["event"] == "report")
        assert least < report["active_classes"] <= most
        assert report["rows_rehashed"] == 300
        assert 0 < report["index_recall"] <= 1
        assert 0 < report["classes_seen"] <= 1
        assert report["time_share"]["exchange"] > 0
        steps = [e["step"] for e in slidex.Run.open(runs / name).log() if e["event"] == "report"]
        assert steps == [3, 6, 8]  # once, not once for each process


def test_another_number_of_processes_builds_the_index_anew(runs: Path, easy_data: Dataset) -> None:
    run = slidex.Run.open(runs / "shared-three")
    newest = list_checkpoints(run.checkpoints)[-1]
    assert (newest.step, newest.processes) == (8, 3)
    assert len(newest.state()["rehash"]) == 3
    assert slidex.evaluate(run, easy_data, indexed=True)["scoring"] == "index"


def test_all_processes_stop_early_together(runs: Path) -> None:
    validations = [e for e in slidex.Run.open(runs / "stopped").log() if e["event"] == "validation"]
    assert [e["step"] for e in validations] == [1, 2]


def test_what_fails_in_one_process_fails_in_all(runs: Path) -> None:
    said = (runs / "printed-three").read_text()
    assert said.count("three: exists already.") == 3
    assert said.count("in process 0 of 3: ") == 2
    assert said.count("The 'pool_size' setting must be at least 3") == 3
    assert not (runs / "none").exists()


def test_what_an_index_learned_in_parts_is_no_whole(runs: Path) -> None:
    run = slidex.Run.open(runs / "learned")
    assert run.model().head.weight.shape == (300, 12)
    with pytest.raises(ConfigError, match="is in 2 parts"):
        run.model(indexed=True)


def test_a_damaged_part_is_named(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "three", tmp_path / "run")
    run = slidex.Run.open(tmp_path / "run")
    file = list_checkpoints(run.checkpoints)[-1].path / "head-00002-of-00003.safetensors"
    file.unlink()
    with pytest.raises(CheckpointError, match=r"head-00002-of-00003\.safetensors: is missing"):
        run.checkpoint()


def test_a_killed_process_ends_the_job_and_what_was_saved_goes_on(easy_data: Dataset, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def train(size: int, *words: str) -> subprocess.Popen[str]:
        settings = ["--mode", "shared", "--pool-size", "40", "--batch-size", "64", "--epochs", "100"]
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(size),
        ]
        return subprocess.Popen(
            [*launcher, "-m", "slidex", "train", easy_data.path, "--out", run, *settings, *words],
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
        )

    def steps() -> list[int]:
        return [checkpoint.step for checkpoint in list_checkpoints(run / "checkpoints")]

    job = train(3, "--checkpoint-every", "2")
    while len(steps()) < 2:
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.01)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    assert len(children) == 3
    os.kill(int(children[2]), 9)
    started = time.monotonic()
    said = job.communicate(timeout=60)[1]
    assert time.monotonic() - started < 60
    assert job.returncode != 0
    assert "lost its connection to the others" in said
    assert "Continue with the same command and --resume, on any number of processes." in said
    assert "Error: " in said
    saved = steps()[-1]
    assert f"resumed from step_{saved:08d}" in resumed_by(train(2, "--resume", "--max-steps", str(saved + 2)))
    assert steps()[-1] == saved + 2
    newest = list_checkpoints(run / "checkpoints")[-1]
    newest.verify()
    assert newest.processes == 2


def resumed_by(job: subprocess.Popen[str]) -> str:
    said = job.communicate(timeout=120)[1]
    assert job.returncode == 0, said
    assert said.count("trained: ") == 1
    return said
