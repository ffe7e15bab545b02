"""Every metric against napkinXC on random and edge data, the groups against a plain-Python count."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidex.data.csr import CsrArrays
from slidex.errors import ConfigError, DataError
from slidex.metrics import GROUPS, METRICS, MetricAccumulator, format_metrics, head_torso_tail, propensities

NUM_CLASSES = 40
NUM_TRAIN_ROWS = 500


def csr(rows: list[list[int]], num_columns: int = NUM_CLASSES) -> CsrArrays:
    indptr = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
    indices = np.array([c for row in rows for c in sorted(row)], dtype=np.int32)
    return CsrArrays(indptr, indices, None, num_columns)


def padded(predictions: list[list[int]], width: int) -> np.ndarray:
    return np.array([row + [-1] * (width - len(row)) for row in predictions], dtype=np.int64).reshape(
        -1, width
    )


def random_case(seed: int, num_rows: int = 60, width: int = 8):
    """Zipf-like class counts with some zeros, rows with 0 to 6 labels, 0 to `width` predictions."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    counts = (200 / (1 + np.arange(NUM_CLASSES)) ** 1.3).astype(
        np.int64
    )  # the last ones have no training row
    counts = rng.permutation(counts)
    truth = [rng.choice(NUM_CLASSES, rng.integers(0, 7), replace=False).tolist() for _ in range(num_rows)]
    ranked = []
    for true in truth:
        order = rng.permutation(NUM_CLASSES)
        favoured = np.isin(order, true) & (rng.random(NUM_CLASSES) < 0.5)
        ranking = np.concatenate([order[favoured], order[~favoured]])[: width + 2]
        ranked.append(rng.permutation(ranking)[: rng.integers(0, width + 1)].tolist())
    return counts, truth, ranked


def napkin_metrics(counts, truth, ranked, width, a=0.55, b=1.5) -> dict[str, np.ndarray]:
    napkin = pytest.importorskip("napkinxc.metrics")
    # The library wants the training labels themselves: column c holds counts[c] ones.
    training = (np.arange(NUM_TRAIN_ROWS)[:, None] < counts[None, :]).astype(float)
    inverse = napkin.Jain_et_al_inverse_propensity(training, A=a, B=b)
    return {
        "P": napkin.precision_at_k(truth, ranked, k=width),
        "nDCG": napkin.ndcg_at_k(truth, ranked, k=width),
        "recall": napkin.recall_at_k(truth, ranked, k=width),
        "PSP": napkin.psprecision_at_k(truth, ranked, inverse, k=width),
        "PSnDCG": napkin.psndcg_at_k(truth, ranked, inverse, k=width),
    }


def mismatches(result: dict, expected: dict[str, np.ndarray], width: int) -> set[str]:
    return {
        metric
        for metric in METRICS
        for k in range(1, width + 1)
        if not math.isclose(result[f"{metric}@{k}"], expected[metric][k - 1], rel_tol=1e-9, abs_tol=1e-12)
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("a", "b"), [(0.55, 1.5), (0.6, 2.6)])
def test_every_metric_equals_napkinxc(seed, a, b):
    counts, truth, ranked = random_case(seed)
    metrics = MetricAccumulator(counts, NUM_TRAIN_ROWS, range(1, 9), a, b)
    metrics.update(padded(ranked, 8), csr(truth))
    assert not mismatches(metrics.compute(), napkin_metrics(counts, truth, ranked, 8, a, b), 8)


@pytest.mark.parametrize(
    ("truth", "ranked"),
    [
        ([[3]], [[3, 1, 2, 0, 4]]),  # k above the number of labels
        ([[], [5]], [[1, 2], [5]]),  # a row without labels
        ([[1, 2, 3, 4, 5, 6, 7]], [[7, 6, 5, 4, 3]]),  # more labels than k
        ([[NUM_CLASSES - 1, 0]], [[NUM_CLASSES - 1]]),  # a class without training rows
        ([[2, 9]], [[]]),  # nothing predicted
        ([[2, 9]], [[1, 3, 4, 5, 9]]),  # a hit at the last rank only
    ],
)
def test_edge_rows_equal_napkinxc(truth, ranked):
    counts = np.arange(NUM_CLASSES)[::-1].copy()
    metrics = MetricAccumulator(counts, NUM_TRAIN_ROWS, (1, 2, 3, 4, 5))
    metrics.update(padded(ranked, 5), csr(truth))
    assert not mismatches(metrics.compute(), napkin_metrics(counts, truth, ranked, 5), 5)


def test_the_comparison_notices_a_wrong_discount_and_wrong_propensities(monkeypatch):
    counts, truth, ranked = random_case(seed=0)
    expected = napkin_metrics(counts, truth, ranked, 8)

    wrong_b = MetricAccumulator(counts, NUM_TRAIN_ROWS, range(1, 9), b=1.6)
    wrong_b.update(padded(ranked, 8), csr(truth))
    assert mismatches(wrong_b.compute(), expected, 8) == {"PSP", "PSnDCG"}

    log2 = np.log2
    with monkeypatch.context() as patch:
        patch.setattr(np, "log2", lambda rank: log2(rank + 1))
        shifted = MetricAccumulator(counts, NUM_TRAIN_ROWS, range(1, 9))
    shifted.update(padded(ranked, 8), csr(truth))
    assert mismatches(shifted.compute(), expected, 8) == {"nDCG", "PSnDCG"}


@pytest.mark.parametrize(("a", "b"), [(0.55, 1.5), (0.5, 0.4)])
def test_propensities_equal_napkinxc(a, b):
    napkin = pytest.importorskip("napkinxc.metrics")
    counts = np.arange(NUM_CLASSES)
    training = (np.arange(NUM_TRAIN_ROWS)[:, None] < counts[None, :]).astype(float)
    expected = napkin.Jain_et_al_propensity(training, A=a, B=b)
    np.testing.assert_allclose(propensities(counts, NUM_TRAIN_ROWS, a, b), expected, rtol=1e-12)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(0, 10**9), min_size=1, max_size=20),
    num_rows=st.integers(1, 10**9),
    a=st.floats(0, 2),
    b=st.floats(0.1, 10),
)
def test_propensities_are_probabilities_that_grow_with_the_count(counts, num_rows, a, b):
    p = propensities(np.sort(counts), num_rows, a, b)
    assert np.all((p > 0) & (p <= 1))
    assert np.all(np.diff(p) >= 0)


def test_groups_take_thirds_of_the_label_mass():
    counts = np.array([0, 10, 30, 10, 5, 5, 0])
    # 30 of 60 labels reach past the first third, 10 more reach two thirds exactly, the rest is tail.
    assert [GROUPS[g] for g in head_torso_tail(counts)] == [
        "tail",
        "torso",
        "head",
        "tail",
        "tail",
        "tail",
        "tail",
    ]
    assert head_torso_tail(counts, shares=(0.5, 1.0)).tolist() == [2, 1, 0, 1, 1, 1, 2]
    assert head_torso_tail(np.zeros(3, dtype=int)).tolist() == [2, 2, 2]


def test_group_metrics_equal_a_plain_count():
    counts, truth, ranked = random_case(seed=3)
    groups = head_torso_tail(counts)
    inverse = 1 / propensities(counts, NUM_TRAIN_ROWS)
    metrics = MetricAccumulator(counts, NUM_TRAIN_ROWS, (3,))
    metrics.update(padded(ranked, 8), csr(truth))
    for g, name in enumerate(GROUPS):
        mine = [[c for c in row if groups[c] == g] for row in truth]
        rows = [(true, ranking) for true, ranking in zip(mine, ranked, strict=True) if true]
        hits = [[ranking[j] in true for j in range(min(3, len(ranking)))] for true, ranking in rows]
        gained = sum(
            inverse[ranking[j]]
            for (_, ranking), hit in zip(rows, hits, strict=True)
            for j, h in enumerate(hit)
            if h
        )
        best = sum(sum(sorted(inverse[true], reverse=True)[:3]) for true, _ in rows)
        dcg = [sum(h / math.log2(j + 2) for j, h in enumerate(hit)) for hit in hits]
        ideal = [sum(1 / math.log2(j + 2) for j in range(min(3, len(true)))) for true, _ in rows]
        got = metrics.compute()["groups"][name]
        assert got["rows"] == len(rows) > 0
        assert got["classes"] == np.sum(groups == g)
        assert got["P@3"] == pytest.approx(np.mean([sum(hit) / 3 for hit in hits]), rel=1e-12)
        assert got["recall@3"] == pytest.approx(
            np.mean([sum(hit) / len(true) for hit, (true, _) in zip(hits, rows, strict=True)]), rel=1e-12
        )
        assert got["nDCG@3"] == pytest.approx(np.mean(np.divide(dcg, ideal)), rel=1e-12)
        assert got["PSP@3"] == pytest.approx(gained / best, rel=1e-12)


def test_perfect_predictions_reach_one_and_batches_change_nothing():
    counts, truth, ranked = random_case(seed=1)
    whole = MetricAccumulator(counts, NUM_TRAIN_ROWS)
    whole.update(padded(ranked, 8), csr(truth))
    parts = MetricAccumulator(counts, NUM_TRAIN_ROWS)
    for start in range(0, len(truth), 7):
        rows = slice(start, start + 7)
        parts.update(padded(ranked[rows], 8), csr(truth).slice(start, min(start + 7, len(truth))))
    assert parts.compute() == whole.compute()

    inverse = 1 / propensities(counts, NUM_TRAIN_ROWS)
    labelled = [sorted(row, key=lambda c: -inverse[c]) for row in truth if row]
    perfect = MetricAccumulator(counts, NUM_TRAIN_ROWS, (6,))
    perfect.update(padded(labelled, 6), csr(labelled))
    result = perfect.compute()
    assert [result[f"{m}@6"] for m in METRICS if m != "P"] == pytest.approx([1, 1, 1, 1], rel=1e-12)


def test_rows_without_labels_count_as_zero_unless_left_out():
    counts = np.full(NUM_CLASSES, 5)
    truth, ranked = [[], [4], [], []], padded([[4], [4], [], [1]], 1)
    means = {}
    for count_unlabelled in (True, False):
        metrics = MetricAccumulator(counts, 100, (1,), count_unlabelled=count_unlabelled)
        metrics.update(ranked, csr(truth))
        means[count_unlabelled] = metrics.compute()
    assert means[True]["P@1"] == means[True]["recall@1"] == means[True]["nDCG@1"] == 0.25
    assert means[False]["P@1"] == 1
    assert means[True]["PSP@1"] == means[False]["PSP@1"] == 1
    assert (means[True]["rows"], means[True]["rows_without_labels"]) == (4, 3)


def test_result_is_json_and_the_table_shows_undefined_as_a_dash():
    counts = np.array([9, 0, 0])
    metrics = MetricAccumulator(counts, 9, (1, 3))
    assert metrics.compute()["P@1"] is None
    metrics.update(np.array([[0, 2, 1]]), csr([[0]], 3))
    metrics.update(np.array([[0, 2, 1]]), csr([[]], 3))
    result = metrics.compute()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["groups"]["tail"]["P@1"] is None
    lines = format_metrics(result).splitlines()
    assert lines[0].split() == ["percent", "all", "head", "torso", "tail"]
    assert lines[1].split() == ["P@1", "50.00", "100.00", "-", "-"]
    assert lines[-1] == "1 of 2 rows have no true class."


@pytest.mark.parametrize(
    ("topk", "error", "message"),
    [
        (np.array([[0, 1]]), ConfigError, r"'topk_ids' .* \(N, 3 or more\).*Got \('int64', 1, 2\)"),
        (np.array([[0.0, 1, 2]]), ConfigError, "'topk_ids'"),
        (np.array([0, 1, 2]), ConfigError, "'topk_ids'"),
        (np.array([[0, 1, 2], [3, 4, 5]]), ConfigError, "'labels' .* must be 2 rows by 40 columns"),
        (np.array([[0, 1, 40]]), DataError, r"predicted class must be in \[-1, 40\). Got 40"),
        (np.array([[0, -2, 1]]), DataError, "Got -2"),
        (np.array([[7, -1, 7]]), DataError, "Row 0 predicts a class twice"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(topk, error, message):
    metrics = MetricAccumulator(np.full(NUM_CLASSES, 1), 10, (3,))
    with pytest.raises(error, match=message):
        metrics.update(topk, csr([[1]]))
    assert metrics.compute()["rows"] == 0


def test_k_may_exceed_the_number_of_classes():
    metrics = MetricAccumulator(np.array([2, 1]), 3, (1, 5))
    metrics.update(np.array([[1, 0]]), csr([[0]], 2))
    result = metrics.compute()
    assert (result["P@1"], result["P@5"], result["recall@5"]) == (0, 0.2, 1)


def test_labels_out_of_range_are_refused():
    metrics = MetricAccumulator(np.full(NUM_CLASSES, 1), 10, (1,))
    with pytest.raises(DataError, match="true class"):
        metrics.update(np.array([[1]]), csr([[NUM_CLASSES]]))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("class_counts", {"class_counts": np.array([1, -1])}),
        ("class_counts", {"class_counts": np.array([0.5])}),
        ("class_counts", {"class_counts": np.zeros(0, dtype=int)}),
        ("num_rows", {"num_train_rows": 0}),
        ("ks", {"ks": ()}),
        ("ks", {"ks": (0, 1)}),
        ("a", {"a": -1.0}),
        ("b", {"b": 0.0}),
        ("b", {"b": math.nan}),
        ("shares", {"shares": (0.7, 0.5)}),
    ],
)
def test_settings_out_of_range_are_named(name, change):
    with pytest.raises(ConfigError, match=f"The '{name}' parameter"):
        MetricAccumulator(**({"class_counts": np.array([1, 2]), "num_train_rows": 3} | change))
