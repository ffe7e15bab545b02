"""The head with the CUDA kernels in Numba's simulator."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.cuda.running import run_simulated

FILES = sorted(Path(__file__).parent.glob("simulated_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_head_in_the_simulator(path: Path) -> None:
    pytest.importorskip("numba_cuda", reason="numba-cuda is installed on Linux x86-64 only (extra dev)")
    run_simulated(path)
