"""The kept mistakes against a plain count over all rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from slidex.data import CsrArrays
from slidex.errors import ConfigError
from slidex.nn.classifier import Classifier
from slidex.train.config import TrainConfig
from slidex.train.mistakes import SHOWN_FEATURES, MistakeKeeper, format_mistakes

F, C, N = 30, 12, 50
COUNTS = np.arange(C)


def csr(rows: list[list[int]], width: int, values: bool = False) -> CsrArrays:
    indptr = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
    indices = np.array([c for row in rows for c in sorted(row)], dtype=np.int32)
    rng = np.random.default_rng(9)
    return CsrArrays(
        indptr, indices, rng.normal(size=len(indices)).astype(np.float32) if values else None, width
    )


@pytest.fixture(scope="module")
def model() -> Classifier:
    return Classifier.from_config(
        TrainConfig(mode="exact", precision="float32", hidden_width=8), F, C, COUNTS
    )


@pytest.fixture(scope="module")
def rows() -> tuple[CsrArrays, CsrArrays]:
    rng = np.random.default_rng(2)
    x = csr([rng.choice(F, rng.integers(1, 20), replace=False).tolist() for _ in range(N)], F, values=True)
    y = csr([rng.choice(C, rng.integers(0, 4), replace=False).tolist() for _ in range(N)], C)
    return x, y


def keep(model, x, y, count, blocks=(0, 17, 50), k=3, **names) -> list[dict]:
    keeper = MistakeKeeper(model, count, COUNTS, **names)
    scores, ids = (torch.cat(parts) for parts in zip(*model.topk(x, k), strict=True))
    for first, last in itertools.pairwise(blocks):
        part = slice(first, last)
        keeper.update(first, x.slice(first, last), y.slice(first, last), scores[part], ids[part])
    return keeper.worst()


def test_the_worst_rows_are_those_of_a_plain_count(model, rows):
    x, y = rows
    logits_NC = (model.encoder(x) @ model.head.weight.T + model.head.bias).detach().numpy()
    expected = []
    for n in range(N):
        true = y.indices[y.indptr[n] : y.indptr[n + 1]]
        if len(true) and logits_NC[n].argmax() not in true:
            expected.append((logits_NC[n].max() - logits_NC[n, true].max(), n))
    expected.sort(key=lambda item: -item[0])
    assert len(expected) > 20
    for count in (1, 7, len(expected), 1000):
        found = keep(model, x, y, count)
        assert [record["row"] for record in found] == [n for _, n in expected[:count]]
        assert [record["margin"] for record in found] == pytest.approx(
            [margin for margin, _ in expected[:count]], abs=2e-4
        )


def test_blocks_make_no_difference(model, rows):
    assert (
        keep(model, *rows, 10)
        == keep(model, *rows, 10, blocks=(0, 50))
        == keep(model, *rows, 10, blocks=range(51))
    )


def test_a_record_says_all_with_names_where_there_are_names(model, rows):
    x, y = rows
    named = keep(
        model, x, y, 50, label_names=[f"c{c}" for c in range(C)], feature_names=[f"f{i}" for i in range(F)]
    )
    for record in named:
        n = record["row"]
        part = slice(x.indptr[n], x.indptr[n + 1])
        values = dict(zip(x.indices[part].tolist(), x.values[part].tolist(), strict=True))
        shown = record["features"]
        assert len(shown) == min(len(values), SHOWN_FEATURES)
        assert [abs(item["value"]) for item in shown] == sorted(
            (abs(item["value"]) for item in shown), reverse=True
        )
        assert all(item["value"] == pytest.approx(values[item["id"]], abs=1e-4) for item in shown)
        assert all(item["name"] == f"f{item['id']}" for item in shown)
        assert {item["id"] for item in record["true"]} == set(
            y.indices[y.indptr[n] : y.indptr[n + 1]].tolist()
        )
        for item in (*record["true"], *record["predicted"]):
            assert item["name"] == f"c{item['id']}"
            assert item["training_rows"] == COUNTS[item["id"]]
        for kind in ("true", "predicted"):
            scores = [item["score"] for item in record[kind]]
            assert scores == sorted(scores, reverse=True)
        margin = record["predicted"][0]["score"] - record["true"][0]["score"]
        assert record["margin"] == pytest.approx(margin, abs=2e-4)
    nameless = keep(model, x, y, 50)
    assert all(
        "name" not in item for record in nameless for kind in ("true", "features") for item in record[kind]
    )
    text = format_mistakes(named)
    assert sum(line.startswith("row ") for line in text.splitlines()) == len(named)
    assert "  predicted  c" in text
    assert "#" not in text
    assert "#" in format_mistakes(nameless)


def test_rows_without_labels_or_predictions_are_passed_over(model):
    x, y = csr([[1], [2]], F), csr([[], [3]], C)
    keeper = MistakeKeeper(model, 5, COUNTS)
    keeper.update(0, x, y, torch.full((2, 1), -torch.inf), torch.full((2, 1), -1))
    assert keeper.worst() == []


def test_no_mistakes_asked_for_is_refused(model):
    with pytest.raises(ConfigError, match="'count' parameter of MistakeKeeper must be at least 1"):
        MistakeKeeper(model, 0, COUNTS)
