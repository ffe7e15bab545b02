"""Runs whose class weights are bfloat16, on a GPU's path: what is saved, resumed, predicted, needed and refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import slidex
from slidex.errors import CheckpointError, ConfigError, DeviceError
from slidex.kernels import reference
from slidex.nn import memory
from slidex.nn.head import SampledHead
from slidex.train import placing
from slidex.train.checkpoint import list_checkpoints
from slidex.train.config import TrainConfig
from slidex.train.loop import Trainer
from slidex.train.settle import settle
from tests.nn.device_path import take_both_paths
from tests.train.test_device import MODES, config, tensors

REFUSAL = r"'weight_dtype' setting must be float32 where 'device' is cpu\. Got 'bfloat16' instead"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def gpu(monkeypatch):
    """Takes a GPU's path where a device is named cuda, the CPU's elsewhere."""
    take_both_paths(monkeypatch)


def narrow(**changes):
    return config(device="cuda", weight_dtype="bfloat16", max_steps=12, **changes)


def topk(run, data, device, **options):
    model = run.model(device=device, **options)
    found = list(model.topk(data.split("test").x, 5, indexed=bool(options)))
    return model, *(torch.cat([block[part] for block in found]) for part in (0, 1))


def test_a_cpu_trains_in_float32_alone():
    for settings in ({"weight_dtype": "bfloat16"}, {"weight_dtype": "bfloat16", "device": "cpu"}):
        with pytest.raises(ConfigError, match=REFUSAL):
            TrainConfig(**settings)
    with pytest.raises(ConfigError, match="'weight_dtype' setting must be one of float32, bfloat16"):
        TrainConfig(weight_dtype="float16", device="cuda")
    assert TrainConfig(weight_dtype="bfloat16", device="cuda:1").weight_dtype == "bfloat16"


@pytest.mark.parametrize("mode", ["exact", "shared", "logistic per_sample"])
def test_class_weights_alone_are_narrow_and_learn_as_wide_ones(easy_data, tmp_path, gpu, mode):
    runs = [
        slidex.fit(easy_data, tmp_path / str(n), replace(narrow(**MODES[mode]), weight_dtype=dtype))
        for n, dtype in enumerate(("float32", "bfloat16"))
    ]
    wide, found = map(tensors, runs)
    assert {name for name, tensor in found.items() if tensor.dtype == torch.bfloat16} == {"head.weight"}
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in wide.items()
    }
    difference = (found["head.weight"].float() - wide["head.weight"]).abs()
    assert 1e-6 < difference.mean() < 5e-3
    losses = [[event["loss"] for event in run.log() if event["event"] == "report"] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_the_training_step_rounds_stochastically(easy_data, tmp_path, gpu, monkeypatch):
    run = slidex.fit(easy_data, tmp_path / "run", narrow(mode="shared"))
    monkeypatch.setattr(reference, "stochastic_round", lambda x, dtype, *_: x.to(dtype))
    nearest = slidex.fit(easy_data, tmp_path / "nearest", narrow(mode="shared"))
    mine, theirs = (tensors(each)["head.weight"] for each in (run, nearest))
    assert (mine != theirs).any()


@pytest.mark.parametrize("mode", ["shared", "per_sample"])
def test_a_resumed_run_takes_the_steps_of_an_unbroken_one(easy_data, tmp_path, gpu, mode):
    settings = narrow(**MODES[mode], lr_schedule="constant")
    whole = slidex.fit(easy_data, tmp_path / "whole", settings)
    part = slidex.fit(easy_data, tmp_path / "part", replace(settings, max_steps=7))
    part = slidex.fit(easy_data, part.path, settings, resume=True)
    mine, theirs = tensors(part), tensors(whole)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    other = slidex.fit(easy_data, tmp_path / "other", replace(settings, seed=1))
    assert not torch.equal(tensors(other)["head.weight"], theirs["head.weight"])


def test_a_run_goes_on_in_its_own_dtype(easy_data, tmp_path, gpu):
    run = slidex.fit(easy_data, tmp_path / "run", narrow(mode="shared"))
    wide = replace(narrow(mode="shared"), weight_dtype="float32")
    with pytest.raises(CheckpointError, match="weight_dtype = 'float32'; the run has 'bfloat16'"):
        slidex.fit(easy_data, run.path, wide, resume=True)


def test_a_run_of_before_there_was_a_choice_is_float32(easy_data, tmp_path):
    run = slidex.fit(easy_data, tmp_path / "run", config(mode="shared", max_steps=1))
    meta = json.loads((run.path / "run.json").read_text())
    assert meta["config"].pop("weight_dtype") == "float32"
    (run.path / "run.json").write_text(json.dumps(meta))
    assert slidex.Run.open(run.path).model().head.weight.dtype == torch.float32


def test_a_model_that_predicts_is_read_where_it_is_to_be(easy_data, tmp_path, gpu, monkeypatch):
    """No initial weights are drawn for it, and it has no state of an optimizer."""
    run = slidex.fit(easy_data, tmp_path / "run", narrow(mode="shared"))
    monkeypatch.setattr("slidex.nn.head.draw_normal", None)
    monkeypatch.setattr("slidex.nn.encoder.draw_normal", None)
    for device in ("cpu", "cuda"):
        model = run.model(device=device)
        assert torch.equal(model.head.weight.float(), tensors(run)["head.weight"].float())
        states = (model.head.weight_state, model.head.bias_state, model.encoder.bag_state)
        assert {moment.device.type for state in states for moment in state} == {"meta"}
    monkeypatch.setattr(memory, "free_bytes", lambda _: (10**8, 10**9))
    with pytest.raises(DeviceError, match=r"about 0\.27 GB are needed: weights 0\.00 GB"):
        run.model(device="cuda")


@pytest.mark.parametrize("indexed", [False, True])
def test_prediction_on_the_cpu_widens_the_very_same_weights(easy_data, tmp_path, gpu, indexed):
    run = slidex.fit(easy_data, tmp_path / "run", narrow(mode="shared"))
    options = {"indexed": True} if indexed else {}
    here, scores, ids = topk(run, easy_data, "cpu", **options)
    there, device_scores, device_ids = topk(run, easy_data, "cuda", **options)
    saved = tensors(run)["head.weight"]
    assert (saved.dtype, here.head.weight.dtype, there.head.weight.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
    )
    assert torch.equal(here.head.weight, saved.float())
    assert torch.equal(there.head.weight, saved)
    assert (ids == device_ids).float().mean() > 0.999
    torch.testing.assert_close(scores, device_scores, rtol=1e-4, atol=1e-4)


def test_probabilities_are_those_of_the_cpu(easy_data, tmp_path, gpu):
    run = slidex.fit(easy_data, tmp_path / "run", narrow(mode="shared"))
    x, found = easy_data.split("test").x, []
    for device in ("cpu", "cuda"):
        model = run.model(indexed=True, device=device)
        rows = list(slidex.predict(model, [x], 3, indexed=True, probabilities=True))
        found.append([row["classes"][0]["probability"] for row in rows])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_initial_weights_are_those_of_float32_rounded(monkeypatch):
    wide = SampledHead(16, 3000, mode="exact", seed=4).weight
    monkeypatch.setattr("slidex.nn.initial_weights.BLOCK_BYTES", 1 << 14)
    head = SampledHead(16, 3000, mode="exact", seed=4, weight_dtype=torch.bfloat16)
    assert torch.equal(head.weight, wide.bfloat16())
    assert head.bias.dtype == head.weight_state.moment1.dtype == torch.float32


def test_the_memory_that_is_asked_for_counts_half_the_weights(easy_data, gpu, monkeypatch):
    asked = []
    monkeypatch.setattr(placing, "require_memory", lambda needed, _, advice: asked.append((needed, advice)))
    for dtype in ("float32", "bfloat16"):
        settings = replace(narrow(mode="shared", optimizer="rowwise_adagrad"), weight_dtype=dtype)
        Trainer(easy_data, settle(settings, easy_data), lambda *_: None)
    (wide, wide_advice), (needed, advice) = asked
    assert wide["output weights"] == 300 * (32 * 4 + 4)
    assert needed["output weights"] == 300 * (32 * 2 + 4)
    assert needed["their state"] == wide["their state"] == 300 * (4 + 4)
    assert "set 'weight_dtype' to bfloat16" in wide_advice
    assert "weight_dtype" not in advice


def test_all_rows_in_another_dtype_are_counted(easy_data):
    """In exact mode: bfloat16 rows are multiplied in float32 where the settings say so."""
    sizes = 64, 10_000, 8, 8
    by_products = {
        precision: memory.step_bytes(config(mode="exact", precision=precision), *sizes, torch.bfloat16)
        for precision in ("float32", "bfloat16")
    }
    assert by_products["float32"] - by_products["bfloat16"] == 2 * 64 * 10_000


def test_too_little_memory_names_the_setting(easy_data, tmp_path, gpu, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda _: (10**8, 10**9))
    with pytest.raises(DeviceError, match="To need less, set 'weight_dtype' to bfloat16, or set 'optimizer'"):
        slidex.fit(easy_data, tmp_path / "run", config(mode="shared", device="cuda"))


def test_runs_are_complete(easy_data, tmp_path, gpu):
    run = slidex.fit(easy_data, tmp_path / "run", narrow(mode="shared", valid_every=6, checkpoint_every=6))
    assert [checkpoint.step for checkpoint in list_checkpoints(run.checkpoints)] == [6, 12]
