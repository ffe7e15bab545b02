"""Sums whose rounding is laid down: right, blind to alignment and to the end of the array, and the order documented."""

from __future__ import annotations

import importlib
import math
import pkgutil

import numpy as np
import pytest
from numba import njit
from numba.core.dispatcher import Dispatcher
from numba.core.errors import TypingError

import slidex
from slidex.kernels.cpu.intrinsics import FUSE, lane_dot, lane_sum

SIZES = [*range(75), 100, 128, 1000]


@njit
def add(x):
    return lane_sum(x)


@njit
def dot(x, y):
    return lane_dot(x, y)


def by_hand(terms: np.ndarray) -> float:
    """The order of `lane_sum` in plain numpy: 4 chains of 8 lanes, then 1, then a tree, then the last few."""
    zero = terms.dtype.type(0)
    chains = np.zeros((4, 8), terms.dtype)
    whole, vectors = terms.size // 32 * 32, terms.size // 8 * 8
    for block in terms[:whole].reshape(-1, 4, 8):
        chains += block
    for vector in terms[whole:vectors].reshape(-1, 8):
        chains[0] += vector
    lanes = (chains[0] + chains[1]) + (chains[2] + chains[3])
    while lanes.size > 1:
        lanes = lanes[::2] + lanes[1::2]
    total = lanes[0] + zero
    for term in terms[vectors:]:
        total += term
    return float(total)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_order_is_as_documented_whatever_the_alignment(dtype: type[np.floating]) -> None:
    rng = np.random.default_rng(1)
    for size in SIZES:
        long = rng.standard_normal(size + 9).astype(dtype)
        for first in (0, 1, 3):
            terms = np.concatenate([long[:first], long[:size], long[:2]])[first : first + size]
            assert add(terms) == by_hand(long[:size]), (size, first)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_inner_product_is_right(dtype: type[np.floating]) -> None:
    rng = np.random.default_rng(2)
    for size in SIZES:
        x, y = rng.standard_normal((2, size)).astype(dtype)
        exact = math.fsum(x.astype(np.float64) * y)
        bound = np.finfo(dtype).eps * float(np.abs(x.astype(np.float64) * y).sum())
        assert abs(dot(x, y) - exact) <= bound * 12, size  # at most 11 roundings of a term in 1,000


@pytest.mark.parametrize("size", [33, 40, 64])
def test_inner_product_rounds_once_a_term(size: int) -> None:
    x = np.zeros(size)
    x[[0, 32]] = 1 + 2.0**-30  # its square needs 61 bits; entry 32 is added to entry 0's sum
    y = x.copy()
    y[0] = -1
    assert dot(x, y) == math.fsum([-(1 + 2.0**-30), 1, 2.0**-29, 2.0**-60])


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_infinities_and_nan_come_through(value: float) -> None:
    for at in (0, 33, 63, 66):
        x = np.zeros(67, np.float32)
        x[at] = value
        assert np.array_equal(add(x), value, equal_nan=True)


def test_strided_arrays_are_refused() -> None:
    with pytest.raises(TypingError):
        add(np.zeros(8)[::2])
    with pytest.raises(TypingError):
        dot(np.zeros(8), np.zeros(8, np.float32))


def test_no_kernel_lets_the_compiler_regroup_sums() -> None:
    flags = {}
    for module in pkgutil.walk_packages(slidex.__path__, "slidex."):
        if not module.name.endswith("__main__"):
            for name, value in vars(importlib.import_module(module.name)).items():
                if isinstance(value, Dispatcher):
                    flags[f"{value.py_func.__module__}.{name}"] = value.targetoptions.get("fastmath") or set()
    assert "slidex.kernels.cpu.update._adam_row" in flags
    assert {name: found for name, found in flags.items() if found - FUSE} == {}
