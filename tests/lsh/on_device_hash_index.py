"""The hash index on a GPU: the contract and equality with the CPU at sizes of use, and what only a GPU can show.

pytest does not collect this file by itself: `make gpu-check` runs it, and there must be a GPU.
"""

from __future__ import annotations

import pytest
import torch

from slidex.errors import DivergedError
from tests.lsh.contract import (
    Contract,
    check_values_not_finite_are_refused,
    one_thread,  # noqa: F401  (a fixture)
)
from tests.lsh.parity import PARITY, VARIANTS, assert_equal, made, random_problem

DEVICE = "cuda"
REPEATS = 250
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGE = [
    *PARITY,
    ("simhash", {"bits": 9, "tables": 50}),
    ("simhash", {"bits": 10, "tables": 300, "min_votes": 2}),
    ("dwta", {"bits": 9, "tables": 50}),
]


@pytest.mark.parametrize(("variant", "device"), [(variant, DEVICE) for variant in VARIANTS])
class TestContract(Contract):
    pass


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_not_finite_are_refused_by_row(variant) -> None:
    check_values_not_finite_are_refused(variant, DEVICE, float("nan"))
    check_values_not_finite_are_refused(variant, DEVICE, float("-inf"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", LARGE)
def test_the_cpu_has_the_same_codes_buckets_votes_and_pools(variant, dtype: torch.dtype) -> None:
    weight_CD, bias_C, hidden_ND = random_problem(20_000, 48, 128, dtype)
    ours = made(variant, weight_CD.to(DEVICE), bias_C.to(DEVICE))
    assert_equal(ours, made(variant, weight_CD, bias_C), hidden_ND.to(DEVICE))


@pytest.mark.parametrize("variant", LARGE)
def test_same_answers_in_every_run(variant) -> None:
    weight_CD, bias_C, hidden_ND = (a.to(DEVICE) for a in random_problem(20_000, 256, 128, torch.float32))
    index = made(variant, weight_CD, bias_C)
    ids_NK, ids = index.query(hidden_ND, 100), index.pool(hidden_ND, 4_000)
    for _ in range(REPEATS):
        assert torch.equal(index.query(hidden_ND, 100), ids_NK)
        assert torch.equal(index.pool(hidden_ND, 4_000), ids)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_query_waits_for_nothing(variant) -> None:
    weight_CD, bias_C, hidden_ND = (a.to(DEVICE) for a in random_problem(20_000, 64, 128, torch.float32))
    index = made(variant, weight_CD, bias_C)
    index.query(hidden_ND, 20), index.padded_pool(hidden_ND, 500)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        index.query(hidden_ND, 20, step=1)
        index.padded_pool(hidden_ND, 500, step=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_bad_row_is_told_of_by_a_later_call() -> None:
    weight_CD, bias_C, hidden_ND = (a.to(DEVICE) for a in random_problem(5_000, 64, 128, torch.float32))
    index = made(VARIANTS[0], weight_CD, bias_C)
    hidden_ND[7, 3] = float("nan")
    busy = torch.ones(8192, 8192, device=DEVICE)
    for _ in range(20):
        busy = busy @ busy * 1e-4
    index.query(hidden_ND, 20)
    torch.cuda.synchronize()
    with pytest.raises(DivergedError, match="Row 7 "):
        index.query(hidden_ND[:2], 20)
