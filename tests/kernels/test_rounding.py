"""Stochastic rounding of updated weights: unbiased, the same in every run, and what it is for."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from slidex.kernels import OPTIMIZERS, RowState, StepSettings, reference
from slidex.kernels.rounding import mix32, rounding_key, stochastic_round
from tests.kernels.cases import Shape, assert_rounds_as_the_reference

SIXTEEN = (torch.bfloat16, torch.float16)
SIGMAS = 5
STEPS = 4000
dtypes = pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
pytestmark = pytest.mark.usefixtures("one_thread")


def numbers(dtype: torch.dtype, rows: int = 5, width: int = 16) -> torch.Tensor:
    """float32 numbers of every size: some that `dtype` holds, some subnormal in it, some halfway."""
    smallest = torch.finfo(dtype).smallest_normal
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
    x[1] *= max(smallest, 1e-36)  # float32 has its own smallest number
    x[2] = x[2].to(dtype).float()
    x[3, ::2] = 1 + torch.finfo(dtype).eps / 2
    return x


def neighbours(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest number of `dtype` below or at each of `x`, and the smallest above or at it, in float64."""
    near, infinity = x.to(dtype), torch.full_like(x, torch.inf).to(dtype)
    down = torch.where(near.double() > x.double(), torch.nextafter(near, -infinity), near)
    up = torch.where(near.double() < x.double(), torch.nextafter(near, infinity), near)
    return down.double(), up.double()


def assert_unbiased(mean: torch.Tensor, x: torch.Tensor, dtype: torch.dtype, steps: int) -> None:
    """A mean of so many roundings is `x` to five standard deviations, each of `x`'s own share of the way."""
    down, up = neighbours(x, dtype)
    share = (x.double() - down) / (up - down).clamp(min=1e-300)
    sigma = (up - down) * (share * (1 - share) / steps).sqrt()
    tiny = 2.0**-38 if dtype == torch.float16 else 0.0  # what the docstring gives away
    assert ((mean - x.double()).abs() <= SIGMAS * sigma + tiny).all()


@dtypes
def test_the_mean_of_many_roundings_is_the_number(dtype: torch.dtype) -> None:
    x, ids = numbers(dtype), torch.tensor([3, 0, 70_000, 12, 5_000_000_000])
    total = torch.zeros_like(x, dtype=torch.float64)
    down, up = neighbours(x, dtype)
    for step in range(STEPS):
        rounded = stochastic_round(x, dtype, ids, rounding_key(7, step)).double()
        assert ((rounded == down) | (rounded == up)).all()
        total += rounded
    assert_unbiased(total / STEPS, x, dtype, STEPS)
    assert torch.equal((total / STEPS)[2], x[2].double())  # what is held already stays


@dtypes
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_mean_of_many_updates_is_the_float32_update(dtype: torch.dtype, optimizer: str) -> None:
    """One and the same step from one and the same row, but for its random bits: of weights and of the bias."""
    generator = torch.Generator().manual_seed(2)
    weight, bias = (
        torch.randn(3, 8, generator=generator).to(dtype),
        torch.randn(3, generator=generator).to(dtype),
    )
    ids, grad = torch.tensor([2, 0]), torch.randn(2, 8, generator=generator)

    def updated(weight: torch.Tensor, bias: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = weight.clone(), bias.clone()
        states = [RowState.zeros_like(parameter, optimizer) for parameter in (weight, bias)]
        settings = StepSettings(learning_rate=1e-4, step=1, weight_decay=0.1, seed=seed)
        reference.rows_update(ids, grad, grad[:, 0].contiguous(), weight, bias, *states, settings)
        return weight, bias

    wanted = updated(weight.float(), bias.float(), 0)
    totals = [torch.zeros_like(want, dtype=torch.float64) for want in wanted]
    for seed in range(STEPS):
        for total, part in zip(totals, updated(weight, bias, seed), strict=True):
            total.add_(part)
    for total, want in zip(totals, wanted, strict=True):
        assert_unbiased(total / STEPS, want, dtype, STEPS)
        assert torch.equal(total[1] / STEPS, want[1].double())  # a row that no step touches


@pytest.mark.parametrize("nearest", [False, True])
def test_steps_too_small_to_be_seen_add_up(monkeypatch: pytest.MonkeyPatch, nearest: bool) -> None:
    """2,000 steps of 1 / 40 of a unit in the last place; to nearest the weights do not move at all."""
    if nearest:
        monkeypatch.setattr(reference, "stochastic_round", lambda x, dtype, *_: x.to(dtype))
    unit, steps = torch.finfo(torch.bfloat16).eps, 2000
    weight = torch.ones(64, 32, dtype=torch.bfloat16)
    state = RowState(torch.zeros(0, 32), torch.full((64, 1), 1e12))  # a gradient of 1 hardly changes it
    ids, grad = torch.arange(64), torch.full((64, 32), -1.0)
    for step in range(1, steps + 1):
        settings = StepSettings(learning_rate=unit / 40 * 1e6, step=step)
        reference.rows_update(ids, grad, None, weight, None, state, None, settings)
    moved = float(weight.double().mean()) - 1
    sigma = unit * math.sqrt(steps / 40 * 39 / 40 / weight.numel())
    if nearest:
        assert moved == 0
    else:
        assert abs(moved - steps * unit / 40) < SIGMAS * sigma


@dtypes
def test_what_is_not_finite_stays_so(dtype: torch.dtype) -> None:
    x = torch.tensor([[torch.inf, -torch.inf, torch.nan, -torch.nan, 0.0, 1e38]])
    rounded = stochastic_round(x, dtype, torch.tensor([0]), 1)
    assert rounded[0, :2].tolist() == [torch.inf, -torch.inf]
    assert rounded[0, 2:4].isnan().all()
    assert rounded[0, 4] == 0
    assert rounded[0, 5].isinf() == (dtype == torch.float16)


def test_random_bits_are_even_and_independent() -> None:
    """Each bit is 1 half of the time, and equal in neighbouring columns, rows, steps and seeds half of the time."""
    keys = [rounding_key(seed, step) for seed in (0, 1) for step in (1, 2, 3)]
    row_keys = torch.stack([mix32(torch.arange(300) ^ key) for key in keys])  # (seed, step), row
    bits = mix32(row_keys[:, :, None] + torch.arange(-1, 255)).view(2, 3, 300, 256)
    ones = (bits[..., None] >> torch.arange(16) & 1).bool()
    many = ones[..., 0].numel()
    assert ((ones.float().mean((0, 1, 2, 3)) - 0.5).abs() < SIGMAS * 0.5 / math.sqrt(many)).all()
    for dim in range(4):
        here, there = ones.narrow(dim, 0, ones.shape[dim] - 1), ones.narrow(dim, 1, ones.shape[dim] - 1)
        same = (here == there).float().mean((0, 1, 2, 3))
        assert ((same - 0.5).abs() < SIGMAS * 0.5 / math.sqrt(here[..., 0].numel())).all(), dim
    for one, other in itertools.combinations(range(16), 2):
        same = (ones[..., one] == ones[..., other]).float().mean()
        assert abs(same - 0.5) < SIGMAS * 0.5 / math.sqrt(many), (one, other)


def test_no_two_steps_of_a_seed_share_a_key() -> None:
    assert len({rounding_key(3, step) for step in range(100_000)}) == 100_000
    assert mix32(torch.arange(100_000)).unique().numel() == 100_000
    assert mix32(torch.tensor([12345 + 2**32, 12345 - 2**32])).tolist() == [mix32(12345)] * 2


@dtypes
def test_bits_go_by_seed_step_row_and_column_and_by_nothing_else(dtype: torch.dtype) -> None:
    x, ids, key = numbers(dtype, rows=200), torch.randperm(1000)[:200], rounding_key(1, 2)
    rounded = stochastic_round(x, dtype, ids, key)
    order = torch.randperm(200)
    assert torch.equal(stochastic_round(x[order], dtype, ids[order], key), rounded[order])
    assert torch.equal(stochastic_round(x[:, :5], dtype, ids.int(), key), rounded[:, :5])
    assert torch.equal(stochastic_round(x.double(), dtype, ids, key), rounded)
    for other in (
        stochastic_round(x, dtype, ids, rounding_key(1, 3)),
        stochastic_round(x, dtype, ids, rounding_key(2, 2)),
        stochastic_round(x, dtype, ids + 1, key),
        stochastic_round(x.flip(1), dtype, ids, key).flip(1),
    ):
        assert (other != rounded).float().mean() > 0.1
    column = stochastic_round(x[:, 0], dtype, ids, key)  # as of a bias
    assert (column != rounded[:, 0]).float().mean() > 0.1


@dtypes
def test_a_reference_that_rounds_to_nearest_is_noticed(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """By the comparison that the CUDA kernels pass in the simulator and on a GPU."""

    def nearest(*arguments: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(reference, "stochastic_round", lambda x, dtype, *_: x.to(dtype))
            reference.pair_update(*arguments)

    assert_rounds_as_the_reference(
        reference.pair_update, reference.pair_update, "pair_update", Shape(), dtype
    )
    with pytest.raises(AssertionError):
        assert_rounds_as_the_reference(nearest, reference.pair_update, "pair_update", Shape(), dtype)
