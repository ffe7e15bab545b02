"""A run on a GPU's path, taken by the CPU with the reference kernels, against a run on the CPU; and what is refused."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest
import torch

import slidex
from slidex.data import CsrArrays
from slidex.errors import ConfigError, DeviceError, DivergedError, InterruptedRunError
from slidex.kernels.cuda import environment
from slidex.kernels.dense_adam import DenseAdam
from slidex.nn import memory
from slidex.nn.bag_inputs import InputRules
from slidex.train import settle as settling
from slidex.train.checkpoint import list_checkpoints
from slidex.train.config import TrainConfig
from slidex.train.distributed import Solo
from slidex.train.loop import Trainer
from slidex.train.settle import settle
from tests.nn.device_path import KERNELS, free, take_device_path
from tests.waiting import NoWaiting

SMALL = {
    "hidden_width": 32,
    "batch_size": 64,
    "epochs": 2,
    "pool_size": 100,
    "active_size": 60,
    "index_options": {"bits": 3, "tables": 8},
    "rehash_every": 7,
    "learning_rate": 0.02,
    "report_every": 10,
    "precision": "float32",
}
DROPOUT = {"input_dropout": 0.2, "hidden_dropout": 0.3}
MODES = {
    "exact": {"mode": "exact"},
    "shared": {"mode": "shared"},
    "layers and dropout": {"mode": "shared", "dense_widths": (24, 16), **DROPOUT},
    "dropout alone": {"mode": "exact", **DROPOUT, "normalize": False},
    "per_sample": {"mode": "per_sample", "rehash": "drift", "rehash_drift": 0.05, "correction": "stratified"},
    "in the batch": {"mode": "per_sample", "optimizer": "rowwise_adam"},
    "logistic": {"mode": "shared", "loss": "logistic", "index": "none", "index_options": {}},
    "logistic per_sample": {"mode": "per_sample", "loss": "logistic", "optimizer": "rowwise_adagrad"},
}
pytestmark = pytest.mark.usefixtures("one_thread")


def config(**changes):
    return TrainConfig.from_mapping(SMALL | changes)


@pytest.fixture
def take(monkeypatch):
    """Takes the path of the named device from now on, and names it."""

    def choose(device):
        take_device_path(monkeypatch, taken=device == "cuda")
        return device

    return choose


def tensors(run):
    last = list_checkpoints(run.checkpoints)[-1]
    groups = ["encoder", "head", "optimizer", "progress"]
    groups += ["index"] if (last.path / "index.safetensors").exists() else []
    return {f"{g}.{name}": t for g in groups for name, t in last.tensors(g).items()}


def facts(run, kind, names):
    return [{name: event[name] for name in names} for event in run.log() if event["event"] == kind]


def assert_near(mine, theirs):
    """The same run but for rounding, which Adam's first steps enlarge where a gradient is nearly 0."""
    assert mine.keys() == theirs.keys()
    for name in mine:
        if mine[name].numel() == 0:
            assert mine[name].shape == theirs[name].shape
        elif mine[name].is_floating_point():
            difference = (mine[name] - theirs[name]).abs()
            assert difference.mean() < 1e-4, name
            assert difference.max() < 0.05, name
        else:
            assert (mine[name] == theirs[name]).float().mean() > 0.99, name


@pytest.mark.parametrize("mode", MODES)
def test_a_run_is_that_of_the_cpu(easy_data, tmp_path, take, mode):
    runs = [
        slidex.fit(easy_data, tmp_path / device, config(**MODES[mode], device=take(device)))
        for device in ("cpu", "cuda")
    ]
    assert_near(*map(tensors, runs))
    for kind, names in (
        ("report", ("step", "loss", "active_classes", "classes_seen", "epoch_coverage", "rehashes")),
        ("epoch", ("step", "epoch_coverage")),
        ("validation", ("step", "P@1", "best")),
    ):
        want, got = (facts(run, kind, names) for run in runs)
        assert len(got) == len(want) > 0
        for mine, theirs in zip(got, want, strict=True):
            assert mine == pytest.approx(theirs, rel=2e-3, abs=0.011), kind


def test_predictions_and_metrics_are_those_of_the_cpu(easy_data, tmp_path, take):
    take("cpu")
    run = slidex.fit(easy_data, tmp_path / "run", config(mode="shared", epochs=15))
    results = {}
    for device in ("cpu", "cuda"):
        take(device)
        model = run.model(indexed=True, device=device)
        x = easy_data.split("test").x
        results[device] = (
            slidex.evaluate(run, easy_data, device=device, errors=3, by_frequency=True),
            slidex.evaluate(run, easy_data, device=device, indexed=True),
            torch.cat([ids for _, ids in model.topk(x, 5)]),
            list(slidex.predict(model, [x], 3, indexed=True, probabilities=True)),
            list(slidex.predict(model, [x], 3, probabilities=True)),
        )
    for mine, theirs in zip(results["cuda"][:2], results["cpu"][:2], strict=True):
        for kept in (mine, theirs):
            kept.pop("microseconds_per_row")
        assert mine["P@1"] == theirs["P@1"] > 0.5
        assert mine.get("errors") == theirs.get("errors")
    assert (results["cuda"][2] == results["cpu"][2]).float().mean() >= 0.999
    for mine, theirs in zip(results["cuda"][3:], results["cpu"][3:], strict=True):
        for row, other in zip(mine, theirs, strict=True):
            for found, wanted in zip(row["classes"], other["classes"], strict=True):
                assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("mode", ["shared", "layers and dropout"])
@pytest.mark.parametrize(("first", "second"), [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
def test_a_run_goes_on_where_another_device_has_saved_it(easy_data, tmp_path, take, mode, first, second):
    settings = MODES[mode] | {"checkpoint_every": 8, "lr_schedule": "constant"}
    whole = slidex.fit(easy_data, tmp_path / "whole", config(**settings, device=take(second), max_steps=24))
    part = slidex.fit(easy_data, tmp_path / "part", config(**settings, device=take(first), max_steps=16))
    part = slidex.fit(
        easy_data, part.path, config(**settings, device=take(second), max_steps=24), resume=True
    )
    mine, theirs = tensors(part), tensors(whole)
    if first == second:
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    else:
        assert_near(mine, theirs)


def test_one_seed_is_one_run(easy_data, tmp_path, take):
    runs = [
        slidex.fit(easy_data, tmp_path / str(n), config(**MODES["layers and dropout"], device=take("cuda")))
        for n in range(2)
    ]
    mine, theirs = map(tensors, runs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_waits_for_nothing(easy_data, take, mode, monkeypatch):
    settings = config(**MODES[mode], device=take("cuda"))
    told = []
    trainer = Trainer(easy_data, settle(settings, easy_data), lambda *event: told.append(event))
    monkeypatch.setattr(DenseAdam, "step", free(DenseAdam.step))  # it counts on the host
    batches = trainer.batches()
    for _ in range(10):
        x, y = next(batches)
        with NoWaiting():
            trainer.train_step(x, y)
    batches.close()
    assert trainer.step == 10
    assert told[-1] == ("step", {"step": 10})
    assert float(trainer.interval.loss) > 0


def test_batches_are_prepared_by_the_thread_that_reads_them(easy_data, take, monkeypatch):
    """The step at hand gets tensors; features are only normalised and dropped while another step trains."""
    trainer = Trainer(
        easy_data, settle(config(mode="shared", device=take("cuda")), easy_data), lambda *_: None
    )
    batches = trainer.batches()
    x, y = next(batches)
    monkeypatch.setattr(InputRules, "apply", None)
    assert not isinstance(x, CsrArrays)
    assert not isinstance(y, CsrArrays)
    trainer.train_step(x, y)
    with contextlib.suppress(TypeError):
        batches.close()


def test_a_loss_that_is_not_finite_is_saved_nowhere(easy_data, tmp_path, take, monkeypatch):
    take("cuda")
    calls, original = [], KERNELS.shared_softmax_loss

    def failing(*arguments):
        calls.append(1)
        loss_N = original(*arguments)
        return loss_N * torch.nan if len(calls) == 12 else loss_N

    monkeypatch.setattr(KERNELS, "shared_softmax_loss", failing)
    settings = config(mode="shared", device="cuda", checkpoint_every=1, epochs=20)
    message = (
        r"loss of step 12 is not finite; no checkpoint has its update\. Lower 'learning_rate' \(now 0\.02\)"
    )
    with pytest.raises(DivergedError, match=message):
        slidex.fit(easy_data, tmp_path / "run", settings)
    assert max(c.step for c in list_checkpoints(tmp_path / "run" / "checkpoints")) == 11


def test_a_signal_saves_first(easy_data, tmp_path, take):
    take("cuda")

    def stop(event, told):
        if event == "step" and told["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedRunError, match="after step 5"):
        slidex.fit(easy_data, tmp_path / "run", config(mode="shared", device="cuda"), notify=stop)
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].step == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"index": "learned"}, "'index' setting must be simhash, dwta, exact or none .* Got 'learned'"),
        ({"index_options": {"insert": 4}}, "'insert' parameter of make_index must be 0"),
        ({"index_options": {"budget": "first_come"}}, "'budget' parameter of make_index must be 'votes'"),
    ],
)
def test_what_works_on_the_cpu_alone_is_refused_before_anything_is_written(
    easy_data, tmp_path, take, settings, message
):
    take("cuda")
    with pytest.raises(ConfigError, match=message):
        slidex.fit(easy_data, tmp_path / "run", config(mode="shared", device="cuda", **settings))
    assert not (tmp_path / "run").exists()


def test_several_processes_are_refused(easy_data, take):
    class Two(Solo):
        size = 2

    take("cuda")
    with pytest.raises(ConfigError, match="'device' setting must be cpu where 2 processes"):
        settle(config(device="cuda"), easy_data, Two())


def test_without_a_gpu_there_is_a_plain_word_and_no_run(easy_data, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_built_for", lambda: None)
    pytest.importorskip("numba_cuda", reason="numba-cuda is installed on Linux x86-64 only (extra dev)")
    with pytest.raises(DeviceError, match=r"is built without CUDA\. Install a CUDA build of torch"):
        slidex.fit(easy_data, tmp_path / "run", config(device="cuda"))
    assert not (tmp_path / "run").exists()
    run = slidex.fit(easy_data, tmp_path / "run", config(max_steps=2))
    with pytest.raises(DeviceError, match="is built without CUDA"):
        slidex.evaluate(run, easy_data, device="cuda:1")
    with pytest.raises(ConfigError, match=r"'device' setting must be cpu, cuda or cuda:N\. Got 'gpu'"):
        slidex.evaluate(run, easy_data, device="gpu")


def test_too_little_memory_is_told_before_anything_is_written(easy_data, tmp_path, take, monkeypatch):
    take("cuda")
    monkeypatch.setattr(memory, "free_bytes", lambda _: (10**8, 10**9))
    message = r"0\.10 GB of 1\.00 GB free; about .* input weights 0\.00 GB, their optimizer state .* index"
    with pytest.raises(DeviceError, match=message):
        slidex.fit(easy_data, tmp_path / "run", config(mode="shared", device="cuda"))
    assert not (tmp_path / "run").exists()


def test_auto_is_decided_for_the_device(easy_data, take):
    take("cuda")
    chosen = settle(config(mode="auto", device="cuda"), easy_data)
    assert (chosen.mode, chosen.precision) == ("exact", "float32")


def test_auto_prefers_a_pool_where_there_are_many_weights(easy_data, take, monkeypatch):
    take("cuda")
    monkeypatch.setattr(settling, "GPU_EXACT_WEIGHTS", 300 * 32 - 1)
    assert settle(config(mode="auto", device="cuda"), easy_data).mode == "shared"
