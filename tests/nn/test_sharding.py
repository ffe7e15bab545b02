"""A layer sharded over two and three processes has the loss and the gradients of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from slidex.errors import ConfigError
from slidex.nn.sharding import Shard
from tests.nn.workers import run_workers

WORKER = Path(__file__).with_name("sharding_worker.py")


@pytest.mark.parametrize("size", [2, 3])
def test_processes_together_compute_what_one_computes(tmp_path: Path, size: int) -> None:
    run_workers(WORKER, size, tmp_path)


def test_without_a_process_group_there_is_no_shard() -> None:
    with pytest.raises(ConfigError, match="call init_process_group first"):
        Shard.of(10)
