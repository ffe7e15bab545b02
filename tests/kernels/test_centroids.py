"""Centroids of classes and the search for the nearest, against plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import pytest
import torch

from slidex.errors import ConfigError
from slidex.kernels import Centroids, cpu, reference
from tests.kernels.cases import sparse_rows

if TYPE_CHECKING:
    from collections.abc import Callable

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def classes_of(rows: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Class offsets and rows; class 0 has none."""
    rng = np.random.default_rng(seed)
    chosen = [
        np.sort(rng.choice(rows, rng.integers(1, min(rows, 6) + 1), replace=False)) for _ in range(classes)
    ]
    chosen[0] = chosen[0][:0]
    indptr = torch.from_numpy(np.concatenate([[0], np.cumsum([len(ids) for ids in chosen])]))
    return indptr, torch.from_numpy(np.concatenate(chosen)).int()


def assert_parity(
    make: Callable[..., Centroids],
    nearest: Callable[..., torch.Tensor],
    seed: int,
    *,
    rows: int = 30,
    features: int = 17,
    classes: int = 20,
    keep: int = 4,
    longest: int = 9,
    k: int = 6,
    share: float = 1.0,
) -> None:
    arguments = *classes_of(rows, classes, seed), *sparse_rows(rows, features, seed + 1), features
    got = make(*arguments, keep=keep, longest=longest)
    want = reference.class_centroids(*arguments, keep=keep, longest=longest)
    assert torch.equal(got.indptr, want.indptr)
    assert torch.equal(got.classes, want.classes)
    torch.testing.assert_close(got.values, want.values, rtol=1e-12, atol=1e-14)
    asked = sparse_rows(25, features, seed + 2)
    # Classes of the same rows have the same centroid, up to the order of sums: it is the scores that must agree.
    found = nearest(want, *asked, k, share=share)
    expected = reference.nearest_centroids(want, *asked, k, share=share)
    assert torch.equal(found < 0, expected < 0)
    assert all(len(set(ids[ids >= 0].tolist())) == int((ids >= 0).sum()) for ids in found)
    torch.testing.assert_close(
        _products(want, asked, found, share), _products(want, asked, expected, share), rtol=1e-12, atol=1e-14
    )


def _products(centroids: Centroids, rows: Rows, ids_NK: torch.Tensor, share: float) -> torch.Tensor:
    """Inner products of a share of the rows and centroids; 0 at pads."""
    dense_FC = torch.zeros(centroids.num_features, centroids.num_classes, dtype=torch.float64)
    feature = torch.repeat_interleave(torch.arange(centroids.num_features), centroids.indptr.diff())
    dense_FC[feature, centroids.classes.long()] = centroids.values
    x_NF = torch.zeros(len(ids_NK), centroids.num_features, dtype=torch.float64)
    for n, row in enumerate(zip(rows[0][:-1].tolist(), rows[0][1:].tolist(), strict=True)):
        best = rows[2][slice(*row)].abs().argsort(descending=True, stable=True)
        squares = rows[2][slice(*row)][best] ** 2
        count = int((squares.cumsum(0) - squares < share * squares.sum()).sum())
        x_NF[n, rows[1][slice(*row)][best[:count]].long()] = rows[2][slice(*row)][best[:count]]
    return (x_NF @ dense_FC).gather(1, ids_NK.clamp(min=0)).masked_fill(ids_NK < 0, 0)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"rows": 1, "classes": 2},
        {"classes": 1},
        {"features": 1, "longest": 20},  # all components are 1 or -1, up to rounding
        {"features": 3, "rows": 60, "longest": 20},
        {"keep": 1, "longest": 20},
        {"longest": 3},
        {"keep": 100, "longest": 100},
        {"longest": 1},
        {"k": 1},
        {"k": 50},
        {"share": 0.8, "longest": 20},
        {"share": 0.3},
        {"share": 1e-9, "k": 3},
        {"classes": 3000, "longest": 3000, "k": 20},  # where only those above a bound are ranked
        {"classes": 3000, "longest": 3000, "k": 1, "keep": 1},
    ],
    ids=str,
)
def test_both_are_what_the_reference_computes(shape: dict[str, Any]) -> None:
    for seed in range(5):
        assert_parity(cpu.class_centroids, cpu.nearest_centroids, 10 * seed, **shape)


def _broken_make(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[..., Centroids]:
    return lambda *arguments, **numbers: cpu.class_centroids(*arguments, **change(numbers))


BROKEN: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "one component less": (_broken_make(lambda n: n | {"keep": n["keep"] - 1}), cpu.nearest_centroids),
    "longer lists": (_broken_make(lambda n: n | {"longest": n["longest"] + 3}), cpu.nearest_centroids),
    "values are larger": (
        lambda *a, **n: cpu.class_centroids(*a[:4], a[4] + 1e-3, a[5], **n),
        cpu.nearest_centroids,
    ),
    "the two nearest exchanged": (
        cpu.class_centroids,
        lambda *a, **n: cpu.nearest_centroids(*a, **n)[:, [1, 0, *range(2, a[-1])]],
    ),
    "values of a row are another's": (
        cpu.class_centroids,
        lambda c, p, i, v, k, **n: cpu.nearest_centroids(c, p, i, v.roll(1), k, **n),
    ),
    "a share of the row": (
        cpu.class_centroids,
        lambda *a, share: cpu.nearest_centroids(*a, share=0.7 * share),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_comparison_fails_on_a_broken_kernel(name: str) -> None:
    with pytest.raises(AssertionError):
        assert_parity(*BROKEN[name], 0)


def test_sums_that_come_back_to_zero_are_noted_once() -> None:
    """Two rows of a class cancel in a feature, a third has it again; and of a row's products some do."""
    rows = (
        torch.tensor([0, 1, 2, 3]),
        torch.tensor([0, 0, 0], dtype=torch.int32),
        torch.tensor([1.0, -1.0, 3.0]),
    )
    made = cpu.class_centroids(torch.tensor([0, 3]), torch.arange(3).int(), *rows, 1, keep=4, longest=9)
    assert (made.classes.tolist(), made.values.tolist()) == ([0], [1.0])
    lists = Centroids(
        torch.tensor([0, 2, 4, 6]),
        torch.tensor([0, 1, 0, 1, 0, 1]).int(),
        torch.tensor([1.0, 1, 1, 1, 1, 2]),
        2,
    )
    asked = torch.tensor([0, 3]), torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([1.0, -1.0, 1.0])
    assert cpu.nearest_centroids(lists, *asked, 3).tolist() == [[1, 0, -1]]


def test_equal_ones_are_ordered_by_id() -> None:
    ones = torch.tensor([0, 4]), torch.tensor([0, 1, 2, 3], dtype=torch.int32), torch.ones(4)
    made = cpu.class_centroids(
        torch.tensor([0, 1, 2]), torch.tensor([0, 0]).int(), *ones, 4, keep=2, longest=9
    )
    assert made.indptr.tolist() == [0, 2, 4, 4, 4]
    assert cpu.nearest_centroids(made, *ones, 1).tolist() == [[0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    before, found = numba.get_num_threads(), []
    own, (indptr, indices, values) = classes_of(200, 300, 5), sparse_rows(200, 60, 6)
    try:
        for threads in (1, min(2, numba.config.NUMBA_NUM_THREADS)):
            numba.set_num_threads(threads)
            made = cpu.class_centroids(*own, indptr, indices, values.to(dtype), 60, keep=8, longest=100)
            found.append((made, cpu.nearest_centroids(made, indptr, indices, values.to(dtype), 10)))
    finally:
        numba.set_num_threads(before)
    (one, nearest), (two, other) = found
    assert one.values.dtype == dtype
    for name in ("indptr", "classes", "values"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert torch.equal(nearest, other)


def test_no_rows_and_no_classes() -> None:
    empty = torch.zeros(1, dtype=torch.int64), torch.empty(0, dtype=torch.int32), torch.empty(0)
    made = cpu.class_centroids(
        torch.zeros(4, dtype=torch.int64), torch.empty(0).int(), *empty, 5, keep=1, longest=1
    )
    assert (made.num_classes, made.num_features, len(made.values)) == (3, 5, 0)
    assert cpu.nearest_centroids(made, *empty, 2).shape == (0, 2)
    none = Centroids(torch.zeros(6, dtype=torch.int64), torch.empty(0).int(), torch.empty(0), 0)
    assert cpu.nearest_centroids(
        none, torch.tensor([0, 1]), torch.tensor([3]), torch.ones(1), 2
    ).tolist() == [[-1, -1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0}, "'keep' parameter of class_centroids must be at least 1"),
        ({"longest": 0}, "'longest' parameter of class_centroids must be at least 1"),
        ({"rows": torch.tensor([0, 9]).int()}, r"'rows' .* ids in \[0, 2\). Got 9"),
        ({"class_indptr": torch.tensor([0, 3])}, "'class_indptr' .* rising from 0 to 2"),
        ({"indices": torch.tensor([0, 7]).int()}, r"'indices' .* ids in \[0, 3\). Got 7"),
        ({"values": torch.ones(3)}, r"'values' .* of shape \(2,\)"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {
        "class_indptr": torch.tensor([0, 2]),
        "rows": torch.tensor([0, 1]).int(),
        "indptr": torch.tensor([0, 1, 2]),
        "indices": torch.tensor([0, 1]).int(),
        "values": torch.ones(2),
        "num_features": 3,
        "keep": 1,
        "longest": 1,
    }
    made = cpu.class_centroids(**arguments)
    with pytest.raises(ConfigError, match=message):
        cpu.class_centroids(**(arguments | change))
    with pytest.raises(ConfigError, match="'k' parameter of nearest_centroids must be at least 1"):
        cpu.nearest_centroids(made, arguments["indptr"], arguments["indices"], arguments["values"], 0)
    with pytest.raises(ConfigError, match=r"'values' .* of dtype torch.float32"):
        cpu.nearest_centroids(
            made, arguments["indptr"], arguments["indices"], arguments["values"].double(), 1
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indptr": torch.tensor([0, 1])}, "'indptr' .* rising from 0 to 2"),
        ({"indptr": torch.tensor([0, 3, 2])}, "'indptr' .* rising"),
        ({"classes": torch.tensor([0, 5]).int()}, r"'classes' .* ids in \[0, 4\). Got \(0, 5\)"),
        ({"classes": torch.tensor([0, 1])}, "'classes' .* torch.int32"),
        ({"values": torch.ones(2).half()}, "'values' .* torch.float32"),
    ],
    ids=str,
)
def test_damaged_lists_are_refused(change: dict[str, Any], message: str) -> None:
    arguments = {
        "indptr": torch.tensor([0, 1, 2]),
        "classes": torch.tensor([0, 1]).int(),
        "values": torch.ones(2),
        "num_classes": 4,
    }
    assert Centroids(**arguments).nbytes == 24 + 8 + 8
    with pytest.raises(ConfigError, match=message):
        Centroids(**(arguments | change))
