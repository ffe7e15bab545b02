"""A run with the CUDA kernels and tables in the simulator, against one with the reference kernels."""

from __future__ import annotations

import pytest
import torch

import slidex
from slidex import kernels
from slidex.data import DatasetWriter
from slidex.lsh import hash_index
from slidex.nn import placement as placements
from slidex.nn.placement import Placement
from slidex.train.checkpoint import list_checkpoints
from slidex.train.config import TrainConfig
from tests.conftest import checkerboard
from tests.nn.device_path import KERNELS

CASES = {
    "shared": {"mode": "shared", "dense_widths": (8,), "hidden_dropout": 0.2},
    "per_sample": {"mode": "per_sample", "loss": "logistic", "optimizer": "rowwise_adagrad"},
    "exact": {"mode": "exact", "optimizer": "rowwise_adam"},
    "bfloat16": {"mode": "shared", "optimizer": "rowwise_adagrad", "weight_dtype": "bfloat16"},
    "bfloat16 per_sample": {"mode": "per_sample", "weight_dtype": "bfloat16"},
}


@pytest.fixture
def data(tmp_path):
    with DatasetWriter(tmp_path / "data") as writer:
        for split, rows in (("train", 20), ("test", 4)):
            writer.append(split, *checkerboard(rows, 24, 1, labels_per_row=2))
        return writer.finish(
            num_features=44, num_classes=24, source={"format": "test", "files": [], "options": {}}
        )


@pytest.mark.parametrize("case", CASES)
def test_cuda_kernels_train_as_the_reference_does(data, tmp_path, monkeypatch, case):
    monkeypatch.setattr(hash_index, "is_cuda", lambda _: True)
    settings = {
        "hidden_width": 8,
        "batch_size": 4,
        "max_steps": 4,
        "pool_size": 8,
        "active_size": 6,
        "index_options": {"bits": 2, "tables": 3},
        "rehash_every": 2,
        "device": "cuda",
        "precision": "float32",
    }
    runs = {}
    for name, module in (("cuda", kernels.get("cuda")), ("reference", KERNELS)):
        place = Placement(torch.device("cpu"), module, waits=False, dtypes=(torch.float32, torch.bfloat16))
        monkeypatch.setattr(placements, "place", lambda _, place=place: place)
        config = TrainConfig.from_mapping(settings | CASES[case])
        runs[name] = slidex.fit(data, tmp_path / name, config)
        last = list_checkpoints(runs[name].checkpoints)[-1]
        assert last.step == 4
        runs[name] = last.tensors("head") | last.tensors("encoder") | last.tensors("progress")
    for name, value in runs["reference"].items():
        rtol = (
            2**-7 if value.dtype == torch.bfloat16 else 1e-3
        )  # a sum in another order may be rounded the other way
        torch.testing.assert_close(runs["cuda"][name], value, rtol=rtol, atol=1e-3)
