"""A run with a ranker: fitted when the training ends, kept whole, found again, and refused where it does not fit."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

import slidex
from slidex.cli.inspect import run_facts
from slidex.cli.training_display import TrainingDisplay
from slidex.data import CsrArrays, DatasetWriter
from slidex.errors import CheckpointError, ConfigError, InterruptedRunError
from slidex.kernels import RowLabels
from slidex.kernels.cpu import linear_fit
from slidex.metrics import propensities
from slidex.nn import ranker
from slidex.nn.class_groups import distinct_groups, group_labels
from slidex.nn.ranker import NeighborSearch, class_pairs, neighbor_search, row_tensors, without
from slidex.train import kept_ranker, ranking
from slidex.train.config import TrainConfig
from slidex.train.kept_ranker import load_ranker

SMALL = {
    "hidden_width": 8,
    "batch_size": 64,
    "epochs": 2,
    "mode": "exact",
    "learning_rate": 0.02,
    "ranker_candidates": 20,
    "ranker_weight": 5.0,
    "precision": "float32",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Each row's classes are named by two features each; a network of width 8 is far too narrow for 200 classes."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("ranking") / "data"
    with DatasetWriter(folder) as writer:
        for split, rows in (("train", 1500), ("test", 300)):
            y = np.sort(rng.permuted(np.tile(np.arange(200), (rows, 1)), axis=1)[:, :2], axis=1)
            x = np.sort(np.concatenate([y, 200 + y // 2], axis=1), axis=1)
            x[:, 2:] += np.arange(2) * (x[:, 2:3] == x[:, 3:])  # no feature twice
            ones = np.arange(rows + 1)
            writer.append(
                split,
                CsrArrays(ones * 4, x.ravel().astype(np.int32), None, 302),
                CsrArrays(ones * 2, y.ravel().astype(np.int32), None, 200),
            )
        return writer.finish(
            num_features=302, num_classes=200, source={"format": "test", "files": [], "options": {}}
        )


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    return slidex.fit(data, tmp_path_factory.mktemp("ranking-run") / "run", config())


def config(**changes):
    return TrainConfig.from_mapping(SMALL | changes)


def test_the_ranker_finds_what_a_narrow_network_cannot(run, data, tmp_path):
    plain = slidex.fit(data, tmp_path / "plain", config(ranker_candidates=0))
    before, after = slidex.evaluate(plain, data), slidex.evaluate(run, data)
    assert after["P@1"] > before["P@1"] + 0.1
    for a, b in zip(plain.model().head.parameters(), run.model().head.parameters(), strict=True):
        assert torch.equal(a, b)  # the network is the same


def test_weights_are_those_of_the_rows_each_class_was_a_candidate_for(run, data):
    split, network = data.split("train"), run.network()
    ids_NA = torch.cat([ids for _, ids in network.topk(split.x, 20)])
    pairs = class_pairs(split.y, ids_NA.int().numpy())
    kept = load_ranker(run.path)
    assert (kept.rows, kept.pairs) == (1500, len(pairs.rows))
    assert kept.step == run.checkpoint().step
    arguments = *pairs, *row_tensors(split.x.take(np.arange(1500)).unit_rows()), data.num_features
    counts_C = np.bincount(split.y.indices, minlength=200)
    assert counts_C.min() < 30
    cost = torch.from_numpy(np.sqrt(30 / counts_C).clip(1).astype(np.float32))
    numbers = {"centroid": 2.0, "origin": -1.0, "tolerance": 0.5, "threshold": 0.1}
    want = linear_fit(*arguments, cost=cost, **numbers)
    for name in ("indptr", "features", "values", "bias"):
        assert torch.equal(getattr(kept.weights, name), getattr(want, name))


def test_cost_of_classes_with_few_rows():
    """Three classes with one row, one with two, one with 40, one with none: (2 * 1 + 1) / (3 + 1) of one row is due."""
    labels = np.repeat(np.arange(5), (1, 1, 1, 2, 40))
    once = np.sqrt(30 * 3 / 4)
    want = np.array([once, once, once, np.sqrt(15), 1, np.sqrt(30)], np.float32)
    indptr = np.arange(len(labels) + 1)
    found = ranking.cost_factors(CsrArrays(indptr, labels.astype(np.int32), None, 6))
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-6)


def test_classes_with_one_row_cost_no_more_for_many_with_two():
    labels = np.array([0, 1, 1, 2, 2], np.int32)
    found = ranking.cost_factors(CsrArrays(np.arange(6), labels, None, 3))
    np.testing.assert_allclose(found.numpy(), np.sqrt([30, 15, 15]), rtol=1e-6)


def test_every_setting_changes_the_ranking(run, data, tmp_path):
    x = data.split("test").x
    seen = [torch.cat([scores for scores, _ in run.model().topk(x, 5)])]
    for n, change in enumerate(
        (
            {"ranker_cost": 0.1},
            {"ranker_threshold": 0.5},
            {"ranker_tolerance": 0.01},
            {"ranker_weight": 1.0},
            {"ranker_tail": 2.0},
            {"ranker_floor": 0.1},
            {"ranker_candidates": 3},
            {"ranker_neighbors": 3},
            {"ranker_groups": 3},
        )
    ):
        other = slidex.fit(data, tmp_path / str(n), config(**change))
        scores = torch.cat([scores for scores, _ in other.model().topk(x, 5)])
        assert all(not torch.equal(scores, before) for before in seen)
        seen.append(scores)


def test_the_tail_setting_adds_the_log_of_inverse_propensities(run, data, tmp_path):
    tail = slidex.fit(data, tmp_path / "run", config(ranker_tail=2.0))
    x, ids_NA = data.split("test").x.take(np.arange(30)), torch.arange(200).repeat(30, 1)
    added_NC = tail.model().scores(x, ids_NA) - run.model().scores(x, ids_NA)
    want_C = -2 * np.log(propensities(run.class_counts(), 1500))
    np.testing.assert_allclose(added_NC.numpy(), np.tile(want_C, (30, 1)), atol=1e-4)


def test_many_classes_have_their_candidates_from_an_index(run, data, tmp_path, monkeypatch):
    monkeypatch.setattr(ranking, "EXACT_CLASSES", 199)
    asked = []
    make = ranking.make_index
    monkeypatch.setattr(ranking, "make_index", lambda *a, **k: asked.append((a, k)) or make(*a, **k))
    indexed = slidex.fit(data, tmp_path / "run", config())
    assert [(a[0], k["insert"]) for a, k in asked] == [("learned", 64)]  # with labels inserted
    assert slidex.evaluate(indexed, data)["P@1"] > slidex.evaluate(run, data)["P@1"] - 0.05


def test_neighbours_bring_classes_that_a_network_does_not_know(data, tmp_path):
    """One step of training: the network's candidates are as good as drawn by lot."""
    raw = {"max_steps": 1, "ranker_candidates": 2}
    alone, both = (
        slidex.fit(data, tmp_path / str(count), config(**raw, ranker_neighbors=count)) for count in (0, 10)
    )
    assert slidex.evaluate(alone, data)["P@1"] < 0.3
    assert slidex.evaluate(both, data)["P@1"] > 0.7


def test_fitted_rows_are_those_of_network_and_neighbours(data, tmp_path):
    run = slidex.fit(data, tmp_path / "run", config(ranker_candidates=4, ranker_neighbors=5))
    split, kept = data.split("train"), load_ranker(run.path)
    x = split.x.take(np.arange(1500))
    search = neighbor_search(x, split.y)
    for name in ("indptr", "rows", "values"):
        assert torch.equal(getattr(kept.search.index, name), getattr(search.index, name))
    ids_NA = torch.cat([ids for _, ids in run.network().topk(x, 4)])
    found_NB = search.classes(x, 100 + 5, torch.arange(1500))  # a row is no neighbour of its own
    both_NA = torch.cat([ids_NA, without(found_NB, ids_NA)], 1)
    assert kept.pairs == len(class_pairs(split.y, both_NA.int().numpy()).rows)
    assert run.model().ranker.proposed == 5
    size = f"index of training rows ({kept.search.nbytes / 1e6:.1f} MB)"
    assert size in run_facts(run.path, verify=False)["ranker"]


def test_groups_are_fitted_on_rows_of_their_classes_and_rows_that_have_them_as_candidates(data, tmp_path):
    run = slidex.fit(data, tmp_path / "run", config(ranker_candidates=4, ranker_neighbors=5, ranker_groups=7))
    split, kept = data.split("train"), load_ranker(run.path)
    x, group_C = split.x.take(np.arange(1500)), kept.groups.group_C
    assert len(group_C.unique()) == 7
    ids_NA = torch.cat([ids for _, ids in run.network().topk(x, 4)])
    found_NB = neighbor_search(x, split.y).classes(x, 100 + 5, torch.arange(1500))
    both_NA = torch.cat([ids_NA, without(found_NB, ids_NA)], 1)
    labels = group_labels(group_C, split.y, 7)
    pairs = class_pairs(labels, distinct_groups(group_C, both_NA, 64)[0].numpy())
    cost = ranking.cost_factors(labels)
    want = linear_fit(
        *pairs,
        *row_tensors(x.unit_rows()),
        302,
        cost=cost,
        centroid=2.0,
        origin=-1.0,
        tolerance=0.5,
        threshold=0.1,
    )
    for name in ("indptr", "features", "values", "bias"):
        assert torch.equal(getattr(kept.groups.weights, name), getattr(want, name))
    used = run.model().ranker.groups
    assert torch.equal(used.group_C, group_C)
    assert torch.equal(used.weights.values, want.values)
    size = f"7 groups of classes ({kept.groups.nbytes / 1e6:.1f} MB)"
    assert size in run_facts(run.path, verify=False)["ranker"]


def test_there_are_no_more_groups_than_classes(data, tmp_path):
    run = slidex.fit(data, tmp_path / "run", config(ranker_groups=1000))
    assert 150 < load_ranker(run.path).groups.num_groups <= 200
    assert slidex.evaluate(run, data)["P@1"] > 0.4


def test_the_network_proposes_from_the_same_classes_in_fitting_as_in_prediction(data, tmp_path, monkeypatch):
    monkeypatch.setattr(ranker, "MIN_KNOWN", 5)
    counts = data.class_counts()
    least = int(np.sort(counts)[-20])
    told, pairs = [], ranking.class_pairs
    monkeypatch.setattr(
        ranking, "class_pairs", lambda y, found_NA: told.append(found_NA) or pairs(y, found_NA)
    )
    for n, (count, neighbors, limit) in enumerate(((4, 5, 1000), (30, 5, 1000), (4, 5, 10), (4, 0, 1000))):
        monkeypatch.setattr(ranking, "EXACT_CLASSES", limit)
        settings = config(ranker_candidates=count, ranker_neighbors=neighbors, ranker_min_rows=least)
        slidex.fit(data, tmp_path / str(n), settings)
    known, more, indexed, alone = (
        counts[found_NA[:, :count]] for found_NA, count in zip(told, (4, 30, 4, 4), strict=True)
    )
    assert known.min() >= least
    for proposed in (
        more,
        indexed,
        alone,
    ):  # from all: more than are known, from an index, without neighbours
        assert proposed.min() < least


def test_no_training_row_is_a_neighbour_of_its_own(data, tmp_path, monkeypatch):
    told, classes = [], NeighborSearch.classes

    def spy(search, x, count, own_N=None):
        told.append(own_N)
        return classes(search, x, count, own_N)

    monkeypatch.setattr(NeighborSearch, "classes", spy)
    monkeypatch.setattr(ranking, "PREDICT_ROWS", 700)
    slidex.fit(data, tmp_path / "run", config(ranker_neighbors=5))
    assert torch.equal(torch.cat(told), torch.arange(1500))
    assert len(told) == 3


def test_indexed_prediction_and_mistakes_use_it(data, tmp_path):
    settings = config(mode="shared", pool_size=50, index_options={"bits": 2, "tables": 30})
    run = slidex.fit(data, tmp_path / "run", settings)
    found = slidex.evaluate(run, data, indexed=True, errors=2)
    assert found["P@1"] > 0.4
    model = run.model()
    for mistake in found["errors"]:
        row = data.split("test").x.take(np.array([mistake["row"]]))
        ids = torch.tensor([[item["id"] for item in mistake["true"]]])
        want = [item["score"] for item in mistake["true"]]
        np.testing.assert_allclose(model.scores(row, ids)[0].numpy(), want, atol=1e-3)


def test_probabilities_are_the_networks(run, data):
    x = data.split("test").x.slice(0, 50)
    records = list(slidex.predict(run.model(), [x], 5, probabilities=True))
    (want,) = run.network().ranked(x, 200, totals=True)
    share_NK = (want.logits_NK - want.log_total_N[:, None]).exp()
    for n, record in enumerate(records):
        scores = [c["score"] for c in record["classes"]]
        assert scores == sorted(scores, reverse=True)
        for c in record["classes"]:
            at = int((want.ids_NK[n] == c["id"]).nonzero())
            assert c["probability"] == pytest.approx(float(share_NK[n, at]), rel=1e-4)


def test_more_training_fits_it_anew_and_resuming_without_more_leaves_it(data, tmp_path):
    run = slidex.fit(data, tmp_path / "run", config())
    file = run.path / "ranker" / "ranker.json"
    before = file.stat().st_mtime_ns
    slidex.fit(data, run.path, config(), resume=True)
    assert file.stat().st_mtime_ns == before
    longer = slidex.fit(data, run.path, config(epochs=3), resume=True)
    assert load_ranker(run.path).step == longer.checkpoint().step == 72
    assert len(list(file.parent.glob("state_*"))) == 1


def test_a_signal_keeps_the_network_and_resuming_fits_the_ranker(data, tmp_path):
    def notify(event, facts):
        if event == "ranker" and facts["stage"] == "weights":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedRunError, match=r"SIGTERM while the ranker was fitted.*--resume"):
        slidex.fit(data, tmp_path / "run", config(), notify=notify)
    run = slidex.Run.open(tmp_path / "run")
    assert load_ranker(run.path) is None
    with pytest.raises(
        CheckpointError, match="ask for a ranker for the weights of step 48; there is none yet"
    ):
        run.model()
    slidex.fit(data, run.path, config(), resume=True)
    assert slidex.evaluate(run, data)["P@1"] > 0.4


def test_damage_is_refused(data, tmp_path):
    import shutil

    run = slidex.fit(data, tmp_path / "run", config(ranker_neighbors=5, ranker_groups=4))

    def damaged(change):
        copy = tmp_path / change.__name__
        shutil.copytree(run.path, copy)
        change(copy / "ranker" / "ranker.json", next((copy / "ranker").glob("state_*")))
        return slidex.Run.open(copy)

    def cut(_file, state):
        state.write_bytes(state.read_bytes()[:-1])

    def altered(file, _state):
        file.write_text(file.read_text().replace('"pairs": ', '"pairs": 1'))

    def gone(_file, state):
        state.unlink()

    def newer(file, _state):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 3}))

    def other_features(file, _state):
        kept = load_ranker(file.parents[1])
        index = replace(kept.search.index, indptr=kept.search.index.indptr[:-1].clone())
        index.indptr[-1] = len(index.rows)
        kept_ranker.save_ranker(file.parents[1], replace(kept, search=replace(kept.search, index=index)))

    def other_labels(file, _state):
        kept = load_ranker(file.parents[1])
        labels = RowLabels(kept.search.labels.indptr, kept.search.labels.classes + 200, 1000)
        search = replace(kept.search, labels=labels)
        kept_ranker.save_ranker(file.parents[1], replace(kept, search=search))

    def other_classes(file, _state):
        kept = load_ranker(file.parents[1])
        groups = replace(kept.groups, group_C=kept.groups.group_C[:-1].clone())
        kept_ranker.save_ranker(file.parents[1], replace(kept, groups=groups))

    def other_groups(file, _state):
        kept = load_ranker(file.parents[1])
        kept.groups.group_C[0] = 4
        kept_ranker.save_ranker(file.parents[1], kept)

    for change, message in (
        (other_classes, "groups of 199 classes for 200"),
        (other_groups, r"damaged: .* groups in \[0, 4\)"),
        (other_features, "an index of 301 features for 302"),
        (other_labels, r"damaged: .* ids in \[0, 200\)"),
        (cut, "bytes; it should have"),
        (altered, "was altered"),
        (gone, "is missing"),
        (newer, "of version 3"),
    ):
        with pytest.raises(CheckpointError, match=message):
            damaged(change).model()


@pytest.mark.parametrize(
    ("call", "error"),
    [("write_atomically", OSError("no space left")), ("save_file", SafetensorError("no space left"))],
    ids=repr,
)
def test_a_failed_write_leaves_the_old_one(run, tmp_path, monkeypatch, call, error):
    kept = load_ranker(run.path)
    kept_ranker.save_ranker(tmp_path, kept)
    before = sorted(tmp_path.rglob("*"))

    def fail(tensors, file):
        if call == "save_file":
            file.with_name("half").write_bytes(b"half")
        raise error

    monkeypatch.setattr(f"slidex.train.records.{call}", fail)
    with pytest.raises(CheckpointError, match="no space left"):
        kept_ranker.save_ranker(tmp_path, kept)
    monkeypatch.undo()
    assert sorted(tmp_path.rglob("*")) == before
    assert load_ranker(tmp_path).pairs == kept.pairs


@pytest.mark.parametrize(
    "change",
    [
        {"ranker_candidates": -1},
        {"ranker_neighbors": -1},
        {"ranker_groups": -1},
        {"ranker_cost": 0.0},
        {"ranker_threshold": -0.1},
        {"ranker_tolerance": 0.0},
        {"ranker_weight": -1.0},
    ],
)
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        config(**change)


@pytest.mark.parametrize("name", ["ranker_neighbors", "ranker_groups"])
def test_parts_of_a_ranker_without_one_are_refused(name):
    with pytest.raises(ConfigError, match=f"'ranker_candidates' setting must be above 0 where '{name}' is"):
        config(ranker_candidates=0, **{name: 5})


def test_inspect_and_the_display_tell_of_it(run, data, tmp_path):
    with TrainingDisplay() as display:
        fresh = slidex.fit(data, tmp_path / "run", config(ranker_groups=9), notify=display)
    facts = run_facts(fresh.path, verify=False)
    kept = load_ranker(run.path)
    assert facts["ranker"].startswith(f"{len(kept.weights.values):,} weights (")
    assert f"{kept.pairs:,} pairs of class and row; step 48" in facts["ranker"]


def test_events_count_up_to_all_rows_and_classes(data, tmp_path):
    told = []
    slidex.fit(
        data,
        tmp_path / "run",
        config(ranker_groups=9),
        notify=lambda event, facts: told.append((event, dict(facts))),
    )
    stages = [facts for event, facts in told if event == "ranker"]
    totals = {"candidates": 1500, "weights": 200, "groups": 9}
    assert list(dict.fromkeys(facts["stage"] for facts in stages)) == list(totals)
    for stage, total in totals.items():
        done = [facts["done"] for facts in stages if facts["stage"] == stage]
        assert done == sorted(done)
        assert done[-1] == total
        assert {facts["total"] for facts in stages if facts["stage"] == stage} == {total}
    assert told[-1][0] == "ranker"
