"""A head sharded over two and three processes has the loss, gradients, updates and answers of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slidex.errors import ConfigError
from slidex.nn import LSHSoftmaxLoss
from tests.nn.workers import run_workers

WORKER = Path(__file__).with_name("head_worker.py")


@pytest.mark.parametrize("size", [2, 3])
def test_a_sharded_head_is_that_of_one_process(tmp_path: Path, size: int) -> None:
    run_workers(WORKER, size, tmp_path)


def test_full_states_without_processes() -> None:
    head, other = LSHSoftmaxLoss(4, 9, bias=True), LSHSoftmaxLoss(4, 9, bias=True)
    state = head.full_state_dict()
    other.load_full_state_dict(state)
    assert torch.equal(other.weight, head.weight)
    state["weight"].zero_()
    assert head.weight.any()
    with pytest.raises(ConfigError, match="call init_process_group first"):
        head.shard()
