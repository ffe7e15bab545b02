"""Groups of classes: which classes are put together, and what a group's classifier adds to a class's score."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from slidex.data import CsrArrays
from slidex.errors import ConfigError
from slidex.kernels import LinearWeights, reference
from slidex.nn.class_groups import ClassGroups, distinct_groups, group_classes, group_labels
from slidex.nn.ranker import row_tensors
from tests.nn.test_ranker import C, F, random_rows, ranker

G = 5


def groups() -> ClassGroups:
    weights = ranker(C).weights
    ends = weights.indptr[: G + 1].clone()
    few = LinearWeights(
        ends,
        weights.features[: ends[-1]].clone(),
        weights.values[: ends[-1]].clone(),
        weights.bias[:G].clone(),
        F,
    )
    return ClassGroups(torch.arange(C, dtype=torch.int32) * 7 % G, few)


def candidates(rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    ids_NA = torch.stack([torch.randperm(C, generator=generator)[:12] for _ in range(rows)])
    ids_NA[torch.rand(ids_NA.shape, generator=generator) < 0.2] = -1
    ids_NA[3] = -1
    return ids_NA


def test_a_class_has_the_score_of_its_group() -> None:
    own, ids_NA = groups(), candidates(20)
    x_rows = row_tensors(random_rows(20, seed=0).unit_rows())
    groups_NA = torch.where(ids_NA >= 0, own.group_C[ids_NA.clamp(min=0)].long(), -1)
    linear_NA = reference.linear_scores(own.weights, *x_rows, groups_NA)
    want_NA = 2 * torch.log(1 / (1 + torch.exp(-4 * linear_NA)))
    got_NA = own.scores(x_rows, ids_NA)
    there = ids_NA >= 0
    assert got_NA.shape == ids_NA.shape
    torch.testing.assert_close(got_NA[there], want_NA[there], rtol=1e-4, atol=1e-4)


def test_a_ranker_adds_it() -> None:
    alone, own, ids_NA = ranker(10), groups(), candidates(20)
    x = random_rows(20, seed=0)
    logits_NA = torch.randn(ids_NA.shape, generator=torch.Generator().manual_seed(2))
    arguments = x, logits_NA, ids_NA, logits_NA.amax(1)
    before_NA, after_NA = alone.scores(*arguments), replace(alone, groups=own).scores(*arguments)
    there = ids_NA >= 0
    torch.testing.assert_close(
        (after_NA - before_NA)[there],
        own.scores(row_tensors(x.unit_rows()), ids_NA)[there],
        rtol=1e-4,
        atol=1e-4,
    )
    assert torch.isneginf(after_NA[~there]).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("most", [1, 3, 12])
def test_groups_of_a_row_are_found_once_in_their_order(dtype: torch.dtype, most: int) -> None:
    group_C, ids_NA = groups().group_C, candidates(20).to(dtype)
    groups_NB, place_NA = distinct_groups(group_C, ids_NA, most)
    assert groups_NB.shape == (20, most)
    for n in range(20):
        of_row = [int(group_C[c]) for c in ids_NA[n] if c >= 0]
        first = list(dict.fromkeys(of_row))[:most]
        assert groups_NB[n].tolist() == first + [-1] * (most - len(first))
        want = [first.index(g) if (g := int(group_C[c])) in first and c >= 0 else 0 for c in ids_NA[n]]
        assert place_NA[n].tolist() == want


def rows_of(classes: list[list[int]], num_classes: int) -> CsrArrays:
    indptr = np.cumsum([0, *map(len, classes)])
    return CsrArrays(indptr, np.concatenate(classes).astype(np.int32), None, num_classes)


def test_classes_of_rows_alike_are_one_group() -> None:
    """Three directions, classes of one to three rows of one of them, of any length; and a class without a row."""
    rng = np.random.default_rng(0)
    kind_C = rng.integers(0, 3, 60)
    classes = [[c] for c in range(60) for _ in range(c % 3 + 1)]
    kind_N = kind_C[np.concatenate(classes)]
    hidden_ND = np.eye(3)[kind_N] + 0.05 * rng.standard_normal((len(classes), 3))
    hidden_ND = torch.from_numpy(hidden_ND * rng.uniform(0.1, 10, (len(classes), 1))).float()
    labels = rows_of(classes, 61)
    group_C = group_classes(hidden_ND, labels, 3, seed=0)
    assert group_C.dtype == torch.int32
    assert 0 <= int(group_C[60]) < 3
    assert len({(int(group), int(kind)) for group, kind in zip(group_C, kind_C, strict=False)}) == 3
    assert torch.equal(group_classes(hidden_ND, labels, 3, seed=0), group_C)


def test_neither_long_vectors_nor_many_rows_make_a_class_another() -> None:
    """Two directions, classes of 1 or 40 rows of any length; the last class has one long row of the other direction."""
    classes = [[c] for c in range(20) for _ in range(40 if c % 3 == 0 else 1)] + [[20]] * 3
    kind_N = np.array([c[0] % 2 for c in classes[:-3]] + [0, 0, 1])
    length_N = np.where(np.arange(len(classes)) % 7 == 0, 50.0, 0.1)
    length_N[-3:] = 0.1, 0.1, 50.0
    hidden_ND = torch.from_numpy(np.eye(4)[kind_N] * length_N[:, None]).float()
    hidden_ND += 0.02 * torch.randn(hidden_ND.shape, generator=torch.Generator().manual_seed(0))
    group_C = group_classes(hidden_ND, rows_of(classes, 21), 2, seed=0)
    assert group_C.tolist() == [int(group_C[c % 2]) for c in range(21)]
    assert group_C[0] != group_C[1]


def test_classes_are_grouped_alike_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = rows_of([[n % 50, 50 + n % 7] for n in range(200)], 57)
    hidden_ND = torch.randn(200, 6, generator=generator)
    whole_C = group_classes(hidden_ND, labels, 4, seed=1)
    monkeypatch.setattr("slidex.nn.class_groups._CLASSES_AT_ONCE", 11)
    assert torch.equal(group_classes(hidden_ND, labels, 4, seed=1), whole_C)
    assert len(whole_C.unique()) > 1


def test_a_row_is_of_the_groups_of_its_classes() -> None:
    labels = rows_of([[0, 2, 3], [], [1, 4], [2]], 5)
    group_C = torch.tensor([2, 0, 2, 1, 0], dtype=torch.int32)
    grouped = group_labels(group_C, labels, 3)
    rows = [grouped.indices[a:b].tolist() for a, b in zip(grouped.indptr, grouped.indptr[1:], strict=False)]
    assert rows == [[1, 2], [], [0], [2]]
    assert grouped.num_columns == 3
    assert grouped.indices.dtype == np.int32


@pytest.mark.parametrize(
    ("group_C", "message"),
    [
        (torch.arange(C), "contiguous, of dtype torch.int32"),
        (torch.full((C,), G, dtype=torch.int32), r"groups in \[0, 5\)"),
        (torch.full((C,), -1, dtype=torch.int32), r"groups in \[0, 5\)"),
    ],
)
def test_other_groups_are_refused(group_C: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClassGroups(group_C, groups().weights)
