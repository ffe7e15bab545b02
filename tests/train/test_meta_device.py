"""Steps of a run where tensors have no values: all of it is on the model's device, and none of it is read."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from slidex.nn import initial_weights
from slidex.train import state
from slidex.train.loop import Trainer
from slidex.train.settle import settle
from slidex.train.state import collect_state
from tests.train.test_device import MODES, config
from tests.waiting import Largest

pytest.importorskip("numba_cuda", reason="numba-cuda is installed on Linux x86-64 only (extra dev)")

from tests.nn.meta_device import META, meta_device


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
def test_steps_read_nothing_and_mix_no_devices(easy_data, mode, weight_dtype):
    changes = {"rehash": "fixed", "rehash_every": 1000, "weight_dtype": weight_dtype} | MODES[mode]
    with meta_device() as launches:
        settings = settle(config(**changes, device="cuda"), easy_data)
        trainer = Trainer(easy_data, settings, lambda *_: None)
        batches = trainer.batches()
        for _ in range(3):
            trainer.train_step(*next(batches))
        batches.close()
        tensors, _ = collect_state_without_values(trainer)
    names = {launch.kernel.name for launch in launches}
    assert names >= {"weighted_sums", "update_groups"}
    assert trainer.step == 3
    assert tensors["head"]["weight"].dtype == getattr(torch, weight_dtype)
    tensors.pop("index", None)  # whose hash functions the host keeps too
    for group in tensors.values():
        assert {tensor.device for name, tensor in group.items() if not name.endswith(".step")} == {META}


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
def test_the_host_never_has_the_weights(easy_data, monkeypatch, weight_dtype):
    monkeypatch.setattr(initial_weights, "BLOCK_BYTES", 1 << 16)
    settings = config(mode="exact", hidden_width=1024, weight_dtype=weight_dtype, device="cuda")
    with meta_device(), Largest() as largest:
        trainer = Trainer(easy_data, settle(settings, easy_data), lambda *_: None)
    assert trainer.model.head.weight.device == trainer.model.encoder.bag.device == META
    assert trainer.model.head.weight.nbytes > 4 << 16
    assert 1 << 15 < largest.nbytes <= (1 << 16) + 16 * 1024 * 4


def collect_state_without_values(trainer):
    """What a checkpoint would have, where it is; it reads the loss."""
    trainer.collapse._loss = 0.0
    with mock.patch.object(state, "on_cpu", dict):
        return collect_state(trainer)
