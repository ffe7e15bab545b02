"""Training learns, resumes bit for bit, saves on a signal, and stops before a non-finite update."""

from __future__ import annotations

import json
import shutil
import signal

import numpy as np
import pytest
import torch

import slidex
from slidex.errors import CheckpointError, DataError, DivergedError, InterruptedRunError
from slidex.lsh import index_settings
from slidex.nn.selection import SHARED_TABLES
from slidex.train.checkpoint import list_checkpoints
from slidex.train.config import TrainConfig
from slidex.train.settle import learning_rate

SMALL = {
    "hidden_width": 32,
    "batch_size": 64,
    "epochs": 4,
    "pool_size": 100,
    "active_size": 60,
    "index_options": {"bits": 3, "tables": 8},
    "rehash_every": 7,
    "learning_rate": 0.02,
    "report_every": 10,
    "precision": "float32",
}
MODES = {
    "exact": {"mode": "exact"},
    "shared": {"mode": "shared", "rehash": "exponential"},
    "per_sample": {"mode": "per_sample", "rehash": "drift", "rehash_drift": 0.05, "correction": "stratified"},
    "random": {"mode": "shared", "index": "none", "index_options": {}, "rehash": "fixed", "loss": "logistic"},
}

FEW = {"mode": "shared", "batch_size": 16, "pool_size": 10, "rehash": "fixed", "rehash_every": 3}
RESUMED = MODES | {
    "updates of the index": FEW | {"index_options": {"bits": 3, "tables": 8, "center": True}},
    "an index that learns": FEW | {"index": "learned", "index_sample": 300},
    "rowwise_adam": FEW | {"optimizer": "rowwise_adam"},
    "rowwise_adagrad": {"mode": "per_sample", "optimizer": "rowwise_adagrad", "learning_rate": 0.1},
    "a share of the batch": {"mode": "per_sample", "correction": "none", "batch_share": 0.3},
}


def config(**changes):
    return TrainConfig.from_mapping(SMALL | changes)


def weights(run, step=None):
    checkpoints = {c.step: c for c in list_checkpoints(run.checkpoints)}
    chosen = checkpoints[max(checkpoints) if step is None else step]
    groups = ["encoder", "head", "optimizer", "progress"] + (
        ["index"] if (chosen.path / "index.safetensors").exists() else []
    )
    return {f"{g}.{name}": t.clone() for g in groups for name, t in chosen.tensors(g).items()}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_learns_the_easy_problem(easy_data, tmp_path, mode):
    run = slidex.fit(easy_data, tmp_path / "run", config(**MODES[mode], epochs=30))
    result = slidex.evaluate(run, easy_data)
    assert result["P@1"] > 0.95
    events = run.log()
    report = next(e for e in events if e["event"] == "report")
    assert set(report["time_share"]) >= {"data", "encoder", "kernel", "update"}
    assert sum(report["time_share"].values()) == pytest.approx(1.0)
    assert 0 < report["classes_seen"] <= 1
    assert events[-1]["event"] == "checkpoint"


@pytest.mark.parametrize(
    ("optimizer", "rate"), [("adam", 0.02), ("rowwise_adam", 0.02), ("rowwise_adagrad", 0.1)]
)
def test_every_optimizer_learns_the_easy_problem(easy_data, tmp_path, optimizer, rate):
    settings = config(mode="shared", optimizer=optimizer, learning_rate=rate, epochs=30)
    run = slidex.fit(easy_data, tmp_path / "run", settings)
    assert slidex.evaluate(run, easy_data)["P@1"] > 0.95
    moments = {
        name: t.numel() for name, t in run.checkpoint().tensors("optimizer").items() if "dense" not in name
    }
    kept = {"adam": 620 * 64 + 600, "rowwise_adam": 620 * 33 + 600, "rowwise_adagrad": 620 + 300}
    assert sum(moments.values()) == kept[optimizer]  # 300 classes and 320 features, width 32, 300 biases


def test_the_index_finds_what_exact_scoring_finds(easy_data, tmp_path):
    run = slidex.fit(
        easy_data, tmp_path / "run", config(mode="shared", epochs=10, index_options={"bits": 3, "tables": 32})
    )
    exact = slidex.evaluate(run, easy_data)
    indexed = slidex.evaluate(run, easy_data, indexed=True)
    assert indexed["scoring"] == "index"
    assert indexed["P@1"] > exact["P@1"] - 0.02


@pytest.mark.parametrize("mode", RESUMED)
@pytest.mark.parametrize("extra", [{}, {"dense_widths": [24], "input_dropout": 0.2, "hidden_dropout": 0.2}])
def test_stopped_and_resumed_equals_unbroken(easy_data, tmp_path, mode, extra):
    settings = config(**RESUMED[mode], **extra, max_steps=40)
    whole = slidex.fit(easy_data, tmp_path / "whole", settings)

    def stop_at_20(event, facts):
        if event == "step" and facts["step"] == 20:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(InterruptedRunError, match="SIGTERM after step 20"):
        slidex.fit(easy_data, tmp_path / "parts", settings, notify=stop_at_20)
    parts = slidex.Run.open(tmp_path / "parts")
    assert list_checkpoints(parts.checkpoints)[-1].step == 20
    resumed = slidex.fit(easy_data, tmp_path / "parts", settings, resume=True)
    if mode == "updates of the index":
        assert sum(event["index_updates"] for event in whole.log() if event["event"] == "report") > 3
    expected, got = weights(whole), weights(resumed)
    assert expected.keys() == got.keys()
    states = [run.checkpoint().state() for run in (whole, resumed)]
    assert states[0]["collapse"] == states[1]["collapse"]
    assert states[0].get("rehash") == states[1].get("rehash")
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name


@pytest.mark.parametrize("mode", ["shared", "per_sample"])
def test_an_index_that_is_asked_for_nothing_does_no_harm(easy_data, tmp_path, mode):
    run = slidex.fit(easy_data, tmp_path / "run", config(mode=mode, random_share=1.0, max_steps=10))
    assert next(e for e in run.log() if e["event"] == "report")["index_recall"] is None


def test_two_runs_with_one_seed_are_equal_and_another_seed_is_not(easy_data, tmp_path):
    runs = [
        slidex.fit(easy_data, tmp_path / str(i), config(mode="shared", seed=s, max_steps=15))
        for i, s in enumerate((5, 5, 6))
    ]
    first, second, other = (weights(run) for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_a_non_finite_loss_stops_before_the_update(easy_data, tmp_path):
    with pytest.raises(DivergedError, match=r"loss of step \d+ is (nan|inf)"):
        slidex.fit(
            easy_data,
            tmp_path / "run",
            config(
                mode="exact",
                learning_rate=10.0,
                hidden_width=512,
                epochs=200,
                lr_schedule="constant",
                checkpoint_every=1,
                keep_last=1,
                loss="softmax",
                weight_decay=1.0,
                beta2=0.0,
                epsilon=1e-16,
            ),
        )
    for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints"):
        assert all(tensor.isfinite().all() for tensor in checkpoint.tensors("head").values())


def test_validation_keeps_the_best_and_stops_early(easy_data, tmp_path):
    run = slidex.fit(easy_data, tmp_path / "run", config(mode="exact", epochs=40, patience=2, keep_last=1))
    validations = [e for e in run.log() if e["event"] == "validation"]
    best = max(validations, key=lambda e: e["P@1"])
    assert len(validations) < 40
    assert run.best()["P@1"] == best["P@1"]
    assert run.checkpoint().step == run.best()["step"]
    assert len(list_checkpoints(run.checkpoints)) <= 2


def test_valid_fraction_holds_rows_out(easy_data, tmp_path):
    copy = tmp_path / "data"
    with slidex.data.DatasetWriter(copy) as writer:
        split = easy_data.split("train")
        writer.append("train", split.x, split.y)
        data = writer.finish(
            num_features=320, num_classes=300, source={"format": "test", "files": [], "options": {}}
        )
    run = slidex.fit(data, tmp_path / "run", config(mode="exact", valid_fraction=0.25, max_steps=3))
    validation = next(e for e in run.log() if e["event"] == "validation")
    assert validation["rows"] == 300
    with pytest.raises(DataError, match="'patience' setting needs validation rows"):
        slidex.fit(data, tmp_path / "other", config(mode="exact", patience=1))
    assert not (tmp_path / "other").exists()


def test_resume_refuses_other_settings_and_an_occupied_directory(easy_data, tmp_path):
    slidex.fit(easy_data, tmp_path / "run", config(mode="exact", max_steps=2))
    with pytest.raises(CheckpointError, match="exists already"):
        slidex.fit(easy_data, tmp_path / "run", config(mode="exact", max_steps=2))
    for name, value, had in (("batch_size", 32, 64), ("optimizer", "rowwise_adam", "adam")):
        other = config(**{"mode": "exact", "max_steps": 2, name: value})
        with pytest.raises(CheckpointError, match=f"resumed with {name} = {value!r}; the run has {had!r}"):
            slidex.fit(easy_data, tmp_path / "run", other, resume=True)


def test_a_run_from_before_there_was_a_choice_of_optimizer_resumes_as_adam(easy_data, tmp_path):
    settings = config(mode="shared", max_steps=8, checkpoint_every=4)
    expected = weights(slidex.fit(easy_data, tmp_path / "run", settings))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000008")
    file = tmp_path / "run" / "run.json"
    meta = json.loads(file.read_text())
    assert meta["config"].pop("optimizer") == "adam"
    file.write_text(json.dumps(meta))
    other = config(mode="shared", max_steps=8, checkpoint_every=4, optimizer="rowwise_adagrad")
    with pytest.raises(CheckpointError, match="'rowwise_adagrad'; the run has 'adam'"):
        slidex.fit(easy_data, tmp_path / "run", other, resume=True)
    got = weights(slidex.fit(easy_data, tmp_path / "run", settings, resume=True))
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_resume_passes_over_an_altered_checkpoint(easy_data, tmp_path):
    settings = config(mode="exact", max_steps=20, checkpoint_every=10)
    run = slidex.fit(easy_data, tmp_path / "run", settings)
    expected = weights(run)
    newest = list_checkpoints(run.checkpoints)[-1].path
    (newest / "head.safetensors").write_bytes(b"damaged")
    messages = []
    with pytest.raises(CheckpointError, match=r"head\.safetensors: has 7 bytes"):
        list_checkpoints(run.checkpoints)[-1].verify()
    shutil.move(newest, tmp_path / "damaged")
    shutil.copytree(tmp_path / "damaged", newest)
    slidex.fit(
        easy_data,
        tmp_path / "run",
        settings,
        resume=True,
        notify=lambda kind, facts: messages.append((kind, facts)),
    )
    assert any("trying an older checkpoint" in facts.get("text", "") for _, facts in messages)
    got = weights(run)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize("name", ["run.json", "names/class_counts.npy", "names/labels.jsonl"])
def test_a_run_with_a_missing_or_altered_file_is_refused_by_name(easy_data, tmp_path, name):
    run = slidex.fit(easy_data, tmp_path / "run", config(mode="exact", max_steps=1))
    file = run.path / name
    original = file.read_bytes()
    file.write_bytes(b"x" + original[1:])
    with pytest.raises(CheckpointError, match=name.split("/")[-1]):
        slidex.Run.open(run.path)
    file.unlink()
    with pytest.raises(CheckpointError, match=name.split("/")[-1]):
        slidex.Run.open(run.path)


def test_evaluate_refuses_a_data_set_of_another_size(easy_data, tmp_path):
    run = slidex.fit(easy_data, tmp_path / "run", config(mode="exact", max_steps=1))
    meta = json.loads((run.path / "run.json").read_text())
    run.meta["num_classes"] = 299
    with pytest.raises(DataError, match=r"has 300 classes; the run .* was trained on 299"):
        slidex.evaluate(run, easy_data)
    assert meta["num_classes"] == 300


def test_predictions_have_names_and_descend(easy_data, tmp_path):
    run = slidex.fit(easy_data, tmp_path / "run", config(mode="exact", epochs=15))
    rows = easy_data.split("test").x.slice(0, 10)
    records = list(slidex.predict(run.model(), [rows], 3, names=run.label_names()))
    assert [r["row"] for r in records] == list(range(10))
    for record in records:
        scores = [c["score"] for c in record["classes"]]
        assert scores == sorted(scores, reverse=True)
        assert all(c["name"] == f"class {c['id']}" for c in record["classes"])


def test_learning_rate_schedules():
    rates = {
        name: [learning_rate(config(lr_schedule=name, warmup=0.2), s, 10) for s in range(1, 11)]
        for name in ("constant", "linear", "cosine")
    }
    for values in rates.values():
        np.testing.assert_allclose(values[:3], [0.01, 0.02, 0.02])
    np.testing.assert_allclose(rates["constant"][2:], 0.02)
    np.testing.assert_allclose(np.diff(rates["linear"][2:]), -0.02 / 8)
    assert rates["cosine"][6] == pytest.approx(0.01)


def test_shared_mode_trains_with_fewer_tables_than_single_rows_are_predicted_with(easy_data, tmp_path):
    run = slidex.fit(easy_data, tmp_path / "run", config(mode="shared", index_options={"bits": 3}))
    assert run.model().index.stats().tables == SHARED_TABLES
    assert run.model(indexed=True).index.stats().tables == index_settings("simhash")["tables"] > SHARED_TABLES
    chosen = config(mode="shared", index_options={"bits": 3, "tables": 5})
    run = slidex.fit(easy_data, tmp_path / "chosen", chosen)
    assert run.model().index.stats().tables == run.model(indexed=True).index.stats().tables == 5
