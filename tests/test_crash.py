"""``kill -9`` at any moment: no torn checkpoint, no saved step lost, and a resumed run equal to an unbroken one."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import torch

import slidex
from slidex.train.checkpoint import list_checkpoints

if TYPE_CHECKING:
    from pathlib import Path

    from slidex.data import Dataset

SETTINGS = {
    "mode": "shared", "pool_size": 40, "index_options": {"bits": 4, "tables": 4}, "hidden_width": 16, "batch_size": 64,
    "epochs": 100, "max_steps": 400, "lr_schedule": "constant", "seed": 3, "threads": 1, "valid_every": 1000,
    "checkpoint_every": 1, "keep_last": 3,
}  # fmt: skip
CHILD = f"""
import sys, pathlib, slidex
data, run, resume, last = sys.argv[1:]
config = slidex.TrainConfig(**{SETTINGS} | {{"max_steps": int(last)}})
slidex.fit(slidex.Dataset.open(data), pathlib.Path(run), config, resume=bool(int(resume)))
"""
KILLS = 3


def newest_step(run: Path) -> int:
    return max((checkpoint.step for checkpoint in list_checkpoints(run / "checkpoints")), default=0)


def killed_after(data: Path, run: Path, resume: bool, steps: int, moment: float) -> None:
    """Trains in another process until `steps` more checkpoints are there and `moment` seconds have passed."""
    goal = newest_step(run) + steps
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, data, run, str(int(resume)), str(SETTINGS["max_steps"])]
    )
    try:
        while newest_step(run) < goal:
            assert child.poll() is None, "ended before it could be killed"
            time.sleep(0.001)
        time.sleep(moment)
    finally:
        child.kill()
        child.wait()


def test_kill_9_loses_nothing_that_was_saved(easy_data: Dataset, tmp_path: Path) -> None:
    def train(name: str, resume: bool, last: int) -> slidex.Run:
        words = [easy_data.path, tmp_path / name, str(int(resume)), str(last)]
        subprocess.run([sys.executable, "-c", CHILD, *words], check=True)
        return slidex.Run.open(tmp_path / name)

    # The process that compiles the kernels can differ from later ones, which load them, in the last bit.
    train("warm", False, 1)
    rng = random.Random(0)
    run = tmp_path / "run"
    for i in range(KILLS):
        killed_after(easy_data.path, run, i > 0, rng.randint(2, 5), rng.uniform(0, 0.02))
        logged = [event["step"] for event in slidex.Run.open(run).log() if event["event"] == "checkpoint"]
        found = list_checkpoints(run / "checkpoints")
        assert found
        assert found[-1].step >= max(logged)
        for checkpoint in found:
            checkpoint.verify()
    last = newest_step(run)
    assert last < SETTINGS["max_steps"]
    resumed, whole = train("run", True, last + 5), train("whole", False, last + 5)
    for name in ("encoder", "head"):
        expected, got = whole.checkpoint().tensors(name), resumed.checkpoint().tensors(name)
        assert all(torch.equal(expected[key], got[key]) for key in expected), name
    assert not list((run / "checkpoints").glob(".tmp-*"))
