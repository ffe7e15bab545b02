"""Device functions: 16-bit floats, and reductions over warps and blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slidex.kernels.cuda.device import (
    OF_BIAS,
    block_max,
    block_sum,
    row_key,
    store,
    store_stochastic,
    warp_max,
    warp_sum,
    wide,
)
from slidex.kernels.cuda.launch import Kernel, blocks_for, cuda, kernel
from slidex.kernels.rounding import rounding_key, stochastic_round


@kernel
def _round_trip(x_N, wide_N, back_N):
    i = cuda.grid(1)
    if i < x_N.size:
        wide_N[i] = wide(x_N[i])
        store(back_N, i, wide_N[i])


def _all_bits(dtype: torch.dtype) -> torch.Tensor:
    """Every finite and infinite number of a 16-bit type, in an order that mixes them; some of float32."""
    if dtype == torch.float32:
        return torch.randn(500)
    bits = torch.from_numpy(np.arange(0, 2**16, 61).astype(np.uint16)).view(dtype)
    return torch.cat([bits[~bits.isnan()], torch.tensor([torch.inf, -torch.inf, 0.0, -0.0], dtype=dtype)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_widening_is_exact_and_storing_is_its_inverse(dtype: torch.dtype) -> None:
    x = _all_bits(dtype)
    widened, back = torch.zeros(len(x)), torch.zeros(len(x), dtype=dtype)
    _round_trip.launch(blocks_for(len(x), 64), 64, x, widened, back)
    assert torch.equal(widened, x.float())
    assert torch.equal(back.float(), x.float())


@kernel
def _narrow(x_N, out_N):
    i = cuda.grid(1)
    if i < x_N.size:
        store(out_N, i, x_N[i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_storing_rounds_to_nearest_and_ties_to_even(dtype: torch.dtype) -> None:
    ties = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, -(1 + 2.0**-8)])
    x = torch.cat([ties, torch.randn(300), torch.tensor([3e38, -3.4e38, 1e-40, torch.inf, -torch.inf])])
    out = torch.zeros(len(x), dtype=dtype)
    _narrow.launch(blocks_for(len(x), 64), 64, x, out)
    assert torch.equal(out, x.to(dtype))
    _narrow.launch(1, 32, torch.tensor([torch.nan, -torch.nan]), out)
    assert out[:2].isnan().all()


@kernel
def _narrow_by_chance(x_RD, out_RD, bias_R, out_R, key):
    row = cuda.grid(1)
    if row < x_RD.shape[0]:
        first = row_key(key, row)
        for d in range(x_RD.shape[1]):
            store_stochastic(out_RD, (row, d), x_RD[row, d], np.uint32(first + np.uint32(d)))
        store_stochastic(out_R, row, bias_R[row], np.uint32(first + OF_BIAS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_storing_stochastically_is_the_rounding_of_the_reference_to_the_bit(dtype: torch.dtype) -> None:
    scale = 10.0 ** torch.arange(-12, 8)
    x = torch.cat([torch.randn(30, 20) * scale, torch.tensor([[0.0, -0.0, 1e-40, -1e-7]]).repeat(1, 5)])
    x[3, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, -torch.nan])
    out, bias = torch.zeros(31, 20, dtype=dtype), torch.randn(31)
    out_R, key = torch.zeros(31, dtype=dtype), rounding_key(seed=5, step=2)
    _narrow_by_chance.launch(1, 32, x, out, bias, out_R, key)
    want = stochastic_round(x, dtype, torch.arange(31), key)
    assert torch.equal(out.nan_to_num(7, 8, 9), want.nan_to_num(7, 8, 9))
    assert torch.equal(out_R, stochastic_round(bias, dtype, torch.arange(31), key))
    assert (want != x.to(dtype)).float().mean() > 0.1  # not those of rounding to nearest
    same = torch.zeros(31, 20)
    _narrow_by_chance.launch(1, 32, x, same, bias, out_R, key)
    assert torch.equal(same.nan_to_num(7, 8, 9), x.nan_to_num(7, 8, 9))


@kernel
def _reduce(x_N, sum_N, max_N, of_block):
    i = cuda.grid(1)
    if of_block:
        sum_N[i], max_N[i] = block_sum(x_N[i]), block_max(x_N[i])
    else:
        sum_N[i], max_N[i] = warp_sum(x_N[i]), warp_max(x_N[i])


def test_reductions_give_every_thread_the_same() -> None:
    x = torch.randn(192)
    total, most = torch.empty(192), torch.empty(192)
    for of_block, width in ((0, 32), (1, 96)):
        _reduce.launch(2, 96, x, total, most, of_block)
        groups = x.view(-1, width)
        assert torch.equal(most.view_as(groups), groups.amax(1, keepdim=True).expand_as(groups))
        assert torch.equal(total.view_as(groups), total.view_as(groups)[:, :1].expand_as(groups))
        torch.testing.assert_close(total.view_as(groups)[:, 0], groups.sum(1))


def test_a_lane_that_stays_away_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.kernels.cuda import simulator

    monkeypatch.setattr(simulator, "PATIENCE", 0.5)

    def diverging(x_N):
        if cuda.threadIdx.x < 31:
            x_N[cuda.threadIdx.x] = warp_sum(x_N[cuda.threadIdx.x])

    with pytest.raises(Exception, match="tid="):
        Kernel(diverging).launch(1, 32, torch.zeros(32))
