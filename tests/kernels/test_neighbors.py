"""The search for nearest rows and the classes they vote for, against plain torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import pytest
import torch

from slidex.errors import ConfigError
from slidex.kernels import InvertedIndex, RowLabels, cpu, reference
from tests.kernels.cases import sparse_rows

if TYPE_CHECKING:
    from collections.abc import Callable

Kernel = Any


def labels_of(rows: int, classes: int, seed: int) -> RowLabels:
    """Row 0 has none."""
    rng = np.random.default_rng(seed)
    chosen = [
        np.sort(rng.choice(classes, rng.integers(1, min(classes, 6) + 1), replace=False)) for _ in range(rows)
    ]
    chosen[0] = chosen[0][:0]
    indptr = torch.from_numpy(np.concatenate([[0], np.cumsum([len(ids) for ids in chosen])]))
    return RowLabels(indptr, torch.from_numpy(np.concatenate(chosen)).int(), classes)


def assert_index_parity(
    make: Kernel, seed: int, *, rows: int = 30, features: int = 17, longest: int = 9
) -> InvertedIndex:
    arguments = *sparse_rows(rows, features, seed), features
    got, want = (f(*arguments, longest=longest) for f in (make, reference.inverted_index))
    for name in ("indptr", "rows", "values"):
        assert torch.equal(getattr(got, name), getattr(want, name))
    assert got.num_rows == rows
    return want


def assert_nearest_parity(
    nearest: Kernel, seed: int, *, k: int = 6, share: float = 1.0, own: bool = False, **shape: int
) -> None:
    index = assert_index_parity(cpu.inverted_index, seed, **shape)
    asked = sparse_rows(25, index.num_features, seed + 1)
    own_Q = torch.from_numpy(np.random.default_rng(seed).integers(-1, index.num_rows, 25)) if own else None
    arguments = index, *asked, k
    got_QK, products_QK = nearest(*arguments, share=share, own_Q=own_Q)
    want_QK, best_QK = reference.nearest_rows(*arguments, share=share, own_Q=own_Q)
    torch.testing.assert_close(products_QK, best_QK, rtol=1e-12, atol=1e-14)
    _assert_same_but_for_ties(got_QK, want_QK, best_QK)


def _assert_same_but_for_ties(got_QK: torch.Tensor, want_QK: torch.Tensor, best_QK: torch.Tensor) -> None:
    """Equal ids where neither neighbour in the order is as good, up to the order of sums; else distinct ones."""
    assert torch.equal(got_QK < 0, want_QK < 0)
    assert all(len(set(ids[ids >= 0].tolist())) == int((ids >= 0).sum()) for ids in got_QK)
    gap_QK = best_QK.diff(dim=1).abs() > 1e-12
    pad = torch.nn.functional.pad
    clear_QK = pad(gap_QK, (1, 0), value=True) & pad(gap_QK, (0, 1), value=False)
    assert torch.equal(got_QK[clear_QK], want_QK[clear_QK])


def assert_vote_parity(
    vote: Kernel, seed: int, *, rows: int = 30, classes: int = 40, k: int = 6, count: int = 8
) -> None:
    rng = np.random.default_rng(seed)
    near_QK = torch.from_numpy(np.stack([rng.permutation(rows)[:k] for _ in range(25)]))
    near_QK[torch.from_numpy(rng.random(near_QK.shape) < 0.2)] = -1
    weights_QK = torch.from_numpy(rng.random(near_QK.shape) * (rng.random(near_QK.shape) < 0.9))
    arguments = near_QK, weights_QK, labels_of(rows, classes, seed), count
    got_QB, votes_QB = vote(*arguments)
    want_QB, best_QB = reference.neighbor_classes(*arguments)
    torch.testing.assert_close(votes_QB, best_QB, rtol=1e-12, atol=1e-14)
    _assert_same_but_for_ties(got_QB, want_QB, best_QB)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"rows": 1},
        {"features": 1, "longest": 20},
        {"features": 3, "rows": 60, "longest": 20},
        {"longest": 3},
        {"longest": 100},
        {"longest": 1},
    ],
    ids=str,
)
def test_index_is_what_the_reference_makes(shape: dict[str, int]) -> None:
    for seed in range(5):
        assert_index_parity(cpu.inverted_index, 10 * seed, **shape)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"rows": 1},
        {"features": 1, "longest": 40},
        {"features": 3, "rows": 60, "longest": 20},
        {"longest": 1},
        {"k": 1},
        {"k": 50},
        {"own": True},
        {"own": True, "rows": 1},
        {"own": True, "k": 50, "longest": 100},
        {"share": 0.8, "longest": 20},
        {"share": 0.3},
        {"share": 1e-9, "k": 3},
        {"rows": 3000, "longest": 3000, "k": 20},  # where only those above a bound are ranked
        {"rows": 3000, "longest": 3000, "k": 1, "own": True},
        {"rows": 3000},  # where a row reads little of the index
        {"rows": 3000, "longest": 20, "k": 50, "share": 0.8, "own": True},
    ],
    ids=str,
)
def test_nearest_rows_are_what_the_reference_finds(shape: dict[str, Any]) -> None:
    for seed in range(5):
        assert_nearest_parity(cpu.nearest_rows, 10 * seed, **shape)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"rows": 2, "k": 2},
        {"classes": 1},
        {"classes": 5, "count": 50},
        {"count": 1},
        {"k": 1},
        {"rows": 900, "classes": 2000, "k": 600, "count": 20},
    ],
    ids=str,
)
def test_votes_are_what_the_reference_counts(shape: dict[str, int]) -> None:
    for seed in range(5):
        assert_vote_parity(cpu.neighbor_classes, 10 * seed, **shape)


BROKEN: dict[str, tuple[Callable[..., None], Kernel]] = {
    "longer lists": (assert_index_parity, lambda *a, longest: cpu.inverted_index(*a, longest=longest + 3)),
    "values are another row's": (
        assert_index_parity,
        lambda p, i, v, f, **n: cpu.inverted_index(p, i, v.roll(1), f, **n),
    ),
    "the two nearest exchanged": (
        assert_nearest_parity,
        lambda *a, **n: [found[:, [1, 0, *range(2, a[-1])]] for found in cpu.nearest_rows(*a, **n)],
    ),
    "products are larger": (
        assert_nearest_parity,
        lambda *a, **n: (cpu.nearest_rows(*a, **n)[0], cpu.nearest_rows(*a, **n)[1] * 1.0001),
    ),
    "a share of the row": (
        assert_nearest_parity,
        lambda *a, share, **n: cpu.nearest_rows(*a, share=0.7 * share, **n),
    ),
    "one's own row is found": (
        lambda nearest, seed: assert_nearest_parity(nearest, seed, own=True),
        lambda *a, **n: cpu.nearest_rows(*a, **n | {"own_Q": None}),
    ),
    "a neighbour counts twice": (
        assert_vote_parity,
        lambda near, weights, *a: cpu.neighbor_classes(near, weights * torch.tensor([2, *[1] * 5]), *a),
    ),
    "one class less": (
        assert_vote_parity,
        lambda n, w, labels, count: cpu.neighbor_classes(
            n, w, replace(labels, classes=labels.classes.clamp(max=38)), count
        ),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_comparison_fails_on_a_broken_kernel(name: str) -> None:
    compare, broken = BROKEN[name]
    with pytest.raises(AssertionError):
        compare(broken, 0)


def test_sums_that_come_back_to_zero_are_noted_once() -> None:
    index = InvertedIndex(
        torch.tensor([0, 2, 4, 6]),
        torch.tensor([0, 1, 0, 1, 0, 1]).int(),
        torch.tensor([1.0, 1, 1, 1, 1, 2]),
        2,
    )
    asked = torch.tensor([0, 3]), torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([1.0, -1.0, 1.0])
    near_QK, products_QK = cpu.nearest_rows(index, *asked, 3)
    assert near_QK.tolist() == [[1, 0, -1]]
    assert products_QK.tolist() == [[2.0, 1.0, 0.0]]


def test_equal_ones_are_ordered_by_id() -> None:
    ones = torch.tensor([0, 2, 4, 6]), torch.tensor([0, 1, 0, 1, 0, 1], dtype=torch.int32), torch.ones(6)
    index = cpu.inverted_index(*ones, 2, longest=2)
    assert index.rows.tolist() == [0, 1, 0, 1]  # of three alike the first two
    assert cpu.nearest_rows(index, *ones, 1)[0].tolist() == [[0], [0], [0]]
    labels = RowLabels(torch.tensor([0, 3]), torch.tensor([1, 4, 7]).int(), 9)
    assert cpu.neighbor_classes(torch.zeros(1, 1).long(), torch.ones(1, 1), labels, 2)[0].tolist() == [[1, 4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    before, found = numba.get_num_threads(), []
    indptr, indices, values = sparse_rows(200, 60, 6)
    rows = indptr, indices, values.to(dtype)
    index = cpu.inverted_index(*rows, 60, longest=100)
    try:
        for threads in (1, min(2, numba.config.NUMBA_NUM_THREADS)):
            numba.set_num_threads(threads)
            near = cpu.nearest_rows(index, *rows, 10, share=0.9, own_Q=torch.arange(200))
            found.append((*near, *cpu.neighbor_classes(*near, labels_of(200, 300, 5), 20)))
    finally:
        numba.set_num_threads(before)
    assert found[0][1].dtype == dtype
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_no_rows_and_no_classes() -> None:
    empty = torch.zeros(1, dtype=torch.int64), torch.empty(0, dtype=torch.int32), torch.empty(0)
    index = cpu.inverted_index(*empty, 5, longest=1)
    assert (index.num_rows, index.num_features, len(index.values)) == (0, 5, 0)
    assert cpu.nearest_rows(index, *empty, 2)[0].shape == (0, 2)
    asked = torch.tensor([0, 1]), torch.tensor([3]), torch.ones(1)
    near_QK, products_QK = cpu.nearest_rows(index, *asked, 2)
    assert near_QK.tolist() == [[-1, -1]]
    found = cpu.neighbor_classes(near_QK, products_QK, RowLabels(*empty[:2], 0), 3)
    assert [part.tolist() for part in found] == [[[-1] * 3], [[0.0] * 3]]


@pytest.mark.parametrize(
    ("kernel", "change", "message"),
    [
        ("inverted_index", {"longest": 0}, "'longest' parameter of inverted_index must be at least 1"),
        ("inverted_index", {"indices": torch.tensor([0, 7]).int()}, r"'indices' .* ids in \[0, 3\). Got 7"),
        ("inverted_index", {"values": torch.ones(3)}, r"'values' .* of shape \(2,\)"),
        ("nearest_rows", {"k": 0}, "'k' parameter of nearest_rows must be at least 1"),
        ("nearest_rows", {"share": 0.0}, "'share' .* above 0 and at most 1"),
        ("nearest_rows", {"share": 1.1}, "'share' .* above 0 and at most 1"),
        ("nearest_rows", {"values": torch.ones(2).double()}, r"'values' .* of dtype torch.float32"),
        ("nearest_rows", {"own_Q": torch.tensor([0, 2])}, r"'own_Q' .* ids in \[-1, 2\). Got 2"),
        ("nearest_rows", {"own_Q": torch.tensor([0])}, r"'own_Q' .* of shape \(2,\)"),
        ("neighbor_classes", {"count": 0}, "'count' parameter of neighbor_classes must be at least 1"),
        ("neighbor_classes", {"near_QK": torch.tensor([[2]])}, r"'near_QK' .* ids in \[-1, 2\). Got 2"),
        ("neighbor_classes", {"weights_QK": torch.ones(2, 1)}, r"'weights_QK' .* of shape \(1, 1\)"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(kernel: str, change: dict[str, Any], message: str) -> None:
    rows = {
        "indptr": torch.tensor([0, 1, 2]),
        "indices": torch.tensor([0, 1]).int(),
        "values": torch.ones(2),
    }
    index = cpu.inverted_index(**rows, num_features=3, longest=1)
    arguments = {
        "inverted_index": {**rows, "num_features": 3, "longest": 1},
        "nearest_rows": {"index": index, **rows, "k": 1},
        "neighbor_classes": {
            "near_QK": torch.tensor([[1]]),
            "weights_QK": torch.ones(1, 1),
            "labels": RowLabels(torch.tensor([0, 1, 2]), torch.tensor([0, 3]).int(), 4),
            "count": 1,
        },
    }[kernel]
    getattr(cpu, kernel)(**arguments)
    with pytest.raises(ConfigError, match=message):
        getattr(cpu, kernel)(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indptr": torch.tensor([0, 1])}, "'indptr' .* rising from 0 to 2"),
        ({"indptr": torch.tensor([0, 3, 2])}, "'indptr' .* rising"),
        ({"rows": torch.tensor([0, 5]).int()}, r"'rows' .* ids in \[0, 4\). Got \(0, 5\)"),
        ({"rows": torch.tensor([0, 1])}, "'rows' .* torch.int32"),
        ({"values": torch.ones(2).half()}, "'values' .* torch.float32"),
    ],
    ids=str,
)
def test_damaged_lists_are_refused(change: dict[str, Any], message: str) -> None:
    arguments = {
        "indptr": torch.tensor([0, 1, 2]),
        "rows": torch.tensor([0, 1]).int(),
        "values": torch.ones(2),
        "num_rows": 4,
    }
    assert InvertedIndex(**arguments).nbytes == 24 + 8 + 8
    with pytest.raises(ConfigError, match=message):
        InvertedIndex(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indptr": torch.tensor([0, 1, 3])}, "'indptr' .* rising from 0 to 2"),
        ({"indptr": torch.tensor([1, 1, 2])}, "'indptr' .* rising from 0 to 2"),
        ({"indptr": torch.tensor([0, 3, 2])}, "'indptr' .* rising"),
        ({"indptr": torch.tensor([0, 1, 2]).int()}, "'indptr' .* torch.int64"),
        ({"classes": torch.tensor([0, 4]).int()}, r"'classes' .* ids in \[0, 4\). Got \(0, 4\)"),
        ({"classes": torch.tensor([-1, 0]).int()}, r"'classes' .* ids in \[0, 4\). Got \(-1, 0\)"),
        ({"classes": torch.tensor([0, 1])}, "'classes' .* torch.int32"),
    ],
    ids=str,
)
def test_damaged_labels_are_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"indptr": torch.tensor([0, 1, 2]), "classes": torch.tensor([0, 3]).int(), "num_classes": 4}
    kept = RowLabels(**arguments)
    assert (kept.num_rows, kept.nbytes) == (2, 24 + 8)
    with pytest.raises(ConfigError, match=message):
        RowLabels(**(arguments | change))
