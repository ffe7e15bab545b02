"""The matrix products of a layer, in pieces of classes, and the memory of all classes' scores that a step leaves."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from slidex.data.csr import CsrArrays
from slidex.kernels import StepSettings
from slidex.nn import products
from slidex.nn.head import SampledHead

N, D, U = 6, 8, 2500


@pytest.fixture
def arrays():
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((N, D), (U, D), (N, U))
    )


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(products, "_CPU_PIECE", 1)
    assert len(list(products.pieces(torch.empty(N, D), U))) == 3


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (512, 128), (128, 4096), (0, 8), (1 << 24, 1)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("classes", [0, 1, 1024, 70_000])
def test_pieces_cover_every_class_once(rows, width, device, classes):
    like = torch.empty(1, device=device).expand(rows, width)
    parts = list(products.pieces(like, classes))
    assert [c for part in parts for c in range(classes)[part]] == list(range(classes))


def in_pool(hidden, rows, grad, dtype):
    """The products of a pool."""
    made = products.pool_rows(rows, dtype)
    return (
        products.class_scores(hidden, made, dtype, hidden.new_empty(len(hidden), len(rows))),
        products.hidden_gradient(grad, made, dtype),
        products.rows_gradient(grad, hidden, dtype),
    )


def in_layer(hidden, rows, grad, dtype):
    """Those of all classes."""
    parts = products.pieces(hidden, len(rows))
    return (
        products.class_scores(hidden, rows, dtype, hidden.new_empty(len(hidden), len(rows))),
        products.hidden_gradient(grad, rows, dtype),
        torch.cat([products.rows_gradient(grad[:, part], hidden, dtype) for part in parts]),
    )


@pytest.mark.parametrize("given", [torch.float32, torch.float64])
@pytest.mark.parametrize("product", [torch.bfloat16, None])
@pytest.mark.parametrize("made", [in_pool, in_layer])
@pytest.mark.parametrize("classes", [1, 255, 256, 257, 1024, U])
@pytest.mark.usefixtures("small_pieces")
def test_products_in_pieces_are_those_of_all(arrays, given, product, made, classes):
    hidden, rows, grad = (array.to(given) for array in arrays)
    dtype, rows, grad = product or given, rows[:classes], grad[:, :classes]
    wide_hidden, wide_rows, wide_grad = (array.to(dtype).double() for array in (hidden, rows, grad))
    expected = wide_hidden @ wide_rows.T, wide_grad @ wide_rows, wide_grad.T @ wide_hidden
    tolerance = 2**-7 if product else 1e-5
    for is_, ought in zip(made(hidden, rows, grad, dtype), expected, strict=True):
        assert is_.dtype == given
        torch.testing.assert_close(
            is_.double(), ought, rtol=tolerance, atol=tolerance * float(ought.abs().max())
        )


def test_pools_of_many_sizes_are_multiplied_in_few(arrays):
    rows, seen = arrays[1].float(), set()
    for classes in range(1, 1100, 7):
        made = products.pool_rows(rows[:classes], torch.bfloat16)
        assert made.is_contiguous()
        assert torch.equal(made[:classes], rows[:classes].bfloat16())
        assert not made[classes:].any()
        seen.add(len(made))
    assert len(seen) == 5
    assert len(products.pool_rows(rows[:7], torch.float32)) == 7  # MKL keeps nothing


@pytest.mark.parametrize("classes", [1, 255, 1024, U])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.usefixtures("small_pieces")
def test_products_of_scores_in_bfloat16_are_those_of_the_same_numbers_in_float32(arrays, classes, pool):
    hidden, rows, grad = (array.float() for array in arrays)
    rows, dtype = rows[:classes], torch.bfloat16
    rows = products.pool_rows(rows, dtype) if pool else rows
    narrow = torch.full((N, len(rows)), torch.nan, dtype=dtype)
    assert products.class_scores(hidden, rows, dtype, narrow) is narrow
    wide = products.class_scores(hidden, rows, dtype, torch.full((N, classes), torch.nan))
    assert torch.equal(narrow[:, :classes].float(), wide)
    assert not narrow[:, classes:].any()
    narrow[:, :classes] = grad[:, :classes]
    wide = narrow[:, :classes].float()
    for made, expected in (
        (products.hidden_gradient(narrow, rows, dtype), products.hidden_gradient(wide, rows, dtype)),
        (
            products.rows_gradient(narrow, hidden, dtype)[:classes],
            products.rows_gradient(wide, hidden, dtype),
        ),
    ):
        assert made.dtype == torch.float32
        torch.testing.assert_close(made, expected, rtol=2**-7, atol=2**-7)


def labels(rows=N):
    return CsrArrays(np.arange(rows + 1), np.arange(rows, dtype=np.int32), np.ones(rows, np.float32), U)


@pytest.fixture
def head():
    return SampledHead(D, U, mode="exact", selector=None, seed=0, precision="bfloat16")


def step(head, scored, number=1):
    head.update(scored, StepSettings(learning_rate=0.01, step=number))


def test_a_step_takes_the_memory_of_the_last_one_and_no_other_does(arrays, head):
    hidden = arrays[0].float()
    first = head.score(hidden, labels(), 1)
    second = head.score(hidden, labels(), 1)
    kept, place = second.grad.clone(), first.grad.data_ptr()
    assert second.grad.data_ptr() != place
    step(head, first)
    third = head.score(hidden, labels(), 2)
    fourth = head.score(hidden, labels(), 2)
    assert third.grad.data_ptr() == place != fourth.grad.data_ptr()
    assert torch.equal(second.grad, kept)
    assert torch.equal(third.grad, fourth.grad)


def test_memory_of_another_shape_or_dtype_is_not_taken(arrays, head):
    hidden = arrays[0].float()
    step(head, head.score(hidden, labels(), 1))
    short = head.score(hidden[:2], labels(2), 2)
    assert short.grad.shape == (2, U)
    assert torch.isfinite(short.grad).all()
    step(head, short, 2)
    head.double()
    assert head.score(arrays[0][:2], labels(2), 3).grad.dtype == torch.float64


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))])  # noqa: S301
def test_a_copy_does_not_carry_it(arrays, head, duplicate):
    hidden = arrays[0].float()
    step(head, head.score(hidden, labels(), 1))
    other = duplicate(head)
    assert other.scorer._memory is None
    assert head.scorer._memory is not None
    assert torch.equal(other.score(hidden, labels(), 2).grad, head.score(hidden, labels(), 2).grad)
