"""Baselines against a dictionary-based n-gram model."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from slidex.data import CsrArrays, DatasetWriter
from slidex.data.baselines import BackoffBaseline, FrequencyBaseline
from slidex.data.python_source import CONTEXT_FILE
from slidex.errors import ConfigError, DataError

CLASSES = 9


def write(out, splits, *, context=True):
    with DatasetWriter(out) as writer:
        for name, rows in splits.items():
            indptr = np.arange(len(rows) + 1)
            labels = np.array([label for _, _, label in rows], dtype=np.int32)
            x = CsrArrays(indptr, np.zeros(len(rows), dtype=np.int32), None, 1)
            writer.append(name, x, CsrArrays(indptr, labels, None, CLASSES))
            if context:
                pairs = np.array([row[:2] for row in rows], dtype=np.int32).reshape(-1, 2)
                np.save(writer.path / name / CONTEXT_FILE, pairs)
        return writer.finish(num_features=1, num_classes=CLASSES, source={"format": "test"})


def rows(count, seed):
    draw = random.Random(seed)
    tokens = [-5, 0, 3, -(2**31), 2**31 - 1, 7]
    return [
        (draw.choice(tokens), draw.choice(tokens), min(draw.randrange(12), draw.randrange(8)))
        for _ in range(count)
    ]


def expected(train, test, k, order):
    overall = Counter(label for *_, label in train)
    by_frequency = sorted(range(CLASSES), key=lambda c: (-overall[c], c))
    tables = [defaultdict(Counter) for _ in range(order)]
    for before, last, label in train:
        for length, key in enumerate([(), (last,), (before, last)][:order]):
            tables[length][key][label] += 1
    answers = []
    for before, last, _ in test:
        ranking = []
        for length in range(order - 1, 0, -1):
            seen = tables[length][[(), (last,), (before, last)][length]]
            ranking += sorted(seen, key=lambda c: (-seen[c], by_frequency.index(c)))
        ranking += by_frequency
        unique = list(dict.fromkeys(ranking))[:k]
        answers.append(unique + [-1] * (k - len(unique)))
    return answers


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 5, CLASSES + 2])
@pytest.mark.parametrize("train_rows", [1, 12, 300])
def test_backoff_equals_a_dictionary_model(tmp_path, monkeypatch, order, k, train_rows):
    monkeypatch.setattr("slidex.data.baselines._BLOCK", 17)
    train, test = rows(train_rows, 1), rows(100, 2)
    data = write(tmp_path / "d", {"train": train, "test": test})
    got = BackoffBaseline(order).fit(data).topk(data, k)
    assert got.dtype == np.int32
    assert got.tolist() == expected(train, test, k, order)


def test_frequency_is_stable(tmp_path):
    train = [(0, 0, label) for label in (5, 2, 2, 7, 5, 1)]
    data = write(tmp_path / "d", {"train": train, "test": train[:2], "valid": train[:3]})
    baseline = FrequencyBaseline().fit(data)
    assert baseline.topk(data, 5).tolist() == [[2, 5, 1, 7, 0]] * 2
    assert baseline.topk(data, 11, split="valid").tolist() == [[2, 5, 1, 7, 0, 3, 4, 6, 8, -1, -1]] * 3
    assert BackoffBaseline(1).fit(data).topk(data, 11)[0].tolist() == baseline.topk(data, 11)[0].tolist()


def test_an_empty_split(tmp_path):
    data = write(tmp_path / "d", {"train": rows(5, 0), "test": []})
    assert BackoffBaseline().fit(data).topk(data, 3).shape == (0, 3)
    assert FrequencyBaseline().fit(data).topk(data, 3).shape == (0, 3)


def test_a_set_without_contexts_is_refused(tmp_path):
    data = write(tmp_path / "d", {"train": rows(5, 0), "test": rows(5, 0)}, context=False)
    with pytest.raises(DataError, match="contexts of a python-source data set"):
        BackoffBaseline().fit(data)


def test_contexts_of_another_size_are_refused(tmp_path):
    data = write(tmp_path / "d", {"train": rows(5, 0)})
    np.save(data.path / "train" / CONTEXT_FILE, np.zeros((4, 2), dtype=np.int32))
    with pytest.raises(DataError, match=r"expected int32 \(5, 2\), found int32 \(4, 2\)"):
        BackoffBaseline().fit(data)


def test_several_labels_a_row_are_refused(tmp_path):
    with DatasetWriter(tmp_path / "d") as writer:
        x = CsrArrays(np.array([0, 2]), np.array([0, 1], dtype=np.int32), None, 2)
        writer.append("train", x, x)
        data = writer.finish(num_features=2, num_classes=2, source={"format": "test"})
    with pytest.raises(DataError, match="exactly one label"):
        BackoffBaseline().fit(data)


def test_bad_settings(tmp_path):
    with pytest.raises(ConfigError, match="order"):
        BackoffBaseline(4)
    data = write(tmp_path / "d", {"train": rows(5, 0)})
    for baseline in (FrequencyBaseline(), BackoffBaseline()):
        with pytest.raises(ConfigError, match="'k'"):
            baseline.fit(data).topk(data, 0, split="train")
