"""Coverage of the classes, and the warnings that negatives have collapsed."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch

import slidex
from slidex.data import CsrArrays, Dataset, DatasetWriter
from slidex.errors import CollapseWarning
from slidex.lsh import IndexStats, index
from slidex.nn.class_record import NEGATIVE, SEEN, TOUCHED, ClassRecord
from slidex.nn.device_labels import DeviceLabels
from slidex.train.config import TrainConfig
from slidex.train.coverage import CollapseWatch
from tests.conftest import checkerboard
from tests.nn.device_path import on_device

LABELS = CsrArrays(np.array([0, 2, 3]), np.array([4, 7, 2]), None, 10)


def test_own_true_classes_of_rows_with_sets_of_their_own_are_no_negatives():
    record = ClassRecord(10)
    record.note(torch.tensor([[4, 7, 1, 2], [2, 3, -1, -1]]), LABELS)
    assert record.ids(SEEN).tolist() == record.ids(TOUCHED).tolist() == [1, 2, 3, 4, 7]
    assert record.ids(NEGATIVE).tolist() == [1, 2, 3]
    record.clear(TOUCHED)
    record.note(torch.tensor([[9], [-1]]), CsrArrays(np.array([0, 0, 0]), np.array([], int), None, 10))
    assert record.ids(TOUCHED).tolist() == [9]
    assert (record.share(SEEN), record.share(NEGATIVE)) == (0.6, 0.4)


def test_true_classes_in_a_pool_are_negatives_of_the_other_rows():
    record = ClassRecord(10)
    record.note(torch.tensor([4, 7, 2, 1]), LABELS)
    assert record.ids(NEGATIVE).tolist() == [1, 2, 4, 7]
    record = ClassRecord(10)
    record.note(torch.tensor([4, 7, 1]), LABELS.slice(0, 1))
    assert record.ids(NEGATIVE).tolist() == [1]


@pytest.mark.parametrize(
    ("labels", "ids", "pads"),
    [
        (LABELS, [[4, 7, 1, 2], [2, 3, -1, -1]], [[4, 7, -1, 1, 2], [2, -1, 3, -1, -1]]),
        (LABELS, [4, 7, 2, 1], [4, 7, -1, -1, 2, 1]),
        (LABELS.slice(0, 1), [4, 7, 1], [4, 7, 1, -1]),
    ],
)
def test_places_without_a_class_change_no_record(labels, ids, pads):
    here, there = ClassRecord(10), ClassRecord(10)
    here.note(torch.tensor(ids), labels)
    there.note(torch.tensor(pads), DeviceLabels.from_csr(labels, on_device(torch.device("cpu"))))
    assert torch.equal(here.flags_C1[:10], there.flags_C1[:10])
    here.note_all()
    assert here.share(SEEN) == 1


def make_watch(**settings):
    settings = {"mode": "per_sample", "active_size": 10, "random_share": 0.0} | settings
    return CollapseWatch(TrainConfig(**settings), 1000)


def test_narrow_coverage_is_told_once_with_the_settings_to_change():
    watch = make_watch(random_power=0.5)
    assert watch.epoch_ended(1, 1000, 0.5) is None
    text = watch.epoch_ended(2, 1000, 0.05)
    assert text.startswith("only 5 % of the classes were negatives in epoch 2;")
    for part in (
        "would have reached 100 %",
        "'random_share' (now 0)",
        "'rehash_max_gap' (now 2,000",
        "'random_power' (now 0.5)",
        "'active_size' (now 10)",
    ):
        assert part in text
    assert watch.epoch_ended(3, 1000, 0.05) is None
    assert make_watch(rehash="fixed").epoch_ended(1, 1000, 0.0).count("'rehash_every' (now 50") == 1
    text = make_watch(index="none", mode="shared", pool_size=10).epoch_ended(1, 1000, 0.0)
    assert text.endswith("Try to raise 'pool_size' (now 10).")


def test_coverage_is_judged_by_what_random_negatives_reach_in_as_many_steps():
    assert make_watch().epoch_ended(1, 1, 0.009) is None  # a single step reaches 1 %
    assert make_watch().epoch_ended(1, 1, 0.003) is not None
    assert make_watch(active_size=5000).epoch_ended(1, 1, 0.3) is not None
    assert make_watch(mode="exact").epoch_ended(1, 1000, 0.0) is None


def decline(watch, curve, rows=5000):
    told = []
    for p_at_1, loss in curve:
        watch.note_loss(10 * loss, 10)
        told.append(watch.validated(p_at_1, rows))
        watch.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    return told


def test_accuracy_that_falls_while_the_loss_falls_is_told_once():
    falling = [(0.5, 3.0), (0.45, 2.5), (0.4, 2.0), (0.35, 1.5)]
    first, second, third, fourth = decline(make_watch(), falling)
    assert (first, second, fourth) == (None, None, None)
    assert third.startswith(
        "validation P@1 fell from 50.00 to 40.00 while the training loss fell from 3.000 to 2.000"
    )
    assert "'random_share' (now 0)" in third


@pytest.mark.parametrize(
    ("settings", "curve", "rows"),
    [
        ({}, [(0.5, 3.0), (0.49, 2.5), (0.48, 2.0)], 5000),  # too little
        ({}, [(0.5, 3.0), (0.45, 2.5), (0.4, 2.0)], 100),  # within the error
        ({}, [(0.5, 3.0), (0.4, 2.5), (0.41, 2.0)], 5000),
        ({}, [(0.5, 3.0), (0.4, 3.5), (0.3, 2.0)], 5000),
        ({"mode": "exact"}, [(0.5, 3.0), (0.4, 2.5), (0.3, 2.0)], 5000),
    ],
)
def test_lesser_declines_are_not_told(settings, curve, rows):
    assert decline(make_watch(**settings), curve, rows) == [None] * 3


class StaleCells:
    """An inverted file of 100 cells, made once from the initial weights: it never learns that rows have moved."""

    uses_queries = False

    def __init__(self, in_features, num_classes, **_):
        self.in_features, self.num_classes = in_features, num_classes
        self.state_by_name = {}

    def build(self, weight_CD, *_, **__):
        if not self.state_by_name:
            centres = weight_CD[
                torch.randperm(self.num_classes, generator=torch.Generator().manual_seed(0))[:100]
            ]
            cells = (weight_CD @ centres.T).argmax(1)
            self.state_by_name = {"rows": weight_CD.clone(), "centres": centres, "cells": cells}

    def update(self, *_):
        pass

    def query(self, hidden_ND, k, **_):
        rows, centres, cells = self.state_by_name.values()
        probed_N1 = (hidden_ND @ centres.T).argmax(1, keepdim=True)
        best = (hidden_ND @ rows.T).masked_fill(cells != probed_N1, -torch.inf).topk(k)
        return best.indices.masked_fill(best.values.isinf(), -1)

    def stats(self):
        return IndexStats(built=bool(self.state_by_name))

    def state(self):
        return self.state_by_name


@pytest.fixture
def stale_cells(monkeypatch):
    monkeypatch.setattr(index, "_FACTORIES", dict(index._FACTORIES))
    monkeypatch.setattr(index, "_SETTINGS", dict(index._SETTINGS))
    index.register_index("stale-cells")(StaleCells)


@pytest.fixture(scope="module")
def thousand_classes(tmp_path_factory) -> Dataset:
    """8,000 training rows over 1,000 classes."""
    with DatasetWriter(tmp_path_factory.mktemp("thousand") / "data") as writer:
        for split, rows, seed in (("train", 8000, 1), ("test", 500, 2)):
            writer.append(split, *checkerboard(rows, 1000, seed))
        return writer.finish(
            num_features=1020, num_classes=1000, source={"format": "test", "files": [], "options": {}}
        )


def test_a_stale_index_alone_collapses_and_the_default_mixture_does_not(
    thousand_classes, tmp_path, stale_cells
):
    def train(name, **mixture):
        config = TrainConfig(
            mode="per_sample",
            index="stale-cells",
            active_size=30,
            hidden_width=32,
            batch_size=64,
            epochs=8,
            threads=1,
            learning_rate=0.02,
            report_every=125,
            **mixture,
        )
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            run = slidex.fit(thousand_classes, tmp_path / name, config)
        assert all(warning.category is CollapseWarning for warning in told)
        logged = [event["text"] for event in run.log() if event["event"] == "warning"]
        assert logged == [str(warning.message) for warning in told]
        coverage = {
            kind: [e["epoch_coverage"] for e in run.log() if e["event"] == kind]
            for kind in ("epoch", "report")
        }
        assert coverage["epoch"] == coverage["report"]
        return slidex.evaluate(run, thousand_classes)["P@1"], coverage["epoch"], logged

    collapsed, narrow, told = train("alone", random_share=0.0, batch_share=0.0)
    assert collapsed < 0.05
    assert min(narrow) < 0.4
    assert len(told) == 1
    assert "Try to raise 'random_share' (now 0)" in told[0]
    healthy, wide, told = train("mixture")
    assert healthy > 0.8
    assert min(wide) > 0.9
    assert told == []
