"""How many threads a computation may use."""

from __future__ import annotations

import numba
import pytest
import torch

from slidex.threads import FEW_SCORES, threads_for


def now() -> tuple[int, int]:
    return torch.get_num_threads(), numba.get_num_threads()


@pytest.mark.parametrize("fails", [False, True])
def test_little_work_stays_on_one_thread_and_leaves_the_numbers_alone(fails: bool) -> None:
    before = now()
    many = min(2, numba.config.NUMBA_NUM_THREADS)
    try:
        torch.set_num_threads(2)
        numba.set_num_threads(many)
        with threads_for(FEW_SCORES + 1):
            assert now() == (2, many)
        try:
            with threads_for(FEW_SCORES):
                assert now() == (1, 1)
                if fails:
                    raise RuntimeError
        except RuntimeError:
            assert fails
        assert now() == (2, many)
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])
