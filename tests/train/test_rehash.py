"""The trainer's use of the index: updates of the touched rows, builds, and samples of hidden vectors to learn from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import slidex
from slidex.data import CsrArrays
from slidex.errors import CheckpointError, ConfigError
from slidex.lsh import ExactIndex, index
from slidex.nn import rehash
from slidex.nn.class_record import ClassRecord
from slidex.nn.classifier import Classifier
from slidex.nn.rehash import Rehasher
from slidex.train.config import TrainConfig
from slidex.train.queries import draw_queries
from slidex.train.settle import settle

SMALL = {
    "mode": "shared",
    "hidden_width": 16,
    "batch_size": 16,
    "pool_size": 10,
    "index_options": {"bits": 3, "tables": 4},
    "rehash": "fixed",
    "rehash_every": 3,
    "max_steps": 20,
    "learning_rate": 0.02,
    "report_every": 20,
    "precision": "float32",
}
C, D = 100, 4


class Calls:
    """An index that notes how it is brought up to date."""

    num_classes, uses_queries = C, False

    def __init__(self):
        self.calls = []

    def build(self, *_, queries):
        self.calls.append(("build", queries))

    def update(self, _weight_CD, _bias_C, changed_ids):
        self.calls.append(("update", changed_ids.tolist()))


class Head:
    weight, bias = torch.zeros(C, D), torch.zeros(C)


def touch(record, ids):
    record.note(torch.tensor([ids]), CsrArrays(np.array([0, 1]), np.array(ids[:1]), None, C))


def make_rehasher(**attributes):
    calls, record = Calls(), ClassRecord(C)
    for name, value in attributes.items():
        setattr(calls, name, value)
    config = TrainConfig(rehash="fixed", rehash_every=1)
    return Rehasher(config, calls, Head(), record, lambda step: f"drawn at {step}"), calls, record


def test_few_touched_rows_are_updated_and_many_built():
    rehasher, calls, record = make_rehasher()
    done = [rehasher.rehash_if_due(0)]
    for step, count in enumerate((50, 51, 1), 1):
        touch(record, list(range(count - 1, -1, -1)))
        done.append(rehasher.rehash_if_due(step))
    assert calls.calls == [("build", None), ("update", list(range(50))), ("build", None), ("update", [0])]
    assert [(item.updated, item.rows) for item in done] == [(False, C), (True, 50), (False, C), (True, 1)]
    assert rehasher.rehash_if_due(3) is None


def test_a_build_comes_when_as_many_rows_were_updated_as_there_are_classes():
    rehasher, calls, record = make_rehasher()
    for step in range(6):
        touch(record, list(range(40)))
        if step == 3:  # the count is part of the state
            state = rehasher.state_dict()
            rehasher._updated_rows = 0
            rehasher.load_state_dict(state)
        rehasher.rehash_if_due(step)
    assert [kind for kind, _ in calls.calls] == ["build", "update", "update", "build", "update", "update"]


def test_an_index_that_learns_is_always_built_with_fresh_queries():
    rehasher, calls, record = make_rehasher(uses_queries=True)
    for step in range(2):
        touch(record, [5])
        rehasher.rehash_if_due(step)
    assert calls.calls == [("build", "drawn at 0"), ("build", "drawn at 1")]


def test_updates_train_the_very_model_that_builds_do(easy_data, tmp_path, monkeypatch):
    runs, reports = [], []
    for name, share in (("updates", 0.5), ("builds", -1)):
        monkeypatch.setattr(rehash, "UPDATE_SHARE", share)
        runs.append(slidex.fit(easy_data, tmp_path / name, TrainConfig(**SMALL)))
        reports.append(next(e for e in runs[-1].log() if e["event"] == "report"))
    assert 3 <= reports[0]["index_updates"] < reports[0]["rehashes"] == 7
    assert (reports[1]["index_updates"], reports[1]["rows_rehashed"]) == (0, 7 * 300)
    assert reports[0]["rows_rehashed"] < reports[1]["rows_rehashed"]
    for part in ("encoder", "head", "index"):
        first, second = (run.checkpoint().tensors(part) for run in runs)
        assert all(torch.equal(first[name], second[name]) for name in first)


class MeanQuery(ExactIndex):
    """Learns the mean of all hidden vectors it is given; the queries of every build are kept in `given`."""

    uses_queries = True
    given: list = None

    def __init__(self, in_features, num_classes, *, seed):
        super().__init__(in_features, num_classes, seed=seed)
        self.mean_D = torch.zeros(in_features)

    def build(self, weight_CD, bias_C=None, *, queries=None):
        super().build(weight_CD, bias_C, queries=queries)
        self.given.append(queries)
        if queries is not None:
            self.mean_D = queries.hidden_ND.mean(0)

    def state(self):
        return {"mean": self.mean_D}

    def load_state(self, state, weight_CD, bias_C=None):
        if state["mean"].shape != self.mean_D.shape:
            raise ConfigError("The 'state' is of another width.")
        super().load_state({}, weight_CD, bias_C)
        self.mean_D = state["mean"]


@pytest.fixture
def mean_query(monkeypatch):
    monkeypatch.setattr(index, "_FACTORIES", dict(index._FACTORIES))
    monkeypatch.setattr(index, "_SETTINGS", dict(index._SETTINGS))
    monkeypatch.setattr(MeanQuery, "given", [])
    index.register_index("mean-query")(MeanQuery)
    return TrainConfig(
        **SMALL | {"index": "mean-query", "index_options": {}, "index_sample": 700, "input_dropout": 0.3}
    )


def test_a_learning_index_gets_hidden_vectors_and_their_classes(easy_data, tmp_path, mean_query):
    run = slidex.fit(easy_data, tmp_path / "run", mean_query)
    given = list(MeanQuery.given)
    assert len(given) == 7
    split = easy_data.split("train")
    model = Classifier.from_config(
        settle(mean_query, easy_data), easy_data.num_features, 300, easy_data.class_counts()
    )
    with torch.no_grad():
        hidden_ND = model.encoder(split.x.take(np.arange(1200)))
    first = given[0]
    assert first.hidden_ND.shape == (700, 16)
    found = torch.cdist(first.hidden_ND.double(), hidden_ND.double()).argmin(1).numpy()
    assert len(set(found)) > 690  # without replacement, but for rows that look alike
    np.testing.assert_allclose(first.hidden_ND, hidden_ND[found], atol=1e-6)
    labels = split.y.take(found)
    assert np.array_equal(first.label_indptr, labels.indptr)
    assert np.mean(first.label_ids.numpy() == labels.indices) > 0.98
    assert not torch.equal(given[1].label_ids, first.label_ids)
    report = next(e for e in run.log() if e["event"] == "report")
    assert (report["rehashes"], report["index_updates"]) == (7, 0)

    learned = run.checkpoint().tensors("index")["mean"]
    assert torch.equal(run.model(indexed=True).index.mean_D, learned)
    assert MeanQuery.given[-1] is None
    assert learned.abs().sum() > 0
    torch.testing.assert_close(learned, given[-1].hidden_ND.mean(0))


def test_a_damaged_learned_state_is_a_checkpoint_error(easy_data, tmp_path, mean_query, monkeypatch):
    run = slidex.fit(easy_data, tmp_path / "run", mean_query)
    monkeypatch.setattr(
        MeanQuery, "load_state", lambda *_: (_ for _ in ()).throw(ConfigError("another width"))
    )
    with pytest.raises(CheckpointError, match=r"index\.safetensors: does not fit run\.json: another width"):
        run.model(indexed=True)


def test_the_sample_is_a_function_of_seed_and_step(easy_data):
    split = easy_data.split("train")
    config = settle(TrainConfig(**SMALL), easy_data)
    encoder = Classifier.from_config(config, easy_data.num_features, 300, easy_data.class_counts()).encoder
    rows = np.arange(100, 1200)

    def draw(seed, step, count=600):
        return draw_queries(encoder, split.x, split.y, rows, count, seed=seed, step=step)

    first, again = draw(1, 5), draw(1, 5)
    assert torch.equal(first.hidden_ND, again.hidden_ND)
    assert torch.equal(first.label_ids, again.label_ids)
    for other in (draw(1, 6), draw(2, 5)):
        assert not torch.equal(first.hidden_ND, other.hidden_ND)
    every = draw(1, 5, count=5000)
    assert np.array_equal(every.label_ids, split.y.take(rows).indices)
