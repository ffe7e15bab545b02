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
from tests.lsh.compiled_kernels import compiled
from tests.lsh.parity import votes_of

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
    assert names == {
        *("query_tables", "pool_votes", "rank_votes"),
        *("find_winners", "find_runners_up", "pack_codes"),
    }
    for launch in launches:
        ptx = compile_ptx(launch, capability)
        assert [launch.kernel.name in entry for entry in entry_points(ptx)] == [True]
        assert ".extern" not in ptx
        # A signed and an unsigned integer in one expression would have made a float64 of both.
        assert ".f64" not in ptx, launch
        assert not re.search(r"call\.uni|\.local", ptx), "a call or an array in slow memory"
        offsets = re.sub(
            r"div\.u32 .*\n\s*mul\.lo\.s32 .*", "", ptx
        )  # remainders of numbers found to be small
        assert not re.search(r"m(ul|ad)\.lo\.[su]32", offsets), "an offset of 32 bits"
        assert not re.search(r"\b(atom|red)\.\S*\.f(16|32|64)", ptx), launch
        words = assembled(ptx, capability, tmp_path)
        assert words is None or re.search(r"\b0 bytes spill stores", words), words


@pytest.mark.parametrize(
    ("num_classes", "k", "settings"),
    [
        (40_000, 300, {"bits": 8, "tables": 50}),
        (40_000, 5_000, {"bits": 9, "tables": 50, "max_bucket": 60, "probes": 2}),
        (40_000, 300, {"bits": 6, "tables": 50, "max_bucket": 100, "overflow": "reservoir", "min_votes": 2}),
        (40_000, 1, {"bits": 17, "tables": 90, "probes": 3}),
        (2_000, 3_000, {"bits": 1, "tables": 400, "max_bucket": 700, "overflow": "first"}),
    ],
)
def test_votes_of_compiled_kernels_are_those_of_the_cpu(num_classes: int, k: int, settings) -> None:
    kernels = compiled("reading", "voting")
    generator = torch.Generator().manual_seed(0)
    weight_CD = torch.randn(num_classes, 32, generator=generator) + 0.2
    index = make_index("simhash", 32, num_classes, seed=7, **settings)
    index.build(weight_CD)
    made, codes_NLV = index.tables, index.family.hash_queries(weight_CD[:6])
    buckets = made._buckets()
    read = (*buckets[:2], codes_NLV, buckets.limit, buckets.overflow, 7, 5)
    ranks_NK, ids_NK = np.full((6, k), -1), np.full((6, k), -1, dtype=np.int32)
    slots_TW2 = np.full((2, 1 << 17, 2), 12_345, dtype=np.int32)
    kernels.query_tables(*read, made._min_votes, 6, slots_TW2, ranks_NK, ids_NK)
    for votes_C, ranks_K, ids_K in zip(votes_of(index, codes_NLV, 5), ranks_NK, ids_NK, strict=True):
        found = ids_K[np.argsort(-ranks_K, kind="stable")]
        found = found[found >= 0]
        assert len(np.unique(found)) == len(found)
        best = np.sort(votes_C[votes_C >= made._min_votes])[::-1]
        assert np.array_equal(votes_C[found], best[:k])
    votes_C = np.zeros(num_classes, dtype=np.int32)
    kernels.pool_votes(*read, votes_C)
    voted = np.flatnonzero(votes_C >= made._min_votes)
    assert np.array_equal(voted, made.pool(codes_NLV, num_classes, step=5))
    order_C, budget = np.zeros(num_classes, dtype=np.int64), max(1, len(voted) // 2)
    cut = np.sort(votes_C)[-budget:][:1]
    kernels.rank_votes(votes_C, cut, 7, 5, order_C)
    chosen = np.sort(np.argsort(order_C, kind="stable")[:budget])
    assert np.array_equal(chosen, made.pool(codes_NLV, budget, step=5))
    assert ((order_C == kernels.NEVER) == (votes_C < cut)).all()


@pytest.mark.parametrize(
    ("width", "zeros", "settings"),
    [
        (64, 0.0, {"bits": 9, "tables": 20, "probes": 3}),
        (33, 0.9, {"bits": 7, "tables": 10, "bin_size": 16, "probes": 2}),
        (20, 0.97, {"bits": 24, "tables": 5, "bin_size": 2, "probes": 24}),
        (300, 0.5, {"bits": 10, "tables": 8, "bin_size": 256}),
    ],
)
def test_codes_of_compiled_kernels_are_those_of_the_cpu(width: int, zeros: float, settings) -> None:
    kernels, generator = compiled("dwta"), torch.Generator().manual_seed(0)
    family = make_index("dwta", width, 10, seed=3, **settings).family
    rows_MD = torch.randn(500, width, generator=generator).round(decimals=1)  # with equal entries
    rows_MD[torch.rand(rows_MD.shape, generator=generator) < zeros] = 0
    bins_BS, starts_B, strides_B = (array.astype(np.int32) for array in family._functions)
    rows = (rows_MD.numpy(), np.ones(500, np.float32), np.ascontiguousarray(bins_BS.T))
    digits_MB, filled_MB, seconds_MB = (np.full((500, len(bins_BS)), 9, dtype=np.uint8) for _ in range(3))
    leads_MB = np.full(digits_MB.shape, -1, dtype=np.float32)
    codes_LMV = np.full((family.tables, 500, 1 + family.probes), -1, dtype=np.int32)
    kernels.find_winners(*rows, digits_MB, filled_MB)
    kernels.find_runners_up(*rows, digits_MB, seconds_MB, leads_MB)
    functions = starts_B, strides_B, family._digit_bits, family.bits
    kernels.pack_codes(digits_MB, filled_MB, seconds_MB, leads_MB, *functions, codes_LMV)
    assert np.array_equal(codes_LMV.transpose(1, 0, 2), family.hash_queries(rows_MD))


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
    from slidex.lsh.mixing import mix_ids

    ids = torch.randint(2**31 - 2, (2_000,), generator=torch.Generator().manual_seed(0))
    for key in (0, 12_345, 2**63, 2**64 - 1):
        theirs = voting.mix_ids(ids.numpy(), np.uint64(key))
        ours = mix_ids(ids, key - (1 << 64) if key >> 63 else key)
        assert np.array_equal(ours.numpy().view(np.uint64) ^ np.uint64(1 << 63), theirs)
        assert np.array_equal(ours.argsort().numpy(), theirs.argsort())
