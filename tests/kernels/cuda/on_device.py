"""CUDA kernels on a GPU: the parity suite at full size, and what only a GPU can show.

pytest does not collect this file by itself: `make gpu-check` runs it, and there must be a GPU.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from slidex import kernels
from slidex.kernels import OPTIMIZERS, RowState, reference
from tests.kernels.cases import (
    KERNELS,
    MOST_SCALE,
    SETTINGS,
    SHAPES,
    UPDATES,
    Problem,
    Shape,
    assert_as_exact_as_torch,
    assert_rounds_as_the_reference,
    cast,
    moved,
    outcome,
)

DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [(name, "adam") for name in KERNELS] + [
    (name, optimizer) for name in UPDATES for optimizer in OPTIMIZERS if optimizer != "adam"
]
WIDTHS = {f"width-{width}": Shape(width=width) for width in (16, 100, 256, 1000, 1024)}
REPEATS = 250
MANY, WIDTH = 10_000_000, 256
"""Of a weight of 2.56 thousand million numbers, 5.1 GB in 16 bits, with Adagrad's one number a row."""


@pytest.fixture(scope="module")
def module() -> object:
    return kernels.get(DEVICE)


def on_device(name: str, shape: Shape, dtype: torch.dtype) -> list[object]:
    arguments = Problem(shape).arguments(name, dtype)
    arguments = [cast(a, torch.float32) if isinstance(a, RowState) else a for a in arguments]
    return [moved(argument, DEVICE) for argument in arguments]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", (SHAPES | WIDTHS).values(), ids=(SHAPES | WIDTHS).keys())
@pytest.mark.parametrize(("name", "optimizer"), CASES)
def test_kernel_is_as_exact_as_torch(
    module: object, name: str, optimizer: str, shape: Shape, dtype: torch.dtype
) -> None:
    shape = replace(shape, optimizer=optimizer, scale=min(shape.scale, MOST_SCALE[dtype]))
    assert_as_exact_as_torch(
        getattr(module, name), getattr(reference, name), name, shape, dtype, device=DEVICE
    )


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", (SHAPES | WIDTHS).values(), ids=(SHAPES | WIDTHS).keys())
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", UPDATES)
def test_weights_in_16_bits_are_rounded_as_the_reference_rounds_them(
    module: object, name: str, optimizer: str, shape: Shape, dtype: torch.dtype
) -> None:
    assert_rounds_as_the_reference(
        getattr(module, name),
        getattr(reference, name),
        name,
        replace(shape, optimizer=optimizer),
        dtype,
        device=DEVICE,
    )


@pytest.mark.parametrize(("name", "optimizer"), CASES)
def test_same_bits_in_every_run(module: object, name: str, optimizer: str) -> None:
    arguments = on_device(name, replace(SHAPES["many-ids"], optimizer=optimizer), torch.float32)
    first = outcome(getattr(module, name), arguments)
    for _ in range(REPEATS):
        for got, want in zip(outcome(getattr(module, name), arguments), first, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", KERNELS)
def test_a_step_never_waits_for_the_device(module: object, name: str) -> None:
    arguments = on_device(name, Shape(), torch.float32)
    getattr(module, name)(*arguments)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        getattr(module, name)(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", KERNELS)
def test_work_is_done_on_the_current_stream(module: object, name: str) -> None:
    """A long product before and a read after the call, on a stream of its own: out of order, one of them shows it."""
    arguments = on_device(name, Shape(), torch.float32)
    want = outcome(getattr(module, name), arguments)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        zeros = [torch.zeros_like(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        busy = torch.ones(4096, 4096, device=DEVICE)
        for _ in range(20):
            busy = busy @ busy * 1e-4
        for empty, full in zip(zeros, arguments, strict=True):
            if isinstance(full, torch.Tensor):
                empty.copy_(full)
        got = outcome(getattr(module, name), zeros)
    torch.cuda.current_stream().wait_stream(stream)
    for here, there in zip(got, want, strict=True):
        assert torch.equal(here, there)


def test_offsets_beyond_two_to_the_31(module: object) -> None:
    """The last of MANY rows, whose offsets take more than 31 bits: kernels do to them what they do to a few."""
    weight = torch.zeros(MANY, WIDTH, dtype=torch.bfloat16, device=DEVICE)
    last, first = torch.arange(MANY - 8, MANY, device=DEVICE), torch.arange(8, device=DEVICE)
    few = torch.randn(8, WIDTH, device=DEVICE).bfloat16()
    weight[last] = few
    hidden, grad = torch.randn(4, WIDTH, device=DEVICE), torch.randn(4, 8, device=DEVICE)
    active, there = last.expand(4, 8).contiguous(), first.expand(4, 8).contiguous()
    indptr, values = torch.arange(0, 33, 8, device=DEVICE), grad.flatten()
    for many, same in (
        (module.pair_logits(hidden, weight, None, active), module.pair_logits(hidden, few, None, there)),
        (module.pair_hidden_grad(grad, weight, active), module.pair_hidden_grad(grad, few, there)),
        (module.gather_rows(weight, None, last)[0], few),
        (
            module.embedding_bag(indptr, active.flatten(), values, weight, None),
            module.embedding_bag(indptr, there.flatten(), values, few, None),
        ),
    ):
        assert torch.equal(many, same)
    state, few_state = (
        RowState(torch.zeros(0, WIDTH, device=DEVICE), torch.zeros(rows, 1, device=DEVICE))
        for rows in (MANY, 8)
    )
    rows_grad = torch.randn(8, WIDTH, device=DEVICE)

    def update(name: str, ids: torch.Tensor, parameter: torch.Tensor, moments: RowState) -> None:
        pairs = ids.expand(4, 8).contiguous()
        if name == "pair_update":
            module.pair_update(grad, hidden, pairs, parameter, None, moments, None, SETTINGS)
        elif name == "rows_update":
            module.rows_update(ids, rows_grad, None, parameter, None, moments, None, SETTINGS)
        else:
            module.embedding_bag_update(indptr, pairs.flatten(), values, hidden, parameter, moments, SETTINGS)

    for name in UPDATES:
        update(name, last, weight, state)
        update(name, first, few, few_state)
        torch.testing.assert_close(weight[last], few, rtol=2**-7, atol=0)  # a row's rounding goes by its id
        assert torch.equal(state.moment2[last], few_state.moment2)
        few.copy_(weight[last])
    assert not weight[: MANY - 8].any()
    assert not state.moment2[: MANY - 8].any()


def test_shared_mode_learns_as_torch_does(module: object) -> None:
    """Gather, product, loss, products, update: one step of the pool against autograd and the reference's update."""
    torch.manual_seed(0)
    classes, width, rows, pool = 5000, 64, 32, 500
    weight, hidden = torch.randn(classes, width, device=DEVICE), torch.randn(rows, width, device=DEVICE)
    ids = torch.randperm(classes, device=DEVICE)[:pool]
    indptr, positions = torch.arange(rows + 1, device=DEVICE), torch.randint(pool, (rows,), device=DEVICE)
    mine, theirs = weight.clone(), weight.clone()
    block, _ = module.gather_rows(mine, None, ids)
    scores = hidden @ block.T
    loss = module.shared_softmax_loss(scores, indptr, positions, torch.ones(rows, device=DEVICE), None)
    exact = torch.nn.functional.cross_entropy(hidden @ theirs[ids].T, positions, reduction="none")
    torch.testing.assert_close(loss, exact)
    state, other = RowState.zeros_like(mine), RowState.zeros_like(theirs)
    grad = scores.T @ hidden
    module.rows_update(ids, grad, None, mine, None, state, None, SETTINGS)
    reference.rows_update(ids, grad, None, theirs, None, other, None, SETTINGS)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(state.moment2, other.moment2)
