from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numba
import numpy as np
import pytest
import torch

from slidex.errors import ConfigError
from slidex.kernels import LinearWeights, cpu, reference
from slidex.kernels.cpu import linear
from tests.kernels.cases import sparse_rows

TIGHT = {"passes": 100_000, "tolerance": 1e-13}


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


def pairs_of(rows: int, classes: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Class offsets, rows and signs: class 0 has no pair, class 1 only true rows, class 2 only others, if there are."""
    rng = np.random.default_rng(seed)
    chosen = [np.sort(rng.choice(rows, rng.integers(1, rows + 1), replace=False)) for _ in range(classes)]
    chosen[0] = chosen[0][:0]
    positive = [rng.random(len(ids)) < 0.4 for ids in chosen]
    for c, sign in ((1, True), (2, False)):
        if c < classes:
            positive[c][:] = sign
    indptr = torch.from_numpy(np.concatenate([[0], np.cumsum([len(ids) for ids in chosen])]))
    return indptr, torch.from_numpy(np.concatenate(chosen)).int(), torch.from_numpy(np.concatenate(positive))


def dense(weights: LinearWeights) -> torch.Tensor:
    """(C, F + 1), the bias last."""
    w_CF = weights.values.new_zeros(len(weights.bias), weights.num_features + 1)
    row = torch.repeat_interleave(torch.arange(len(weights.bias)), weights.indptr.diff())
    w_CF[row, weights.features.long()], w_CF[:, -1] = weights.values, weights.bias
    return w_CF


Fit = Callable[..., LinearWeights]


def assert_fit_parity(
    fit: Fit, seed: int, *, rows: int = 30, features: int = 17, classes: int = 9, **numbers: Any
) -> None:
    arguments = *pairs_of(rows, classes, seed), *sparse_rows(rows, features, seed + 1), features
    numbers = {"cost": 1.3} | numbers
    got = fit(*arguments, **numbers, **TIGHT)
    want = reference.linear_fit(*arguments, **numbers, passes=100)
    torch.testing.assert_close(dense(got), dense(want), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"rows": 1, "classes": 3},
        {"features": 1},
        {"features": 3, "rows": 60},
        {"cost": 0.01},
        {"cost": 30.0},
        {"cost": torch.arange(9, dtype=torch.float64).exp() / 100},
        {"classes": 1},
        {"classes": 80, "rows": 5},
        {"centroid": 2.0, "origin": -1.0},
        {"centroid": 0.5, "rows": 60, "features": 40},
        {"origin": 3.0, "cost": 0.01},
    ],
    ids=str,
)
def test_fit_solves_what_the_reference_solves(shape: dict[str, Any]) -> None:
    for seed in range(3):
        assert_fit_parity(cpu.linear_fit, 10 * seed, **shape)


def test_fit_agrees_with_liblinear() -> None:
    from scipy.sparse import csr_matrix
    from sklearn.svm import LinearSVC

    indptr, indices, values = sparse_rows(50, 20, 3)
    x = csr_matrix((values.numpy(), indices.numpy(), indptr.numpy()), shape=(50, 20))
    positive = np.random.default_rng(4).random(50) < 0.3
    theirs = LinearSVC(C=0.7, loss="squared_hinge", tol=1e-10, max_iter=100_000).fit(x, positive)
    ours = cpu.linear_fit(
        torch.tensor([0, 50]),
        torch.arange(50).int(),
        torch.from_numpy(positive),
        indptr,
        indices,
        values,
        20,
        cost=0.7,
        **TIGHT,
    )
    want = np.concatenate([theirs.coef_[0], theirs.intercept_])
    np.testing.assert_allclose(dense(ours)[0].numpy(), want, rtol=1e-6, atol=1e-7)


BROKEN: dict[str, Callable[[tuple[Any, ...]], tuple[Any, ...]]] = {
    "a sign is flipped": lambda a: (*a[:2], a[2] ^ (torch.arange(len(a[2])) == 40), *a[3:]),
    "a row is another": lambda a: (a[0], torch.where(torch.arange(len(a[1])) == 40, a[1] ^ 1, a[1]), *a[2:]),
    "values are 1 % larger": lambda a: (*a[:5], a[5] * 1.01, a[6]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_comparison_fails_on_a_broken_fit(name: str) -> None:
    def broken(*arguments: Any, **numbers: Any) -> LinearWeights:
        return cpu.linear_fit(*BROKEN[name](arguments), **numbers)

    with pytest.raises(AssertionError):
        assert_fit_parity(broken, 0)


@pytest.mark.parametrize(
    "number",
    [{"centroid": 1.0}, {"origin": -1.0}, {"cost": torch.tensor([1.3] * 8 + [1.2]).double()}],
    ids=str,
)
def test_comparison_fails_where_a_number_is_another(number: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        assert_fit_parity(lambda *a, **n: cpu.linear_fit(*a, **n | number), 0)


def test_few_passes_stop_early_and_many_do_not_matter() -> None:
    arguments = *pairs_of(40, 6, 1), *sparse_rows(40, 30, 2), 30
    exact = dense(cpu.linear_fit(*arguments, cost=1.0, **TIGHT))
    errors = [
        float((dense(cpu.linear_fit(*arguments, cost=1.0, passes=passes, tolerance=0)) - exact).abs().max())
        for passes in (1, 5, 50, 5000)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-8 < errors[0]
    loose = dense(cpu.linear_fit(*arguments, cost=1.0, passes=5000, tolerance=0.5))
    assert float((loose - exact).abs().max()) > 1e-6


def test_small_weights_are_dropped_and_the_bias_is_kept() -> None:
    arguments = *pairs_of(40, 6, 1), *sparse_rows(40, 30, 2), 30
    whole = cpu.linear_fit(*arguments, cost=1.0)
    cut = cpu.linear_fit(*arguments, cost=1.0, threshold=0.2)
    assert 0 < len(cut.values) < len(whole.values)
    want = dense(whole)
    want[:, :-1][want[:, :-1].abs() < 0.2] = 0
    assert torch.equal(dense(cut), want)


def test_a_class_without_pairs_is_never_true() -> None:
    weights = cpu.linear_fit(*pairs_of(20, 4, 0), *sparse_rows(20, 9, 0), 9, cost=1.0)
    assert weights.indptr[1] == 0
    assert weights.bias[0] == -1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype, restored_threads: None) -> None:
    arguments = *pairs_of(200, 300, 5), *sparse_rows(200, 60, 6, dtype), 60
    found = []
    for threads in (1, min(2, numba.config.NUMBA_NUM_THREADS), 1):
        numba.set_num_threads(threads)
        found.append(cpu.linear_fit(*arguments, cost=1.0))
    assert found[0].values.dtype == dtype
    for name in ("indptr", "features", "values", "bias"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name))
        assert torch.equal(getattr(found[0], name), getattr(found[2], name))


@pytest.mark.parametrize(
    ("features", "near"), [(40, 1e-4), (1 << 12, 1e-4), (1 << 20, 3e-3), ((1 << 20) + 1, 1e-4)]
)
@pytest.mark.parametrize("centroid", [0.0, 2.0])
def test_single_precision_is_near_double(features: int, near: float, centroid: float) -> None:
    """Words hold 31 bits less those of a feature's number; values of more than 2^20 features are not rounded."""
    pairs, (indptr, indices, values) = pairs_of(60, 8, 7), sparse_rows(60, 40, 8)
    numbers = {"cost": 1.0, "passes": 1000, "tolerance": 1e-5, "centroid": centroid}
    double = dense(cpu.linear_fit(*pairs, indptr, indices, values, 40, **numbers))
    single = cpu.linear_fit(*pairs, indptr, indices, values.float(), features, **numbers)
    single = dense(replace(single, num_features=40))
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=near)


def test_progress_counts_all_classes_and_may_stop_the_fit() -> None:
    arguments = *pairs_of(30, 50, 1), *sparse_rows(30, 9, 2), 9
    told: list[tuple[int, int]] = []
    cpu.linear_fit(*arguments, cost=1.0, progress=lambda *facts: told.append(facts))
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (50, 50)

    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cpu.linear_fit(*arguments, cost=1.0, progress=stop)


def test_a_stopped_fit_leaves_out_what_has_not_begun(
    restored_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = *pairs_of(30, 50, 1), *sparse_rows(30, 9, 2), 9
    fitted: list[int] = []
    fit = linear._fit_classes
    monkeypatch.setattr(
        linear,
        "_fit_classes",
        lambda first, *rest: fitted.append(first) or time.sleep(0.05) or fit(first, *rest),
    )
    monkeypatch.setattr(linear, "_CHUNK_PAIRS", 20)
    numba.set_num_threads(1)
    cpu.linear_fit(*arguments, cost=1.0)
    whole = len(fitted)

    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    fitted.clear()
    with pytest.raises(KeyboardInterrupt):
        cpu.linear_fit(*arguments, cost=1.0, progress=stop)
    assert len(fitted) <= 3 < whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cost": 0.0}, "'cost'"),
        ({"cost": float("nan")}, "'cost'"),
        ({"cost": torch.tensor([1.0, 0.0]).double()}, r"'cost' .* above 0\. Got 0.0"),
        ({"cost": torch.ones(3).double()}, r"'cost' .* of shape \(2,\)"),
        ({"cost": torch.ones(2)}, "'cost' .* of dtype torch.float64"),
        ({"passes": 0}, "'passes'"),
        ({"tolerance": -1.0}, "'tolerance'"),
        ({"threshold": float("nan")}, "'threshold'"),
        ({"centroid": -1.0}, "'centroid'"),
        ({"origin": float("inf")}, "'origin'"),
        ({"values": torch.tensor([1.0, float("nan")]).double()}, "'values' .* finite. Got nan"),
        ({"values": torch.tensor([-float("inf"), 0.0]).double()}, "'values' .* finite. Got -inf"),
    ],
)
def test_fit_refuses_numbers_out_of_range(change: dict[str, Any], message: str) -> None:
    names = ("class_indptr", "rows", "positive", "indptr", "indices", "values", "num_features")
    arguments = dict(zip(names, (*pairs_of(5, 2, 0), *sparse_rows(5, 4, 0), 4), strict=True))
    if "values" in change:
        change = {"values": change["values"].repeat(9)[: len(arguments["values"])]}
    with pytest.raises(ConfigError, match=message):
        cpu.linear_fit(**(arguments | {"cost": 1.0} | change))


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, torch.tensor([0, 9]), "'class_indptr'"),
        (1, torch.full((0,), 5), "'class_indptr'"),
        (2, torch.zeros(3, dtype=torch.int64), "'positive'"),
        (4, torch.tensor([9], dtype=torch.int32), "'indptr'"),
        (5, torch.zeros(1), "'indices'|'values'|dtype"),
        (6, 1, "'indices'"),
    ],
)
def test_fit_refuses_arrays_that_do_not_fit(at: int, value: Any, message: str) -> None:
    arguments = [*pairs_of(5, 2, 0), *sparse_rows(5, 6, 0), 6]
    arguments[at] = value
    with pytest.raises(ConfigError, match=message):
        cpu.linear_fit(*arguments, cost=1.0)


def scores_problem(dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    """Classes of 0 to 300 weights; rows of few and of many features; pads."""
    rng = np.random.default_rng(11)
    features, sizes = 320, [0, 1, 2, 7, 63, 64, 65, 300]
    chosen = [np.sort(rng.choice(features, size, replace=False)) for size in sizes]
    weights = LinearWeights(
        torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)])),
        torch.from_numpy(np.concatenate(chosen).astype(np.int32)),
        torch.from_numpy(rng.normal(size=sum(sizes))).to(dtype),
        torch.from_numpy(rng.normal(size=len(sizes))).to(dtype),
        features,
    )
    counts = [0, 1, 3, 200, 2]
    ids = [np.sort(rng.choice(features, count, replace=False)) for count in counts]
    indptr = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
    indices = torch.from_numpy(np.concatenate(ids).astype(np.int32))
    values = torch.from_numpy(rng.normal(size=len(indices))).to(dtype)
    return weights, indptr, indices, values, torch.from_numpy(rng.integers(-1, len(sizes), (len(counts), 40)))


def test_scores_agree_with_the_reference() -> None:
    problem = scores_problem()
    torch.testing.assert_close(
        cpu.linear_scores(*problem), reference.linear_scores(*problem), rtol=1e-12, atol=1e-12
    )
    none = *problem[:4], problem[4][:, :0]
    assert cpu.linear_scores(*none).shape == (5, 0)
    no_rows = problem[0], torch.tensor([0]), problem[2][:0], problem[3][:0], problem[4][:0]
    assert cpu.linear_scores(*no_rows).shape == (0, 40)


def test_comparison_fails_on_broken_scores() -> None:
    weights, *rest = scores_problem()
    broken = LinearWeights(
        weights.indptr, weights.features, weights.values.roll(1), weights.bias, weights.num_features
    )
    with pytest.raises(AssertionError):
        torch.testing.assert_close(cpu.linear_scores(broken, *rest), reference.linear_scores(weights, *rest))


def test_scores_refuse_candidates_that_are_no_classes() -> None:
    problem = scores_problem()
    with pytest.raises(ConfigError, match="'candidates_NA'"):
        cpu.linear_scores(*problem[:4], problem[4] + 7)
    with pytest.raises(ConfigError, match="'values'"):
        cpu.linear_scores(*problem[:3], problem[3].float(), problem[4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indptr": torch.tensor([0, 2, 1, 3])}, "'indptr'"),
        ({"indptr": torch.tensor([0, 2, 4])}, "'indptr'"),
        ({"features": torch.tensor([1, 0, 2], dtype=torch.int32)}, "'features'"),
        ({"features": torch.tensor([0, 0, 2], dtype=torch.int32)}, "'features'"),
        ({"features": torch.tensor([0, 1, 5], dtype=torch.int32)}, "'features'"),
        ({"features": torch.tensor([-1, 1, 2], dtype=torch.int32)}, "'features'"),
        ({"values": torch.zeros(3, dtype=torch.float16)}, "'values'|'bias'"),
        ({"bias": torch.zeros(3, dtype=torch.float64)}, "'bias'"),
    ],
)
def test_weights_are_checked(change: dict[str, torch.Tensor], message: str) -> None:
    sound = {
        "indptr": torch.tensor([0, 2, 2, 3]),
        "features": torch.tensor([0, 1, 0], dtype=torch.int32),
        "values": torch.ones(3),
        "bias": torch.zeros(3),
    }
    assert LinearWeights(**sound, num_features=4).nbytes == 4 * 8 + 3 * 4 + 3 * 4 + 3 * 4
    with pytest.raises(ConfigError, match=message):
        LinearWeights(**(sound | change), num_features=4)
