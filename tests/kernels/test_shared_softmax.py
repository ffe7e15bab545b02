"""The softmax of a pool whose scores are bfloat16."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np
import pytest
import torch

from slidex.errors import ConfigError
from slidex.kernels import cpu, reference
from slidex.kernels.cpu.intrinsics import narrow, widen
from tests.kernels.cases import Arguments, Problem, Shape, cast, outcome

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

NAME = "shared_softmax_loss"
SHAPES = [
    Shape(),
    Shape(optional=False),
    Shape(rows=0),
    Shape(rows=33, slots=9001, most_targets=9),
    Shape(slots=1),
    Shape(rows=2, slots=3001, scale=1e4),
]


def bfloat16(shape: Shape) -> Arguments:
    """Scores in bfloat16, all else in float32."""
    scores, *others = Problem(shape).arguments(NAME, torch.float32)
    return [scores.bfloat16(), *others]


def assert_rounded_once(kernel: Callable[..., object], arguments: Arguments) -> None:
    """Loss as of the same scores in float64; of the gradient, half a unit of bfloat16 more, which is zero at a zero."""
    (loss_N, grad_NU, *_), (want_N, want_NU, *_) = (
        outcome(kernel, arguments),
        outcome(reference.shared_softmax_loss, [cast(a, torch.float64) for a in arguments]),
    )
    assert loss_N.dtype == torch.float32
    assert grad_NU.dtype == torch.bfloat16
    torch.testing.assert_close(loss_N.double(), want_N, rtol=3e-6, atol=3e-6)
    bound_NU = want_NU.abs() * (2**-8 + 1e-5) + 1e-6
    assert ((grad_NU.double() - want_NU).abs() <= bound_NU).all()


@pytest.mark.parametrize("module", [cpu, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_scores_have_the_gradient_of_what_they_are(module: ModuleType, shape: Shape) -> None:
    assert_rounded_once(module.shared_softmax_loss, bfloat16(shape))


def _cut_off(scores_NU: torch.Tensor, *others: object) -> torch.Tensor:
    """Rounds towards zero."""
    wide_NU = scores_NU.float()
    loss_N = cpu.shared_softmax_loss(wide_NU, *others)
    scores_NU.copy_((wide_NU.view(torch.int32) >> 16 << 16).view(torch.float32))
    return loss_N


def test_the_comparison_notices_a_gradient_that_is_cut_off() -> None:
    with pytest.raises(AssertionError):
        assert_rounded_once(_cut_off, bfloat16(Shape()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("start", [0, 4099])
def test_pads_have_no_gradient(dtype: torch.dtype, start: int) -> None:
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    shape, part = Shape(rows=5, slots=8201), slice(start, start + 50)
    scores, *_, offset = Problem(shape).arguments(NAME, wide)
    scores, few = scores.to(dtype), scores[:, part].to(dtype).to(wide).contiguous()
    padded = torch.full_like(offset, -torch.inf)
    padded[part] = offset[part]
    indptr, positions, weights = torch.arange(6), torch.tensor([0, 7, 49, 13, 20]), torch.ones(5, dtype=wide)
    want = cpu.shared_softmax_loss(few, indptr, positions, weights, offset[part])
    got = cpu.shared_softmax_loss(scores, indptr, positions + start, weights, padded)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(scores[:, part], few.to(dtype))
    assert not scores[:, padded.isinf()].any()


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 4096, 4104])
@pytest.mark.parametrize("others", [0.0, -torch.inf])
def test_a_non_finite_score_shows_in_its_row(bad: float, column: int, others: float) -> None:
    arguments = bfloat16(Shape(rows=3, slots=4105))
    arguments[0][1] += others
    arguments[0][1, column] = bad
    loss_N, grad_NU, *_ = outcome(cpu.shared_softmax_loss, arguments)
    assert loss_N.isfinite().tolist() == [True, False, True]
    assert grad_NU[[0, 2]].isfinite().all()


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    arguments, before = bfloat16(SHAPES[3]), numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        one = outcome(cpu.shared_softmax_loss, arguments)
    finally:
        numba.set_num_threads(before)
    for a, b in zip(one, outcome(cpu.shared_softmax_loss, arguments), strict=True):
        assert torch.equal(a, b)


def test_bfloat16_scores_want_the_rest_in_float32() -> None:
    arguments = bfloat16(Shape())
    with pytest.raises(ConfigError, match=r"'target_weights'.*torch\.float32"):
        cpu.shared_softmax_loss(*arguments[:3], arguments[3].bfloat16(), arguments[4])
    with pytest.raises(ConfigError, match=r"'logits_NU'.*contiguous"):
        cpu.shared_softmax_loss(arguments[0].T.contiguous().T, *arguments[1:])


@numba.njit
def _there_and_back(wide: np.ndarray, rounded: np.ndarray, back: np.ndarray) -> None:
    for i in range(wide.size):
        rounded[i] = narrow(wide[i])
        back[i] = widen(rounded[i])


def test_rounding_is_torchs_and_nan_stays_nan() -> None:
    """All float32 whose lower bits make rounding hard: halves, next to halves, overflow, NaN of any payload."""
    upper = torch.arange(0, 1 << 16, 7, dtype=torch.int64)
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (upper[:, None] << 16 | lower).flatten()
    wide = torch.where(bits < 1 << 31, bits, bits - (1 << 32)).int().view(torch.float32)
    wide = torch.cat([wide, torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)])
    rounded, back = np.empty(len(wide), np.int16), np.empty(len(wide), np.float32)
    _there_and_back(wide.numpy(), rounded, back)
    want = wide.bfloat16()
    torch.testing.assert_close(
        torch.from_numpy(rounded).view(torch.bfloat16), want, rtol=0, atol=0, equal_nan=True
    )
    torch.testing.assert_close(torch.from_numpy(back), want.float(), rtol=0, atol=0, equal_nan=True)
