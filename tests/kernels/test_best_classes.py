"""The best of all classes by rough products and exact ones, against plain torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numba
import pytest
import torch

from slidex.errors import ConfigError
from slidex.kernels import RoughRows, cpu, reference

if TYPE_CHECKING:
    from collections.abc import Callable

Kernel = Any


def problem(
    seed: int, *, rows: int = 20, classes: int = 900, width: int = 24, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden vectors, weights of very different norms, and biases."""
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(rows, width, generator=generator, dtype=dtype).relu_()
    weight_CD = torch.randn(classes, width, generator=generator, dtype=dtype)
    weight_CD *= torch.rand(classes, 1, generator=generator, dtype=dtype) ** 3
    return hidden_ND, weight_CD, torch.randn(classes, generator=generator, dtype=dtype)


def assert_parity(best: Kernel, seed: int, *, k: int = 7, rough: torch.dtype, **shape: Any) -> None:
    arguments = problem(seed, **shape)
    rows = RoughRows.of(arguments[1], rough)
    scores_NK, ids_NK = best(*arguments, k, rows)
    want_NK, best_NK = reference.best_classes(*arguments, k, rows)
    torch.testing.assert_close(scores_NK, want_NK, rtol=1e-5, atol=1e-5)
    assert torch.equal(ids_NK < 0, best_NK < 0)
    assert all(len(set(ids[ids >= 0].tolist())) == int((ids >= 0).sum()) for ids in ids_NK)
    clear = torch.nn.functional.pad(want_NK.diff(dim=1) < -1e-4, (1, 1), value=True)
    clear_NK = clear[:, :-1] & clear[:, 1:]
    clear_NK[:, -1] = False  # the next one may be as good
    assert torch.equal(ids_NK[clear_NK], best_NK[clear_NK])


@pytest.mark.parametrize("rough", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"k": 1},
        {"k": 200},
        {"k": 900},
        {"classes": 5},  # fewer than asked for
        {"classes": 1, "k": 1},
        {"rows": 1},
        {"rows": 0},
        {"width": 1},
        {"rows": 600, "classes": 300},  # more rows than at once
        {"rows": 512, "classes": 9000, "k": 3, "width": 4},  # more products than at once
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_best_classes_are_what_the_reference_finds(shape: dict[str, Any], rough: torch.dtype) -> None:
    for seed in range(3):
        assert_parity(cpu.best_classes, seed, rough=rough, **shape)


def with_other_rough(change: Callable[[RoughRows], RoughRows]) -> Kernel:
    return lambda *a: cpu.best_classes(*a[:-1], change(a[-1]))


BROKEN: dict[str, Kernel] = {
    "rough products of other classes": with_other_rough(lambda r: replace(r, rows_CD=r.rows_CD.roll(1, 0))),
    "no bias": lambda h, w, b, *a: cpu.best_classes(h, w, 0 * b, *a),
    "one class less": lambda h, w, b, *a: cpu.best_classes(
        h, w, b.where(torch.arange(len(b)) != (h @ w.T + b)[0].argmax(), -9.0), *a
    ),
    "two exchanged": lambda *a: [found[:, [1, 0, *range(2, 7)]] for found in cpu.best_classes(*a)],
    "larger scores": lambda *a: (cpu.best_classes(*a)[0] * 1.001, cpu.best_classes(*a)[1]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_comparison_fails_on_a_broken_kernel(name: str) -> None:
    with pytest.raises(AssertionError):
        assert_parity(BROKEN[name], 0, rough=torch.float32)


def test_an_error_of_rough_products_that_is_not_counted_costs_classes() -> None:
    """Scores that differ by less than bfloat16 can tell, so that only the bound keeps the right classes in play."""
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.rand(50, 16, generator=generator) + 1
    weight_CD = 1 + 0.02 * torch.randn(2000, 16, generator=generator)
    arguments = hidden_ND, weight_CD, torch.zeros(2000), 5
    rough = RoughRows.of(weight_CD, torch.bfloat16)
    want_NK, _ = reference.best_classes(*arguments, rough)
    torch.testing.assert_close(cpu.best_classes(*arguments, rough)[0], want_NK, rtol=1e-6, atol=0)
    surer = replace(rough, norm_C=0 * rough.norm_C)
    assert (cpu.best_classes(*arguments, surer)[0] < want_NK - 1e-4).any()


def test_rough_products_may_be_off_by_all_of_the_bound() -> None:
    """By 1 here: the best class looks like 9.125, another one of 9.5 like 10.375, which proves 9.375 at the least."""
    weight_CD, looks_CD = torch.full((2, 40, 1), 2.0)
    weight_CD[[3, 30], 0] = torch.tensor([9.5, 10.0])
    looks_CD[[3, 30], 0] = torch.tensor([10.375, 9.125])
    rough = RoughRows(looks_CD.bfloat16(), torch.ones(40))
    rough = replace(rough, norm_C=rough.norm_C / rough.error)
    arguments = torch.ones(1, 1), weight_CD, torch.zeros(40)
    assert cpu.best_classes(*arguments, 1, rough)[1].tolist() == [[30]]
    blind = replace(rough, norm_C=rough.norm_C / 4)
    assert cpu.best_classes(*arguments, 1, blind)[1].tolist() == [[3]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_errors_of_rough_products_are_within_the_bound(dtype: torch.dtype) -> None:
    hidden_ND, weight_CD, _ = problem(3, rows=200, width=128)
    rough = RoughRows.of(weight_CD, dtype)
    products_NC = (hidden_ND.to(dtype) @ rough.rows_CD.T).double()
    error_NC = (products_NC - hidden_ND.double() @ weight_CD.double().T).abs()
    bound_NC = rough.error * hidden_ND.norm(dim=1)[:, None] * rough.norm_C
    assert (error_NC <= bound_NC).all()
    if dtype == torch.bfloat16:  # nor is it boundless
        assert (error_NC > bound_NC / 10).any()


def test_batches_of_all_sizes_are_multiplied_in_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's batches differ, and what multiplies them keeps memory for each shape."""
    shapes, multiply = set(), torch.mm

    def noted(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        shapes.add((*a.shape, *b.shape))
        return multiply(a, b, out=out)

    monkeypatch.setattr(torch, "mm", noted)
    hidden_ND, weight_CD, bias_C = problem(0, rows=1100, classes=50, width=4)
    rows = RoughRows.of(weight_CD, torch.bfloat16)
    whole = cpu.best_classes(hidden_ND, weight_CD, bias_C, 3, rows)
    for count in (*range(1, 70), *range(70, 1101, 29), 512, 513):
        for part, all_ in zip(
            cpu.best_classes(hidden_ND[:count], weight_CD, bias_C, 3, rows), whole, strict=True
        ):
            assert torch.equal(part, all_[:count])
    assert len(shapes) <= 5 + 31  # 1, 2, 4, 8 and 16 rows, and multiples of 16 to 512


def test_equal_ones_are_ordered_by_id() -> None:
    weight_CD = torch.ones(3000, 4)
    rough = RoughRows.of(weight_CD, torch.bfloat16)
    scores_NK, ids_NK = cpu.best_classes(torch.ones(600, 4), weight_CD, torch.zeros(3000), 4, rough)
    assert torch.equal(ids_NK, torch.arange(4).repeat(600, 1))
    assert (scores_NK == 4).all()


def test_same_bits_for_any_products_and_number_of_threads() -> None:
    before, found = numba.get_num_threads(), []
    arguments = problem(5, rows=600, classes=9000, width=64)
    roughs = [RoughRows.of(arguments[1], dtype) for dtype in (torch.bfloat16, torch.float32)]
    try:
        for threads in (1, min(2, numba.config.NUMBA_NUM_THREADS)):
            numba.set_num_threads(threads)
            found += [cpu.best_classes(*arguments, 30, rough) for rough in roughs]
    finally:
        numba.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(found[0][0], other[0])
        assert torch.equal(found[0][1], other[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "'k' parameter of best_classes must be at least 1"),
        ({"weight_CD": torch.ones(3, 3)}, r"'rough' .* of shape \(3, 3\)"),
        ({"hidden_ND": torch.ones(2, 2).double()}, r"'weight_CD' .* of dtype torch.float64"),
        ({"bias_C": torch.ones(2)}, r"'bias_C' .* of shape \(3,\)"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    weight_CD = torch.ones(3, 2)
    arguments = {
        "hidden_ND": torch.ones(2, 2),
        "weight_CD": weight_CD,
        "bias_C": torch.ones(3),
        "k": 1,
        "rough": RoughRows.of(weight_CD, torch.bfloat16),
    }
    cpu.best_classes(**arguments)
    with pytest.raises(ConfigError, match=message):
        cpu.best_classes(**(arguments | change))
    with pytest.raises(ConfigError, match="'norm_C' parameter of RoughRows"):
        RoughRows(weight_CD, torch.ones(3).double())
