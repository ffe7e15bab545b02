from __future__ import annotations

from collections.abc import Callable, Iterator

import numba
import pytest
import torch

from slidex.kernels import RowState, cpu, reference
from tests.kernels.cases import ADAM, KERNELS, SHAPES, Problem, Shape, assert_parity, outcome


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("name", KERNELS)
def test_cpu_kernel_agrees_with_reference(name: str, shape: Shape) -> None:
    for seed in range(2):
        assert_parity(getattr(cpu, name), getattr(reference, name), name, shape, seed)


@pytest.mark.parametrize("name", KERNELS)
def test_same_bits_in_every_run_and_for_any_number_of_threads(name: str, restored_threads: None) -> None:
    kernel = getattr(cpu, name)
    arguments = Problem(SHAPES["many-ids"]).arguments(name, torch.float32)
    first = outcome(kernel, arguments)
    for run in range(20):
        numba.set_num_threads(1 + run % min(2, numba.config.NUMBA_NUM_THREADS))
        for got, want in zip(outcome(kernel, arguments), first, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", [name for name in KERNELS if "shared" not in name and "adam" not in name])
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


def _other_adam(kernel: Kernel, setting: str, value: float) -> Kernel:
    def broken(*arguments: object) -> object:
        settings = {name: getattr(ADAM, name) for name in ADAM.__dataclass_fields__} | {setting: value}
        return kernel(*arguments[:-1], type(ADAM)(**settings))

    return broken


def _moments_swapped(kernel: Kernel, at: int) -> Kernel:
    def broken(*arguments: object) -> object:
        changed = list(arguments)
        state = changed[at]
        changed[at] = RowState(state.moment1, state.moment2.clone())
        return kernel(*changed)

    return broken


def _no_gradient(kernel: Kernel) -> Kernel:
    """A shared loss that forgets to overwrite its scores."""

    def broken(*arguments: object) -> object:
        return kernel(arguments[0].clone(), *arguments[1:])

    return broken


BROKEN = {
    "embedding_bag: bias dropped": ("embedding_bag", _without, 4),
    "embedding_bag: values ignored": ("embedding_bag", _scaled, 2),
    "embedding_bag: one feature shifted": ("embedding_bag", _label_shifted, 1),
    "embedding_bag_adam: scale": ("embedding_bag_adam", _scaled, 3),
    "embedding_bag_adam: second moment not stored": ("embedding_bag_adam", _moments_swapped, 5),
    "pair_logits: bias dropped": ("pair_logits", _without, 2),
    "pair_logits: scale": ("pair_logits", _scaled, 0),
    "pair_logits: pair lost": ("pair_logits", _pair_lost, 3),
    "pair_hidden_grad: scale": ("pair_hidden_grad", _scaled, 0),
    "pair_hidden_grad: pair lost": ("pair_hidden_grad", _pair_lost, 2),
    "pair_adam: pair lost": ("pair_adam", _pair_lost, 2),
    "pair_adam: scale": ("pair_adam", _scaled, 1),
    "pair_adam: bias moment not stored": ("pair_adam", _moments_swapped, 6),
    "softmax_loss: label shifted": ("softmax_loss", _label_shifted, 1),
    "softmax_loss: offset dropped": ("softmax_loss", _without, 2),
    "logistic_loss: label shifted": ("logistic_loss", _label_shifted, 1),
    "logistic_loss: weight scaled": ("logistic_loss", _scaled, 2),
    "gather_rows: scale": ("gather_rows", _scaled, 0),
    "gather_rows: bias dropped": ("gather_rows", _without, 1),
    "rows_adam: bias gradient dropped": ("rows_adam", _without, 2),
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


@pytest.mark.parametrize("name", [name for name in KERNELS if name.endswith("adam")])
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
def test_the_comparison_notices_a_wrong_adam(name: str, setting: str, value: float) -> None:
    with pytest.raises(AssertionError):
        assert_parity(
            _other_adam(getattr(cpu, name), setting, value), getattr(reference, name), name, Shape()
        )


@pytest.mark.parametrize("name", ["shared_softmax_loss", "shared_logistic_loss"])
def test_the_comparison_notices_a_gradient_that_is_not_written(name: str) -> None:
    with pytest.raises(AssertionError):
        assert_parity(_no_gradient(getattr(cpu, name)), getattr(reference, name), name, Shape())
