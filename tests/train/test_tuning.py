"""Tuning: which rows choose, report and are learned from; the goal is kept; the choice is used."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import slidex
from slidex.data import DatasetWriter
from slidex.errors import CheckpointError, ConfigError, DataError, SlidexError
from slidex.train import tuning
from slidex.train.config import TrainConfig
from slidex.train.held_out import held_out, training_queries
from slidex.train.predict import predict
from slidex.train.run import Run
from slidex.train.search_space import search_space
from slidex.train.settle import STREAM_VALID, counter_rng
from slidex.train.tuned import load_tuned
from slidex.train.tuning import Exact, TuneSettings, tune
from tests.conftest import checkerboard

SMALL = {
    "mode": "shared", "pool_size": 100, "hidden_width": 32, "batch_size": 64, "learning_rate": 0.02,
    "precision": "float32", "report_every": 1000, "valid_every": 1000,
}  # fmt: skip
CHOICE = TuneSettings(rows=80, indexes=("simhash",), partition_classes=50)


@pytest.fixture(scope="module")
def split_data(tmp_path_factory):
    """600 training and 100 test rows over 150 classes, no validation rows."""
    with DatasetWriter(tmp_path_factory.mktemp("split") / "data") as writer:
        for split, rows, seed in (("train", 600, 1), ("test", 100, 2)):
            writer.append(split, *checkerboard(rows, 150, seed, labels_per_row=2))
        return writer.finish(
            num_features=170, num_classes=150, source={"format": "test", "files": [], "options": {}}
        )


@pytest.fixture(scope="module")
def trained(split_data, tmp_path_factory) -> Run:
    return slidex.fit(
        split_data,
        tmp_path_factory.mktemp("runs") / "run",
        TrainConfig(**SMALL, epochs=15, valid_fraction=0.1),
    )


@pytest.fixture(scope="module")
def tuned(split_data, trained):
    return tune(trained, split_data, CHOICE)


def same_row(x, n, other, m) -> bool:
    own, theirs = (np.asarray(a.indices[a.indptr[i] : a.indptr[i + 1]]) for a, i in ((x, n), (other, m)))
    return np.array_equal(own, theirs)


def test_rows_come_from_the_split_asked_for_else_validation_else_training(easy_data, split_data, trained):
    with_valid_split = Run(trained.path, trained.meta)
    assert held_out(with_valid_split, easy_data, None, 50).source == "the valid split"
    asked = held_out(trained, split_data, "test", 50)
    assert (asked.source, len(asked.excluded)) == ("the test split", 0)
    own = held_out(trained, split_data, None, 50)
    assert own.source == "the run's validation rows"
    drawn = counter_rng(0, STREAM_VALID, 0).choice(600, 60, replace=False)
    assert set(own.excluded) == set(drawn)
    assert own.x.num_rows == 50
    train = split_data.split("train")
    assert all(any(same_row(own.x, n, train.x, m) for m in drawn) for n in range(5))
    meta = trained.meta | {"config": trained.meta["config"] | {"valid_fraction": 0.0}}
    none = held_out(Run(trained.path, meta), split_data, None, 50)
    assert none.source == "the train split: rows the model was trained on"
    assert len(none.excluded) == 50
    assert held_out(Run(trained.path, meta), split_data, None, 5000).x.num_rows == 120  # a fifth of them
    again = held_out(Run(trained.path, meta), split_data, None, 50)
    assert np.array_equal(none.x.indices, again.x.indices)


def test_held_out_training_rows_of_another_data_set_are_unknown(split_data, trained):
    meta = trained.meta | {"data": trained.meta["data"] | {"fingerprint": "another"}}
    with pytest.raises(DataError, match=r"is not the data set that .* give --split"):
        held_out(Run(trained.path, meta), split_data, None, 50)
    assert held_out(Run(trained.path, meta), split_data, "test", 50).source == "the test split"


def test_halves_share_no_row(split_data, trained):
    held = held_out(trained, split_data, "test", 41)
    (first, _), (second, _) = held.half(False), held.half(True)
    assert (first.num_rows, second.num_rows) == (20, 21)
    assert np.array_equal(np.concatenate([first.indices, second.indices]), held.x.indices)


def test_an_index_learns_from_no_held_out_row(split_data, trained):
    model = trained.model()
    excluded = np.array([0, 5, 599])
    queries = training_queries(model, split_data, excluded, None)
    rows = np.setdiff1d(np.arange(600), excluded)
    y = split_data.split("train").y.take(rows)
    assert np.array_equal(queries.label_ids.numpy(), y.indices)
    with torch.no_grad():
        torch.testing.assert_close(queries.hidden_ND, model.encoder(split_data.split("train").x.take(rows)))
    assert len(training_queries(model, split_data, excluded, 100).hidden_ND) == 100


def test_shares_against_a_plain_count():
    hidden_ND = torch.zeros(4, 1)
    exact_ids = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 5, -1]])
    labels = slidex.data.CsrArrays(
        np.array([0, 1, 2, 3, 4]), np.array([1, 4, 3, 1], dtype=np.int32), None, 10
    )
    exact = Exact(hidden_ND, labels, exact_ids, torch.zeros(4), np.array([True, True, False, True]))
    found = exact.shares(torch.tensor([[1, 9, 8], [6, 4, 5], [3, 7, -1], [5, -1, -1]]))
    assert found["hits"] == pytest.approx(1 / 3)  # of rows 0, 1 and 3 only row 0
    assert found["P@1 kept"] == pytest.approx(2 / 3)  # rows 0 and 2 of three
    assert found["top-k"] == pytest.approx(6 / 11)  # 1, 3, 1 and 1 of eleven


def test_the_choice_is_the_fastest_that_keeps_the_goal(split_data, trained, tuned):
    meeting = [trial for trial in tuned.trials if trial["meets"]]
    assert meeting
    assert all(trial["hits"] >= 0.99 for trial in meeting)
    assert all(trial["hits"] < 0.99 for trial in tuned.trials if not trial["meets"])
    fastest = min(meeting, key=lambda trial: trial["microseconds_per_row"])
    assert (tuned.index, tuned.options, tuned.candidates) == (
        fastest["index"],
        fastest["options"],
        fastest["candidates"],
    )
    assert len(tuned.trials) == len(search_space(150, ("simhash",)))
    assert load_tuned(trained.path) == tuned
    assert tuned.rows == {
        "source": "the run's validation rows",
        "chosen_on": 30,
        "reported_on": 30,
        "learned_from": 540,
        "goal": 0.99,
        "measure": "hits",
    }
    json.dumps(tuned.report, allow_nan=False)


def test_the_report_is_of_the_rows_that_did_not_choose(split_data, trained, tuned):
    held = held_out(trained, split_data, None, 80)
    x, y = held.half(True)
    ids = torch.cat([ids for _, ids in trained.model(indexed=True).topk(x, 5, indexed=True)])
    exact = Exact.of(trained.model(), x, y, 5)
    for name, share in exact.shares(ids).items():
        assert tuned.report[name] == share
    assert tuned.report["exact P@1"] == exact.hit_N.mean() > 0.5


def test_eval_and_predict_use_it(split_data, trained, tuned):
    model = trained.model(indexed=True)
    assert model.candidates == tuned.candidates
    assert model.partition_classes == 50
    assert model.index.query(torch.ones(1, 32), 3).shape == (1, 3)
    found = slidex.evaluate(trained, split_data, indexed=True)
    assert found["tuned_index"]["index"] == tuned.describe()
    assert found["tuned_index"]["hits"] == tuned.report["hits"]
    assert "tuned_index" not in slidex.evaluate(trained, split_data)
    assert found["P@1"] >= 0.95 * slidex.evaluate(trained, split_data)["P@1"]


def test_a_choice_for_other_weights_is_refused(trained, tuned):
    checkpoint = trained.checkpoint()

    class Later:
        step = checkpoint.step + 1

    with pytest.raises(
        CheckpointError, match=rf"was tuned for the weights of step {checkpoint.step}; the run now"
    ):
        trained.tuned(Later())


def test_an_unreachable_goal_keeps_the_old_choice(split_data, trained, tuned, monkeypatch):
    few = [("simhash", {"bits": 8, "tables": 1}), ("simhash", {"bits": 8, "tables": 2})]
    monkeypatch.setattr(tuning, "search_space", lambda *_: few)
    with pytest.raises(
        SlidexError, match=r"no index keeps 1 of top-k; the nearest is simhash .*'tables': 2.* Lower"
    ):
        tune(trained, split_data, replace(CHOICE, recall=1.0, measure="top-k"))
    assert load_tuned(trained.path) == tuned


def test_the_other_measure_and_more_classes(split_data, trained, tuned, monkeypatch):
    monkeypatch.setattr(tuning, "save_tuned", lambda *_: None)
    seen = []
    found = tune(trained, split_data, replace(CHOICE, measure="top-k", k=20, recall=0.9), seen.append)
    assert seen == found.trials
    assert found.candidates >= 20
    assert all(trial["top-k"] >= 0.9 for trial in seen if trial["meets"])
    fewer = tune(trained, split_data, replace(CHOICE, train_rows=10, recall=0.5))
    assert fewer.rows["learned_from"] == 10


def test_a_run_without_hits_needs_the_other_measure(split_data, tmp_path):
    config = TrainConfig(**SMALL | {"learning_rate": 0.0}, max_steps=1)
    run = slidex.fit(split_data, tmp_path / "run", config)
    labelled = held_out(run, split_data, "test", 4)
    exact = Exact.of(run.model(), *labelled.half(False), 5)
    if not exact.hit_N.any():
        with pytest.raises(ConfigError, match="'measure' parameter of tune-index must be top-k"):
            tune(run, split_data, replace(CHOICE, rows=4, split="test"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("recall", 0.0), ("recall", 1.1), ("recall", float("nan")), ("measure", "mrr"), ("k", 0), ("k", 2000),
        ("rows", 1), ("train_rows", 0), ("partition_classes", 0), ("indexes", ("simhsh",)), ("indexes", ()),
    ],
)  # fmt: skip
def test_settings_out_of_range(name, value):
    with pytest.raises(ConfigError, match=f"'{name}' parameter of tune-index"):
        search_space(10, TuneSettings(**{name: value}).indexes)


def test_wrong_data(easy_data, split_data, trained):
    with pytest.raises(DataError, match="has 300 classes"):
        tune(trained, easy_data, CHOICE)
    with pytest.raises(DataError, match="expected a split named 'dev'"):
        tune(trained, split_data, replace(CHOICE, split="dev"))


def test_probabilities(split_data, trained, tuned):
    x = split_data.split("test").x.take(np.arange(100))
    model = trained.model(indexed=True)
    logits_NC = (model.encoder(x) @ model.head.weight.T + model.head.bias).detach()
    expected_NC = logits_NC.softmax(dim=1)
    exact = list(predict(model, [x], 150, probabilities=True))
    for n, record in enumerate(exact):
        for item in record["classes"]:
            assert item["probability"] == pytest.approx(float(expected_NC[n, item["id"]]), rel=1e-4)
        assert sum(item["probability"] for item in record["classes"]) == pytest.approx(1.0, abs=1e-4)
    indexed = list(predict(model, [x], 3, indexed=True, probabilities=True))
    ratios = [
        item["probability"] / float(expected_NC[n, item["id"]])
        for n, record in enumerate(indexed)
        for item in record["classes"]
    ]
    assert len(set(ratios)) > 50  # an estimate
    assert np.median(ratios) == pytest.approx(1.0, abs=0.1)
    assert all(0 < item["probability"] <= 1 for record in indexed for item in record["classes"])
    assert "probability" not in next(predict(model, [x], 3))["classes"][0]


def test_probabilities_of_one_vs_all_are_sigmoids(split_data, tmp_path):
    run = slidex.fit(split_data, tmp_path / "run", TrainConfig(**SMALL, loss="logistic", max_steps=20))
    model, x = run.model(indexed=True), split_data.split("test").x.take(np.arange(5))
    logits_NC = (model.encoder(x) @ model.head.weight.T + model.head.bias).detach()
    for indexed in (False, True):
        for n, record in enumerate(predict(model, [x], 3, indexed=indexed, probabilities=True)):
            for item in record["classes"]:
                expected = float(logits_NC[n, item["id"]].sigmoid())
                assert item["probability"] == pytest.approx(expected, rel=1e-4)
    assert tune(run, split_data, replace(CHOICE, recall=0.5)).report["partition"] is None
