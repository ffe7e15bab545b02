"""The hash index's CUDA kernels without a GPU: in the simulator, as PTX, and their arithmetic as Numba compiles it."""

from __future__ import annotations

import re
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

from slidex.lsh import hash_index, make_index
from slidex.lsh.reading import mix
from tests.kernels.cuda.running import (
    CAPABILITIES,
    Launch,
    assembled,
    compile_ptx,
    entry_points,
    recorded_launches,
    run_simulated,
)

pytest.importorskip("numba_cuda", reason="numba-cuda is installed on Linux x86-64 only (extra dev)")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["TestContract", "not TestContract"])
def test_the_hash_index_in_the_simulator(part: str) -> None:
    run_simulated(Path(__file__).parent / "simulated_hash_index.py", "-k", part)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Every launch of a build, a query and a pool, one for each signature."""
    from slidex.lsh.cuda import hashing

    monkeypatch.setattr(hash_index, "is_cuda", lambda _: True)
    monkeypatch.setattr(hashing, "require_device", lambda _: None)
    weight_CD = torch.randn(60, 16)
    with recorded_launches() as recorded:
        for name in ("simhash", "dwta"):
            index = make_index(name, 16, 60, seed=0, bits=4, tables=3, probes=1)
            index.build(weight_CD)
            index.query(weight_CD[:2], 5)
            index.pool(weight_CD[:2], 5)
    return list({str(launch): launch for launch in recorded}.values())


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_to_integer_ptx(launches: list[Launch], tmp_path: Path, capability) -> None:
    names = {launch.kernel.name for launch in launches}
    assert names == {"query_tables", "pool_votes", "find_winners", "find_runners_up", "pack_codes"}
    for launch in launches:
        ptx = compile_ptx(launch, capability)
        assert [launch.kernel.name in entry for entry in entry_points(ptx)] == [True]
        assert ".extern" not in ptx
        # A signed and an unsigned integer in one expression would have made a float64 of both.
        assert ".f64" not in ptx, launch
        assert not re.search(r"\b(atom|red)\.\S*\.f(16|32|64)", ptx), launch
        assembled(ptx, capability, tmp_path)


def test_scattering_compiled_gives_what_it_gives_uncompiled_and_is_a_bijection() -> None:
    from slidex.lsh.cuda.reading import scatter

    python, compiled = scatter.py_func, numba.njit(scatter.py_func)
    ids = np.arange(0, 2**31 - 1, 2**31 // 3_000, dtype=np.int32)
    for key in (np.uint64(0), np.uint64(mix(np.uint64(7))), np.uint64(2**64 - 1)):
        ours = [compiled(c, key) for c in ids]
        assert ours == [int(python(c, key)) for c in ids]
        assert len(set(ours)) == len(ids)
        assert max(ours) < 2**32


def test_scattering_favours_no_class() -> None:
    from slidex.lsh.cuda.reading import scatter

    compiled, ids = numba.njit(scatter.py_func), np.arange(50, dtype=np.int32)
    counts = np.zeros(50)
    for step in range(2_000):
        key = np.uint64(mix(np.uint64(step)))
        counts[np.argsort([compiled(c, key) for c in ids])[-10:]] += 1
    assert np.abs(counts - 400).max() < 5 * np.sqrt(400 * 0.8)


def test_hashes_of_torch_are_those_of_the_cpu_in_order() -> None:
    from slidex.lsh import voting
    from slidex.lsh.cuda.tables import mix_ids

    ids = torch.randint(2**31 - 2, (2_000,), generator=torch.Generator().manual_seed(0))
    for key in (0, 12_345, 2**63, 2**64 - 1):
        theirs = voting.mix_ids(ids.numpy(), np.uint64(key))
        ours = mix_ids(ids, key - (1 << 64) if key >> 63 else key)
        assert np.array_equal(ours.numpy().view(np.uint64) ^ np.uint64(1 << 63), theirs)
        assert np.array_equal(ours.argsort().numpy(), theirs.argsort())
