"""Candidates from FAISS in the GPU benchmark, with a stand-in for FAISS's GPU functions: no GPU ever ran this."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, gpu_clock, gpu_faiss
from benchmarks.gpu_clock import Clock
from benchmarks.gpu_results import Case
from slidex.lsh import index as lsh_index
from tests.nn.device_path import take_device_path

CPU = torch.device("cpu")
TINY = Case(300, 16, 8)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def faiss_gpu(monkeypatch):
    """A stand-in for FAISS's GPU functions, which stays on the CPU; the list gets the number of rows of every query."""
    faiss = pytest.importorskip("faiss", reason="faiss-cpu is installed by the extra dev")
    asked = []
    monkeypatch.setattr(lsh_index, "_FACTORIES", lsh_index._FACTORIES.copy())
    monkeypatch.setattr(lsh_index, "_SETTINGS", lsh_index._SETTINGS.copy())

    def to_gpu(resources, device, index):
        copy = faiss.clone_index(index)
        return SimpleNamespace(
            search=lambda queries, k: asked.append(len(queries)) or copy.search(queries, k), kept=copy
        )

    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", to_gpu, raising=False)
    return asked


def faiss_ways(case, dtype=torch.float32):
    return {way: make for way, make in gpu.ways(case, CPU, dtype).items() if way.endswith("FAISS")}


def test_candidates_from_faiss_train_a_layer_on_a_gpu_s_path(monkeypatch, faiss_gpu):
    take_device_path(monkeypatch)
    case, clock = Case(2000, 64, 16), Clock(CPU, steps=2, repeats=2)
    seen = itertools.count()
    monkeypatch.setattr(gpu_faiss, "outside_bytes", lambda _: 10**9 * next(seen))
    ways = faiss_ways(case)
    assert list(ways) == ["slidex, shared, FAISS", "slidex, per_sample, FAISS"]
    for way, make in ways.items():
        faiss_gpu.clear()
        result = gpu.measure(case, way, make, CPU, torch.float32, clock)
        assert result.learns, result.note
        assert (result.host_microseconds, result.device_microseconds) == (None, None)
        assert result.peak_bytes == 10**9  # of what was outside torch's memory before
        assert result.index_share > 0
        assert "float32, adam; query" in result.note
        # One for each step, and as many as the clock takes of the query alone.
        assert faiss_gpu == [16] * (2 * gpu.BATCHES + 2 * (gpu_clock.WARM_UP + 4))


def test_faiss_proposes_what_it_finds(monkeypatch, faiss_gpu):
    take_device_path(monkeypatch)
    torch.manual_seed(0)
    case = Case(2000, 64, 16)
    step = gpu.faiss_step(case, CPU, torch.float32, mode="shared", pool_size=200)
    hidden_ND, target_N = gpu.batches(case, CPU, torch.float32)[0]
    step(hidden_ND, target_N)
    step.head.rehash()
    index, scores_NC = step.head._sampling.index, hidden_ND @ step.head.weight.detach().T
    assert index.runs_on_cuda
    best_N5, found_N5 = scores_NC.topk(5).indices, index.query(hidden_ND, 5)
    hits = (best_N5[:, :, None] == found_N5[:, None]).any(2)
    assert hits.float().mean() > 0.8  # 32 of 45 cells are searched
    pool = index.padded_pool(hidden_ND, 1999)
    assert pool.shape == (1999,)
    assert pool[-1] == -1
    assert len(pool[pool >= 0].unique()) == (pool >= 0).sum()


def test_without_faiss_on_a_gpu_the_line_says_why(monkeypatch):
    faiss = pytest.importorskip("faiss", reason="faiss-cpu is installed by the extra dev")

    def notes(case=TINY):
        clock = Clock(CPU, 1, 1)
        found = [
            gpu.measure(case, w, make, CPU, torch.float32, clock) for w, make in faiss_ways(case).items()
        ]
        assert len(found) == 2
        assert all(result.milliseconds is None and result.index_share is None for result in found)
        (note,) = {row[-1] for row in gpu.rows_of(found)}
        return note

    assert "not measured: The 'device' parameter" in notes()
    assert "which has no GPU code: uninstall faiss-cpu" in notes()
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0, raising=False)
    assert "faiss sees no GPU" in notes()
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    assert notes(TINY._replace(classes=1_000_001)) == (
        "not measured: more than 1,000,000 classes take the host too long to file"
    )
    monkeypatch.delattr(faiss, "index_factory")
    assert "not measured: The FAISS indexes need the package faiss" in notes()


def test_what_faiss_cannot_put_on_a_gpu_ends_its_line_alone(monkeypatch, faiss_gpu):
    take_device_path(monkeypatch)

    def full(resources, device, index):
        raise RuntimeError("Error in x at /y.cpp:1: out of memory")

    monkeypatch.setattr("faiss.index_cpu_to_gpu", full)
    (_, make), _ = faiss_ways(Case(2000, 64, 16)).items()
    result = gpu.measure(
        Case(2000, 64, 16), "slidex, shared, FAISS", make, CPU, torch.float32, Clock(CPU, 1, 1)
    )
    assert result.note.startswith("not measured: FAISS cannot put 'IVF45,Flat' on a GPU: out of memory")
