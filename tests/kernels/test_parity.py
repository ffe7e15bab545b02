from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numba
import pytest
import torch

from slidex.kernels import OPTIMIZERS, RowState, cpu, reference
from tests.kernels.cases import KERNELS, SETTINGS, SHAPES, UPDATES, Problem, Shape, assert_parity, outcome

CASES = [(name, "adam") for name in KERNELS] + [
    (name, optimizer) for name in UPDATES for optimizer in OPTIMIZERS if optimizer != "adam"
]


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(("name", "optimizer"), CASES)
def test_cpu_kernel_agrees_with_reference(name: str, optimizer: str, shape: Shape) -> None:
    for seed in range(2):
        assert_parity(
            getattr(cpu, name), getattr(reference, name), name, replace(shape, optimizer=optimizer), seed
        )


@pytest.mark.parametrize(("name", "optimizer"), CASES)
def test_same_bits_in_every_run_and_for_any_number_of_threads(
    name: str, optimizer: str, restored_threads: None
) -> None:
    kernel = getattr(cpu, name)
    arguments = Problem(replace(SHAPES["many-ids"], optimizer=optimizer)).arguments(name, torch.float32)
    first = outcome(kernel, arguments)
    for run in range(20):
        numba.set_num_threads(1 + run % min(2, numba.config.NUMBA_NUM_THREADS))
        for got, want in zip(outcome(kernel, arguments), first, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", [name for name in KERNELS if "shared" not in name and name not in UPDATES])
def test_inputs_are_left_alone(name: str) -> None:
    arguments = Problem(Shape()).arguments(name, torch.float64)
    before = [argument.clone() for argument in arguments if isinstance(argument, torch.Tensor)]
    getattr(cpu, name)(*arguments)
    after = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


Kernel = Callable[..., object]


def _scaled(kernel: Kernel, at: int) -> Kernel:
    """One argument is 1 % too large."""

    def broken(*arguments: object) -> object:
        changed = list(arguments)
        changed[at] = changed[at] * 1.01
        return kernel(*changed)

    return broken


def _without(kernel: Kernel, at: int) -> Kernel:
    """One argument counts as zero: a bias, an offset, or values."""

    def broken(*arguments: object) -> object:
        changed = list(arguments)
        changed[at] = torch.zeros_like(changed[at])
        return kernel(*changed)

    return broken


def _pair_lost(kernel: Kernel, at: int) -> Kernel:
    """The first pair of `active` that is none counts as a pad."""

    def broken(*arguments: object) -> object:
        changed = list(arguments)
        active = changed[at].clone()
        active.view(-1)[(active.view(-1) >= 0).nonzero()[0]] = -1
        changed[at] = active
        return kernel(*changed)

    return broken


def _label_shifted(kernel: Kernel, at: int) -> Kernel:
    """The target moves one slot (dense), or the first target one position (CSR)."""

    def broken(*arguments: object) -> object:
        changed = list(arguments)
        target = changed[at].clone()
        if target.dim() == 2:
            target = target.roll(1, dims=1)
        else:
            target[0] = target[0] - 1 if target[0] else 1
        changed[at] = target
        return kernel(*changed)

    return broken


def _other_settings(kernel: Kernel, setting: str, value: float) -> Kernel:
    def broken(*arguments: object) -> object:
        return kernel(*arguments[:-1], replace(SETTINGS, **{setting: value}))

    return broken


def _other_state(kernel: Kernel, at: int, change: Callable[[RowState], RowState]) -> Kernel:
    def broken(*arguments: object) -> object:
        changed = list(arguments)
        changed[at] = change(changed[at])
        return kernel(*changed)

    return broken


def _moment2_not_stored(state: RowState) -> RowState:
    return RowState(state.moment1, state.moment2.clone())


def _moment1_not_stored(state: RowState) -> RowState:
    return RowState(state.moment1.clone(), state.moment2)


def _rows_mixed_up(state: RowState) -> RowState:
    """Moments of the next row, written back where they came from."""
    state.moment2.copy_(state.moment2.roll(1, dims=0))
    return state


def _moment2_too_large(state: RowState) -> RowState:
    state.moment2.mul_(1.01)
    return state


def _no_gradient(kernel: Kernel) -> Kernel:
    """A shared loss that forgets to overwrite its scores."""

    def broken(*arguments: object) -> object:
        return kernel(arguments[0].clone(), *arguments[1:])

    return broken


BROKEN = {
    "embedding_bag: bias dropped": ("embedding_bag", _without, 4),
    "embedding_bag: values ignored": ("embedding_bag", _scaled, 2),
    "embedding_bag: one feature shifted": ("embedding_bag", _label_shifted, 1),
    "embedding_bag_update: scale": ("embedding_bag_update", _scaled, 3),
    "pair_logits: bias dropped": ("pair_logits", _without, 2),
    "pair_logits: scale": ("pair_logits", _scaled, 0),
    "pair_logits: pair lost": ("pair_logits", _pair_lost, 3),
    "pair_hidden_grad: scale": ("pair_hidden_grad", _scaled, 0),
    "pair_hidden_grad: pair lost": ("pair_hidden_grad", _pair_lost, 2),
    "pair_update: pair lost": ("pair_update", _pair_lost, 2),
    "pair_update: scale": ("pair_update", _scaled, 1),
    "softmax_loss: label shifted": ("softmax_loss", _label_shifted, 1),
    "softmax_loss: offset dropped": ("softmax_loss", _without, 2),
    "logistic_loss: label shifted": ("logistic_loss", _label_shifted, 1),
    "logistic_loss: weight scaled": ("logistic_loss", _scaled, 2),
    "gather_rows: scale": ("gather_rows", _scaled, 0),
    "gather_rows: bias dropped": ("gather_rows", _without, 1),
    "rows_update: bias gradient dropped": ("rows_update", _without, 2),
    "shared_softmax_loss: label shifted": ("shared_softmax_loss", _label_shifted, 2),
    "shared_softmax_loss: offset dropped": ("shared_softmax_loss", _without, 4),
    "shared_logistic_loss: label shifted": ("shared_logistic_loss", _label_shifted, 2),
    "shared_logistic_loss: weight scaled": ("shared_logistic_loss", _scaled, 4),
}


@pytest.mark.parametrize("defect", BROKEN)
def test_the_comparison_notices_a_broken_kernel(defect: str) -> None:
    name, breaker, at = BROKEN[defect]
    with pytest.raises(AssertionError):
        assert_parity(breaker(getattr(cpu, name), at), getattr(reference, name), name, Shape())


STATES = [
    ("embedding_bag_update", 5),
    ("pair_update", 5),
    ("pair_update", 6),
    ("rows_update", 5),
    ("rows_update", 6),
]
WRONG_STATES = [
    (optimizer, change)
    for optimizer in OPTIMIZERS
    for change in (_moment1_not_stored, _moment2_not_stored, _moment2_too_large, _rows_mixed_up)
    if (optimizer, change) != ("rowwise_adagrad", _moment1_not_stored)  # it has none
]


@pytest.mark.parametrize(("optimizer", "change"), WRONG_STATES)
@pytest.mark.parametrize(("name", "at"), STATES)
def test_the_comparison_notices_a_wrong_state(
    name: str, at: int, optimizer: str, change: Callable[[RowState], RowState]
) -> None:
    broken = _other_state(getattr(cpu, name), at, change)
    with pytest.raises(AssertionError):
        assert_parity(broken, getattr(reference, name), name, Shape(optimizer=optimizer))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("beta1", 0.81),
        ("beta2", 0.951),
        ("step", 4),
        ("epsilon", 1e-5),
        ("weight_decay", 0.0),
        ("learning_rate", 0.0101),
    ],
)
def test_the_comparison_notices_wrong_settings(name: str, optimizer: str, setting: str, value: float) -> None:
    broken = _other_settings(getattr(cpu, name), setting, value)
    shape = Shape(optimizer=optimizer)
    if optimizer == "rowwise_adagrad" and setting in ("beta1", "beta2", "step"):
        assert_parity(broken, getattr(reference, name), name, shape)  # Adagrad knows neither decay nor time
        return
    with pytest.raises(AssertionError):
        assert_parity(broken, getattr(reference, name), name, shape)


@pytest.mark.parametrize("name", ["shared_softmax_loss", "shared_logistic_loss"])
def test_the_comparison_notices_a_gradient_that_is_not_written(name: str) -> None:
    with pytest.raises(AssertionError):
        assert_parity(_no_gradient(getattr(cpu, name)), getattr(reference, name), name, Shape())
