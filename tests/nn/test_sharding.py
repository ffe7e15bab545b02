"""A layer sharded over two and three processes has the loss and the gradients of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slidex.errors import ConfigError
from slidex.nn.sharding import Shard

WORKER = Path(__file__).with_name("sharding_worker.py")


@pytest.mark.parametrize("size", [2, 3])
def test_processes_together_compute_what_one_computes(tmp_path: Path, size: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), str(size), tmp_path / "store"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    said = [worker.communicate(timeout=300)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * size, "\n".join(said)


def test_without_a_process_group_there_is_no_shard() -> None:
    with pytest.raises(ConfigError, match="call init_process_group first"):
        Shard.of(10)
