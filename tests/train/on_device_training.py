"""A run on a GPU against one on the CPU: the same predictions, checkpoints that either reads, the same bits each time.

pytest does not collect this file by itself: `make gpu-check` runs it, and there must be a GPU.
"""

from __future__ import annotations

import pytest
import torch

import slidex
from slidex.data import DatasetWriter
from slidex.train.checkpoint import list_checkpoints
from slidex.train.config import TrainConfig
from slidex.train.loop import Trainer
from slidex.train.settle import settle
from tests.conftest import checkerboard

CLASSES, ROWS = 2000, 10_000
SMALL = {
    "batch_size": 128,
    "epochs": 4,
    "pool_size": 500,
    "active_size": 200,
    "learning_rate": 0.01,
    "lr_schedule": "constant",
    "rehash_every": 20,
    "precision": "float32",
}
MODES = {
    "exact": {"mode": "exact"},
    "shared": {"mode": "shared", "hidden_dropout": 0.1, "dense_widths": (96,)},
    "per_sample": {"mode": "per_sample"},
    "logistic": {"mode": "shared", "loss": "logistic", "index": "dwta"},
}
NARROW = {"weight_dtype": "bfloat16"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "data"
    with DatasetWriter(path) as writer:
        for split, rows, seed in (("train", ROWS, 1), ("test", 2000, 2)):
            writer.append(split, *checkerboard(rows, CLASSES, seed, labels_per_row=2))
        return writer.finish(
            num_features=CLASSES + 20,
            num_classes=CLASSES,
            source={"format": "test", "files": [], "options": {}},
        )


def config(device, **changes):
    return TrainConfig.from_mapping(SMALL | {"device": device} | changes)


def best(run, data, device="cpu"):
    return torch.cat([ids for _, ids in run.model(device=device).topk(data.split("test").x, 5)])


@pytest.mark.parametrize("weights", [{}, NARROW])
@pytest.mark.parametrize("mode", ["exact", "shared"])
def test_a_model_predicts_on_the_gpu_what_it_predicts_on_the_cpu(data, tmp_path, mode, weights):
    run = slidex.fit(data, tmp_path / "run", config("cuda", **MODES[mode], **weights))
    same = (best(run, data, "cuda") == best(run, data, "cpu")).all(1).float().mean()
    assert same >= 0.999


@pytest.mark.parametrize("mode", MODES)
def test_a_run_on_the_gpu_learns_what_one_on_the_cpu_learns(data, tmp_path, mode):
    settings = (
        config("cpu", **MODES[mode]),
        config("cuda", **MODES[mode]),
        config("cuda", **MODES[mode], **NARROW),
    )
    results = [
        slidex.evaluate(slidex.fit(data, tmp_path / str(n), each), data) for n, each in enumerate(settings)
    ]
    for result in results[1:]:
        assert result["P@1"] == pytest.approx(results[0]["P@1"], abs=0.02)


def test_a_resumed_run_in_bfloat16_is_an_unbroken_one(data, tmp_path):
    settings = {**MODES["shared"], **NARROW, "optimizer": "rowwise_adagrad", "checkpoint_every": 50}
    whole = slidex.fit(data, tmp_path / "whole", config("cuda", **settings, max_steps=100))
    part = slidex.fit(data, tmp_path / "part", config("cuda", **settings, max_steps=50))
    slidex.fit(data, part.path, config("cuda", **settings, max_steps=100), resume=True)
    mine, theirs = (list_checkpoints(run.checkpoints)[-1].tensors("head") for run in (part, whole))
    assert theirs["weight"].dtype == torch.bfloat16
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())


def test_checkpoints_are_those_of_either_device_and_a_resumed_run_is_an_unbroken_one(data, tmp_path):
    settings = {**MODES["shared"], "checkpoint_every": 50}
    whole = slidex.fit(data, tmp_path / "whole", config("cuda", **settings, max_steps=100))
    part = slidex.fit(data, tmp_path / "part", config("cuda", **settings, max_steps=50))
    slidex.fit(data, part.path, config("cuda", **settings, max_steps=100), resume=True)
    mine, theirs = (list_checkpoints(run.checkpoints)[-1] for run in (part, whole))
    for group in ("encoder", "head", "optimizer", "progress", "index"):
        for name, value in theirs.tensors(group).items():
            assert torch.equal(mine.tensors(group)[name], value), name
    slidex.fit(data, part.path, config("cpu", **settings, max_steps=120), resume=True)
    slidex.fit(data, part.path, config("cuda", **settings, max_steps=140), resume=True)


@pytest.mark.parametrize("weights", [{}, NARROW])
@pytest.mark.parametrize("mode", MODES)
def test_a_step_waits_for_nothing(data, mode, weights):
    settings = settle(config("cuda", **MODES[mode], **weights, rehash="fixed", rehash_every=1000), data)
    trainer = Trainer(data, settings, lambda *_: None)
    batches = trainer.batches()
    for _ in range(3):  # compiles, and builds the index
        trainer.train_step(*next(batches))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.train_step(*next(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")
        batches.close()
