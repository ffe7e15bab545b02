"""What the kernels do at the border: non-finite numbers, bad arguments, the vector exponentials, the pair sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from slidex import kernels
from slidex.errors import ConfigError
from slidex.kernels import OPTIMIZERS, RowState, StepSettings, cpu, reference
from slidex.kernels.cpu.intrinsics import exp_nonpositive, log1p_unit, maximum
from slidex.kernels.cpu.transpose import PAIR_BITS, PAIR_MASK, group_by_id
from tests.kernels.cases import KERNELS, Problem, Shape, outcome

DTYPES = (torch.float32, torch.float64)


@njit
def _map_exp(x, out):
    for i in range(x.size):
        out[i] = exp_nonpositive(x[i])


@njit
def _map_log1p(x, out):
    for i in range(x.size):
        out[i] = log1p_unit(x[i])


def test_float32_exponential_is_within_two_units_in_the_last_place() -> None:
    x = -np.linspace(0, 87.3, 400_001).astype(np.float32)
    got = np.empty_like(x)
    _map_exp(x, got)
    want = np.exp(x.astype(np.float64))
    assert np.max(np.abs(got - want) / want) < 2e-7
    _map_exp(np.array([0, -0.0, -88, -104, -1e30, -np.inf, np.nan], np.float32), got[:7])
    np.testing.assert_array_equal(got[:7], np.array([1, 1, 0, 0, 0, 0, np.nan], np.float32))


def test_float32_logarithm_is_within_three_units_in_the_last_place() -> None:
    x = np.concatenate([np.linspace(0, 1, 100_001), np.logspace(-37, 0, 1000)]).astype(np.float32)
    got = np.empty_like(x)
    _map_log1p(x, got)
    want = np.log1p(x.astype(np.float64))
    assert np.all(np.abs(got - want) <= 3e-7 * want)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_maximum_orders_all_finite_and_infinite_floats(dtype: type) -> None:
    rng = np.random.Generator(np.random.Philox(key=3))
    for size in (1, 2, 63, 64, 200):
        for sign in (1, -1):
            x = (sign * np.abs(rng.standard_normal(size)) * 1e4).astype(dtype)
            assert maximum(x) == x.max()
            assert maximum.py_func(x) == x.max()
    assert maximum(np.array([-np.inf, -5], dtype)) == -5
    assert maximum(np.array([-np.inf], dtype)) == -np.inf
    assert maximum(np.array([-1, np.inf], dtype)) == np.inf


def test_vector_exponentials_can_be_called_from_python() -> None:
    x = np.linspace(-20, 0, 50)
    compiled = np.empty_like(x)
    _map_exp(x, compiled)
    np.testing.assert_array_equal([exp_nonpositive(value) for value in x], compiled)
    _map_log1p(-x / 20, compiled)
    np.testing.assert_array_equal([log1p_unit(value) for value in -x / 20], compiled)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["softmax_loss", "logistic_loss", "shared_softmax_loss", "shared_logistic_loss"]
)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("slot", [0, 40, 69])
def test_a_non_finite_score_shows_in_its_loss_only(
    name: str, dtype: torch.dtype, bad: float, slot: int
) -> None:
    arguments = Problem(Shape(scale=1.0)).arguments(name, dtype)
    arguments[0][1, slot] = bad
    loss = outcome(getattr(cpu, name), arguments)[0]
    assert not loss[1].isfinite()
    assert loss[:1].isfinite().all()
    assert loss[2:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("module", [cpu, reference], ids=["cpu", "reference"])
def test_a_row_without_targets_has_no_softmax_loss(module: object, dtype: torch.dtype) -> None:
    logits = torch.tensor([[1.0, 2.0, -torch.inf], [3.0, 1.0, 0.0]], dtype=dtype)
    target = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=dtype)
    loss, grad = module.softmax_loss(logits, target, None)
    assert loss[0] == 0
    assert loss[1] > 2
    assert grad[0].eq(0).all()
    scores = logits.clone()
    indptr, positions, weights = torch.tensor([0, 0, 1]), torch.tensor([1]), torch.ones(1, dtype=dtype)
    torch.testing.assert_close(module.shared_softmax_loss(scores, indptr, positions, weights, None), loss)
    torch.testing.assert_close(scores, grad)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_untouched_rows_keep_weights_and_state(optimizer: str) -> None:
    shape = Shape(rows=2, slots=3, optimizer=optimizer)
    arguments = Problem(shape).arguments("pair_update", torch.float32)
    active, tensors = arguments[2], [arguments[3], arguments[4], *arguments[5], *arguments[6]]
    before = [tensor.clone() for tensor in tensors]
    cpu.pair_update(*arguments)
    touched = torch.zeros(len(arguments[3]), dtype=torch.bool)
    touched[active[active >= 0]] = True
    for now, was in zip(tensors, before, strict=True):
        if len(now):  # Adagrad has no first moment
            assert torch.equal(now[~touched], was[~touched])
            assert (now[touched] != was[touched]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("module", [cpu, reference], ids=["cpu", "reference"])
def test_rows_without_a_gradient_only_decay(module: object, optimizer: str, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(5, 7, dtype=dtype), torch.randn(5, dtype=dtype)
    states = RowState.zeros_like(weight, optimizer), RowState.zeros_like(bias, optimizer)
    settings = StepSettings(learning_rate=0.1, step=1, weight_decay=0.5)
    expected = weight * 0.95, bias * 0.95
    ids, zeros = torch.tensor([4, 0, 1, 2, 3]), torch.zeros(5, 7, dtype=dtype)
    module.rows_update(ids, zeros, zeros[:, 0].contiguous(), weight, bias, *states, settings)
    torch.testing.assert_close((weight, bias), expected)
    assert all(moment.eq(0).all() for state in states for moment in state)


@pytest.mark.parametrize(
    ("optimizer", "shapes"),
    [
        ("adam", [(6, 4), (6, 4), (6,), (6,)]),
        ("rowwise_adam", [(6, 4), (6, 1), (6,), (6,)]),
        ("rowwise_adagrad", [(0, 4), (6, 1), (0,), (6,)]),
    ],
)
def test_what_each_optimizer_keeps(optimizer: str, shapes: list[tuple[int, ...]]) -> None:
    weight, bias = torch.nn.Parameter(torch.ones(6, 4)), torch.ones(6, dtype=torch.float64)
    kept = [*RowState.zeros_like(weight, optimizer), *RowState.zeros_like(bias, optimizer)]
    assert [tuple(moment.shape) for moment in kept] == shapes
    assert [moment.dtype for moment in kept] == [torch.float32] * 2 + [torch.float64] * 2
    assert all(moment.is_contiguous() and not moment.requires_grad and moment.eq(0).all() for moment in kept)


def test_an_unknown_optimizer_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'optimizer' parameter .* one of .*'rowwise_adam'.* Got 'sgd'"):
        RowState.zeros_like(torch.ones(2, 2), "sgd")


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(-1, 5000), max_size=30), max_size=12),
    st.integers(5001, 2**31 - 1),
    st.integers(1, 9),
)
def test_pairs_are_grouped_by_id_in_order(rows: list[list[int]], bound: int, chunks: int) -> None:
    ids = np.array([entry for row in rows for entry in row], dtype=np.int64)
    indptr = np.cumsum([0, *map(len, rows)])
    groups = group_by_id(ids, indptr, bound, chunks)
    order = np.argsort(ids, kind="stable")
    order = order[ids[order] >= 0]
    np.testing.assert_array_equal(groups.keys & PAIR_MASK, order)
    np.testing.assert_array_equal(groups.keys >> PAIR_BITS, ids[order])
    np.testing.assert_array_equal(groups.source_rows, np.repeat(np.arange(len(rows)), np.diff(indptr)))
    unique, starts = np.unique(ids[order], return_index=True)
    np.testing.assert_array_equal(groups.starts, [*starts, len(order)])
    assert groups.bounds[0] == 0
    assert groups.bounds[-1] == len(unique)
    assert (np.diff(groups.bounds) >= 0).all()
    assert len(groups.bounds) == chunks + 1


def test_the_sort_handles_ids_of_every_digit() -> None:
    bound = 2**31 - 1
    ids = np.random.Generator(np.random.Philox(key=5)).integers(0, bound, 5000)
    groups = group_by_id(ids, np.array([0, 5000]), bound, 4)
    np.testing.assert_array_equal(groups.keys >> PAIR_BITS, np.sort(ids))


def _spoiled(name: str, at: int, change: object) -> list[object]:
    arguments = Problem(Shape()).arguments(name, torch.float32)
    arguments[at] = change(arguments[at])
    return arguments


@pytest.mark.parametrize(
    ("name", "at", "change", "message"),
    [
        ("pair_logits", 3, lambda a: a.masked_fill(a == 82, 83), r"'active_NA'.*ids in \[-1, 83\). Got 83"),
        ("pair_logits", 3, lambda a: a.masked_fill(a == 82, -2), r"'active_NA'.*Got -2"),
        ("pair_logits", 3, lambda a: a[1:], r"'active_NA'.*of shape"),
        ("pair_logits", 3, lambda a: a.double(), r"'active_NA'.*torch.int64"),
        ("pair_logits", 1, lambda w: w[:, :5], r"'weight_CD'.*of shape"),
        ("pair_logits", 1, lambda w: w.double(), r"'weight_CD'.*of dtype torch.float32"),
        ("pair_logits", 0, lambda h: h.half(), r"torch.float32 or torch.float64"),
        ("pair_logits", 2, lambda b: b.to("meta"), r"'bias_C'.*on the CPU"),
        ("pair_hidden_grad", 0, lambda g: g[:, 1:], r"'grad_NA'.*of shape"),
        ("pair_update", 3, lambda w: w.T.contiguous().T, r"'weight_CD'.*contiguous"),
        ("pair_update", 2, lambda a: a + 1, r"'active_NA'.*ids in"),
        ("embedding_bag", 0, lambda p: p + 1, r"'indptr'.*rising from 0"),
        ("embedding_bag", 0, lambda p: p.flip(0), r"'indptr'.*rising from 0"),
        ("embedding_bag", 0, lambda p: p[:0], r"'indptr'"),
        ("embedding_bag", 1, lambda i: i - 50, r"'indices'.*ids in \[0, 83\)"),
        ("embedding_bag_update", 2, lambda v: v[1:], r"'values'.*of shape"),
        (
            "rows_update",
            5,
            lambda s: RowState(s.moment1[1:], s.moment2),
            r"'moment1 of weight_CD'.*of shape \(0, 24",
        ),
        (
            "rows_update",
            5,
            lambda s: RowState(s.moment1[:0], s.moment2),
            r"'moment2 of weight_CD'.*of shape \(83, 1",
        ),
        (
            "rows_update",
            5,
            lambda s: RowState(s.moment1, s.moment2[:, :2].clone()),
            r"'moment2 of .*of shape \(83, 24",
        ),
        (
            "rows_update",
            5,
            lambda s: RowState(s.moment1, s.moment2[:, 0].clone()),
            r"'moment2 of .*of shape \(83, 24",
        ),
        (
            "rows_update",
            5,
            lambda s: RowState(s.moment1, s.moment2[:, :1]),
            r"'moment2 of weight_CD'.*contiguous",
        ),
        (
            "pair_update",
            6,
            lambda s: RowState(s.moment1, s.moment2[1:]),
            r"'moment2 of bias_C'.*of shape \(83,\)",
        ),
        ("rows_update", 0, lambda i: i + 83, r"'ids_U'.*ids in \[0, 83\)"),
        ("gather_rows", 2, lambda i: i - 83, r"'ids_U'.*ids in \[0, 83\)"),
        ("shared_softmax_loss", 2, lambda p: p + 70, r"'target_positions'.*ids in \[0, 70\)"),
        ("shared_softmax_loss", 0, lambda z: z.T.contiguous().T, r"'logits_NU'.*contiguous"),
        ("shared_logistic_loss", 4, lambda w: w[1:], r"'weight_U'.*of shape"),
        ("softmax_loss", 1, lambda t: t[:, 1:], r"'target_NA'.*of shape"),
    ],
)
def test_bad_arguments_are_refused_before_any_memory_is_touched(
    name: str, at: int, change: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"parameter of {name} must be|{name}") as caught:
        getattr(cpu, name)(*_spoiled(name, at, change))
    assert caught.match(message)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("learning_rate", -1.0),
        ("step", 0),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("epsilon", -1e-9),
        ("weight_decay", -1.0),
        ("seed", -1),
    ],
)
def test_step_settings_are_checked(setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"'{setting}' parameter of StepSettings must be .* Got {value}"):
        StepSettings(**({"learning_rate": 0.1, "step": 1} | {setting: value}))


def test_kernels_are_found_by_device() -> None:
    assert kernels.get("cpu") is cpu
    assert kernels.get(torch.device("cpu")) is cpu
    assert kernels.get("reference") is reference
    with pytest.raises(ConfigError, match=r"'cpu', 'cuda' or 'reference'\. Got 'meta'"):
        kernels.get(torch.device("meta"))
    for name in KERNELS:
        assert callable(getattr(cpu, name))
        assert callable(getattr(reference, name))
    # Those of the ranker, which works on the CPU: test_linear.py, test_neighbors.py and test_best_classes.py.
    ranker = [
        "best_classes",
        "linear_fit",
        "linear_scores",
        "inverted_index",
        "nearest_rows",
        "neighbor_classes",
    ]
    assert sorted([*KERNELS, *ranker]) == sorted(cpu.__all__)
