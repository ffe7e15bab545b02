"""CUDA kernels against the reference, in the simulator: forward, backward and update on small sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from slidex.kernels import OPTIMIZERS, RowState, cuda, reference
from tests.kernels.cases import (
    KERNELS,
    MOST_SCALE,
    SETTINGS,
    UPDATES,
    Problem,
    Shape,
    assert_as_exact_as_torch,
    assert_rounds_as_the_reference,
    outcome,
)

SMALL = Shape(rows=2, slots=7, classes=11, width=24)
PLAIN = replace(SMALL, rows=4)
LOSSES = ("softmax_loss", "logistic_loss", "shared_softmax_loss", "shared_logistic_loss")
SHAPES = {
    "without-optionals": replace(SMALL, optional=False),
    "no-rows": replace(SMALL, rows=0),
    "one-class": replace(SMALL, rows=1, slots=1, classes=1),
    "width-1": replace(SMALL, width=1),
    "width-16": replace(SMALL, width=16),
    "width-130": replace(SMALL, slots=3, classes=4, width=130),
    "many-slots": replace(SMALL, slots=35, classes=40, width=5),
}
LONG_ROWS = {
    "two-warps-a-row": replace(SMALL, slots=140, classes=150, width=3),
    "many-targets": replace(SMALL, slots=70, classes=80, width=3, most_targets=60),
    "huge-logits": replace(SMALL, scale=1e4),
}
CASES = [(name, "adam") for name in KERNELS] + [
    (name, optimizer) for name in UPDATES for optimizer in OPTIMIZERS if optimizer != "adam"
]


def assert_agrees(name: str, shape: Shape, dtype: torch.dtype = torch.float32) -> None:
    assert_as_exact_as_torch(getattr(cuda, name), getattr(reference, name), name, shape, dtype)


@pytest.mark.parametrize(("name", "optimizer"), CASES)
def test_kernel_agrees_with_reference(name: str, optimizer: str) -> None:
    assert_agrees(name, replace(PLAIN, optimizer=optimizer))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_agrees_for_any_size(name: str, shape: Shape) -> None:
    assert_agrees(name, shape)


@pytest.mark.parametrize("shape", LONG_ROWS.values(), ids=LONG_ROWS.keys())
@pytest.mark.parametrize("name", LOSSES)
def test_losses_agree_for_any_scores(name: str, shape: Shape) -> None:
    assert_agrees(name, shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "optimizer"), CASES)
def test_kernel_in_16_bits_is_as_exact_as_torch(name: str, optimizer: str, dtype: torch.dtype) -> None:
    assert_agrees(name, replace(SMALL, optimizer=optimizer), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", UPDATES)
def test_weights_in_16_bits_are_rounded_as_the_reference_rounds_them(
    name: str, optimizer: str, dtype: torch.dtype
) -> None:
    shape = replace(SMALL, optimizer=optimizer)
    assert_rounds_as_the_reference(getattr(cuda, name), getattr(reference, name), name, shape, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_huge_scores_in_16_bits_are_as_exact_as_torch(name: str, dtype: torch.dtype) -> None:
    assert_agrees(name, replace(SMALL, scale=MOST_SCALE[dtype]), dtype)


@pytest.mark.parametrize(
    "name", ["pair_update", "embedding_bag_update", "shared_softmax_loss", "pair_hidden_grad"]
)
def test_same_bits_in_every_run(name: str) -> None:
    arguments = Problem(SMALL).arguments(name, torch.float32)
    first = outcome(getattr(cuda, name), arguments)
    for _ in range(3):
        for got, want in zip(outcome(getattr(cuda, name), arguments), first, strict=True):
            assert torch.equal(got, want)


def test_weights_of_16_bits_go_with_anything_else_in_32() -> None:
    """As in training: 16-bit rows, hidden vectors of either kind, float32 scores, gradients and biases."""
    for name, halves in (("pair_logits", (1,)), ("pair_hidden_grad", (1,)), ("pair_update", (1, 3))):
        arguments = Problem(SMALL).arguments(name, torch.float32)
        for at in halves:
            arguments[at] = arguments[at].bfloat16()
        exact = [
            a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments
        ]
        exact = [RowState(*(m.double() for m in a)) if isinstance(a, RowState) else a for a in exact]
        for got, want in zip(
            outcome(getattr(cuda, name), arguments), outcome(getattr(reference, name), exact), strict=True
        ):
            close = (
                {"rtol": 2**-7, "atol": 2**-7}
                if got.dtype == torch.bfloat16
                else {"rtol": 1e-5, "atol": 1e-5}
            )
            torch.testing.assert_close(got.double(), want, **close)


def test_no_slots_is_no_score() -> None:
    active, none = torch.empty(2, 0, dtype=torch.int64), torch.empty(2, 0)
    weight = torch.randn(5, 3)
    assert cuda.pair_logits(torch.randn(2, 3), weight, None, active).shape == (2, 0)
    assert torch.equal(cuda.pair_hidden_grad(none, weight, active), torch.zeros(2, 3))
    state, before = RowState.zeros_like(weight), weight.clone()
    cuda.pair_update(none, torch.randn(2, 3), active, weight, None, state, None, SETTINGS)
    assert torch.equal(weight, before)


def test_an_id_out_of_range_shows_as_nan_and_touches_nothing_else() -> None:
    hidden, weight = torch.randn(2, 3), torch.randn(5, 3)
    active = torch.tensor([[0, 5, -1], [4, -1, 2]])
    logits = cuda.pair_logits(hidden, weight, None, active)
    assert logits.isnan().tolist() == [[False, True, False], [False, False, False]]
    assert cuda.pair_hidden_grad(torch.ones(2, 3), weight, active).isnan().all(1).tolist() == [True, False]
    for place in range(20):  # kernels take several at a time
        many = torch.arange(20).expand(2, 20) % 5
        many = torch.stack([many[0], torch.where(torch.arange(20) == place, 5, many[1])])
        assert cuda.pair_logits(hidden, weight, None, many).isnan().nonzero().tolist() == [[1, place]]
        assert cuda.pair_hidden_grad(torch.ones(2, 20), weight, many).isnan().all(1).tolist() == [False, True]
    active[0, 1] = -2
    assert cuda.pair_logits(hidden, weight, None, active)[0, 1].isnan()
    bags = cuda.embedding_bag(torch.tensor([0, 1, 2, 9]), torch.tensor([-1, 1]), None, weight, None)
    assert bags.isnan().all(1).tolist() == [True, False, True]
    state, before = RowState.zeros_like(weight), weight.clone()
    cuda.pair_update(torch.ones(2, 3), hidden, active, weight, None, state, None, SETTINGS)
    touched = (weight != before).any(1)
    assert touched.tolist() == [True, False, True, False, True]
    assert weight.isfinite().all()
    for kernel in (cuda.shared_softmax_loss, cuda.shared_logistic_loss):
        loss = kernel(
            torch.randn(3, 4), torch.tensor([0, 1, 2, 2]), torch.tensor([4, 0]), torch.ones(2), None
        )
        assert loss.isnan().tolist() == [True, False, False]
        loss = kernel(torch.randn(2, 4), torch.tensor([0, 1, 7]), torch.tensor([3]), torch.ones(1), None)
        assert loss.isnan().tolist() == [False, True]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_a_non_finite_score_shows_in_its_loss_only(name: str, bad: float) -> None:
    arguments = Problem(replace(SMALL, rows=3, scale=1.0)).arguments(name, torch.float32)
    arguments[0][1, 3] = bad
    if name == "softmax_loss":
        arguments[1][:, 0] = 1  # a row without targets has no loss
    loss = outcome(getattr(cuda, name), arguments)[0]
    assert loss.isfinite().tolist() == [True, False, True]
