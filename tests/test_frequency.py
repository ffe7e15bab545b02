"""Metrics by class frequency against a plain-Python count, and the border cases of the deciles."""

from __future__ import annotations

import json

import numpy as np
import pytest

from slidex.data.csr import CsrArrays
from slidex.errors import ConfigError
from slidex.frequency import UNSEEN, FrequencyAccumulator, format_frequency, frequency_groups
from slidex.metrics import MetricAccumulator, MetricGroups


def csr(rows: list[list[int]], num_columns: int) -> CsrArrays:
    indptr = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
    indices = np.array([c for row in rows for c in sorted(row)], dtype=np.int32)
    return CsrArrays(indptr, indices, None, num_columns)


def named_groups(counts: list[int]) -> list[str]:
    groups = frequency_groups(np.array(counts))
    return [groups.names[g] for g in groups.group_C]


def test_each_decile_holds_a_tenth_of_the_labels():
    rng = np.random.default_rng(0)
    counts = rng.permutation((50_000 / (1 + np.arange(3_000)) ** 0.9).astype(np.int64))
    groups = frequency_groups(counts)
    mass = np.bincount(groups.group_C, counts, minlength=10)
    assert np.abs(mass / counts.sum() - 0.1).max() < 0.005 + counts.max() / counts.sum()
    for d in range(9):
        assert counts[groups.group_C == d].min() >= counts[groups.group_C == d + 1].max()


def test_borders_are_exact():
    assert named_groups([10] * 10) == [str(d) for d in range(1, 11)]
    assert named_groups([1, 5, 4]) == ["10", "1", "6"]  # before them: 9, 0 and 5 tenths
    assert named_groups([3, 3]) == ["1", "6"]  # equal counts by id


def test_a_class_with_more_than_a_tenth_leaves_deciles_empty():
    assert named_groups([75, 20, 5]) == ["1", "8", "10"]


def test_classes_without_training_rows_are_in_no_decile():
    assert named_groups([0, 7, 0]) == [UNSEEN, "1", UNSEEN]
    assert named_groups([0, 0]) == [UNSEEN, UNSEEN]


def test_the_largest_counts_do_not_overflow():
    assert named_groups([2**57, 2**57, 2**57, 2**57]) == ["1", "3", "6", "8"]


@pytest.mark.parametrize("counts", [[], [-1, 3], [0.5, 1.0], [[1, 2]]])
def test_wrong_counts_are_refused(counts):
    with pytest.raises(ConfigError, match="'class_counts' parameter of frequency_groups"):
        frequency_groups(np.array(counts))


def test_every_figure_equals_a_plain_count():
    rng = np.random.default_rng(3)
    C, ks = 30, (1, 3)
    counts = rng.permutation((40 / (1 + np.arange(C))).astype(np.int64))  # the last ones are 1; some 0
    counts[rng.choice(C, 4, replace=False)] = 0
    truth = [rng.choice(C, rng.integers(0, 6), replace=False).tolist() for _ in range(80)]
    ranked = [rng.permutation(C)[:3].tolist() for _ in range(80)]
    metrics = FrequencyAccumulator(counts, 200, ks)
    metrics.update(np.array(ranked[:50]), csr(truth[:50], C))
    metrics.update(np.array(ranked[50:]), csr(truth[50:], C))
    groups = frequency_groups(counts)
    result = metrics.compute()
    assert [line["decile"] for line in result] == list(groups.names)
    for g, line in enumerate(result):
        of_group = [{c for c in true if groups.group_C[c] == g} for true in truth]
        with_any = [n for n in range(80) if of_group[n]]
        members = counts[groups.group_C == g]
        assert line["classes"] == len(members)
        assert line["fewest"] == (members.min() if len(members) else None)
        assert line["most"] == (members.max() if len(members) else None)
        assert line["rows"] == len(with_any)
        for k in ks:
            hits = {n: len(of_group[n] & set(ranked[n][:k])) for n in with_any}
            if with_any:
                assert line[f"P@{k}"] == pytest.approx(sum(hits.values()) / k / len(with_any))
                recall = np.mean([hits[n] / len(of_group[n]) for n in with_any])
                assert line[f"recall@{k}"] == pytest.approx(recall)
            else:
                assert line[f"P@{k}"] is line[f"recall@{k}"] is None
            assert line[f"share of P@{k}"] == pytest.approx(sum(hits.values()) / k / 80)
    json.dumps(result)


def test_shares_add_up_to_the_metric_of_all_classes():
    rng = np.random.default_rng(4)
    counts = rng.integers(0, 50, 25)
    truth = [rng.choice(25, rng.integers(0, 6), replace=False).tolist() for _ in range(60)]
    ranked = np.array([rng.permutation(25)[:5] for _ in range(60)])
    by_decile, overall = FrequencyAccumulator(counts, 99, (1, 5)), MetricAccumulator(counts, 99, (1, 5))
    for metrics in (by_decile, overall):
        metrics.update(ranked, csr(truth, 25))
    for k in (1, 5):
        added = sum(line[f"share of P@{k}"] for line in by_decile.compute())
        assert added == pytest.approx(overall.compute()[f"P@{k}"])


def test_no_rows_give_no_figures():
    result = FrequencyAccumulator(np.array([1, 0]), 1, (1,)).compute()
    assert all(line["P@1"] is line["share of P@1"] is None for line in result)


def test_the_table_has_a_line_for_each_decile():
    metrics = FrequencyAccumulator(np.array([75, 20, 5, 0]), 100, (1,))
    metrics.update(np.array([[0], [2]]), csr([[0], [1]], 4))
    lines = format_frequency(metrics.compute()).splitlines()
    assert lines[0].split() == ["decile", "classes", "frequency", "rows", "P@1", "recall@1", "of", "P@1"]
    assert len(lines) == 12
    assert lines[1].split() == ["1", "1", "75-75", "1", "100.00", "100.00", "50.00"]
    assert lines[2].split() == ["2", "0", "-", "0", "-", "-", "0.00"]
    assert lines[11].split() == ["unseen", "1", "0", "0", "-", "-", "0.00"]


@pytest.mark.parametrize(
    "group_C",
    [
        np.array([0, 2], dtype=np.int8),
        np.array([-1, 0], dtype=np.int8),
        np.array([0], dtype=np.int8),
        np.array([0, 1]),
    ],
)
def test_groups_that_do_not_fit_are_refused(group_C):
    with pytest.raises(ConfigError, match="'groups' parameter of MetricAccumulator"):
        MetricAccumulator(np.array([1, 1]), 2, groups=MetricGroups(("a", "b"), group_C))
