"""The FAISS indexes beyond the contract: what each kind of update does, training, settings, errors."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from slidex.errors import ConfigError, MissingExtraError
from slidex.lsh import exact_topk, index_settings, make_index, recall_at_k

faiss = pytest.importorskip("faiss")

WIDTH = 16
ANY_FACTORY = (
    "Flat",
    "IVF8,Flat",
    "PQ4x4fs",
    "OPQ4_16,IVF8,PQ4x4fsr",
    "IVF8_HNSW8,SQ8",
    "SQ8",
    "IVF8,PQ4x4,RFlat",
)
PLAIN = {
    "faiss-flat": {},
    "faiss-ivf": {},
    "faiss-pq": {},
    "faiss-hnsw": {},
    "faiss-binary": {},
    "faiss": {"factory": "IVF16,SQ8"},
}


def clustered(num_classes: int = 1_500, centres: int = 30, seed: int = 0):
    """Rows around a few directions, as trained classifiers have them, and queries near rows."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(centres, WIDTH, generator=generator)
    member = torch.randint(centres, (num_classes,), generator=generator)
    weight_CD = centre[member] + 0.4 * torch.randn(num_classes, WIDTH, generator=generator)
    bias_C = 0.3 * torch.randn(num_classes, generator=generator)
    hidden_ND = weight_CD[::30] + 0.3 * torch.randn(len(weight_CD[::30]), WIDTH, generator=generator)
    return weight_CD, bias_C, hidden_ND


def made(name, weight_CD, bias_C, **settings):
    index = make_index(name, WIDTH, len(weight_CD), seed=5, **settings)
    index.build(weight_CD, bias_C)
    return index


def test_importing_the_indexes_does_not_import_faiss() -> None:
    code = "import sys, slidex.lsh; assert 'faiss-ivf' in slidex.lsh.index_names(); assert 'faiss' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("installed", ["nothing", "an empty folder"])
def test_a_missing_faiss_is_told_with_the_extra_that_brings_it(monkeypatch, installed) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None if installed == "nothing" else SimpleNamespace())
    with pytest.raises(MissingExtraError, match=r"pip install 'slidex\[faiss\]'"):
        make_index("faiss-flat", WIDTH, 10)


def test_a_faiss_that_scores_updated_rows_wrongly_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(faiss, "__version__", "1.13.2")
    with pytest.raises(MissingExtraError, match=r"faiss 1\.14\.2 or newer.*Found 1\.13\.2\."):
        make_index("faiss-flat", WIDTH, 10)
    monkeypatch.setattr(faiss, "__version__", "1.14.2.post1")
    make_index("faiss-flat", WIDTH, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_flat_is_the_exact_answer_for_any_type_of_float(dtype) -> None:
    weight_CD, bias_C, hidden_ND = (part.to(dtype) for part in clustered(700))
    exact_NK = exact_topk(hidden_ND, weight_CD, bias_C, 40)[1]
    ours_NK = made("faiss-flat", weight_CD, bias_C).query(hidden_ND, 40)
    assert recall_at_k(ours_NK, exact_NK) > 0.998  # equal but for ties, which bfloat16 has


@pytest.mark.parametrize(
    ("name", "settings", "least"),
    [
        ("faiss-ivf", {"nprobe": 8}, 0.9),
        ("faiss-pq", {"nprobe": 8}, 0.85),
        ("faiss-pq", {"nprobe": 8, "bits": 8, "m": 4, "k_factor": 8}, 0.8),
        ("faiss-hnsw", {}, 0.9),
        ("faiss-binary", {"nprobe": 16, "k_factor": 8}, 0.7),
        ("faiss-binary", {"nlist": 0, "bits": 512, "k_factor": 8}, 0.85),
    ],
)
def test_recall_of_the_exact_answer(name, settings, least) -> None:
    weight_CD, bias_C, hidden_ND = clustered()
    exact_NK = exact_topk(hidden_ND, weight_CD, bias_C, 20)[1]
    assert recall_at_k(made(name, weight_CD, bias_C, **settings).query(hidden_ND, 20), exact_NK) > least


@pytest.mark.parametrize("name", ["faiss-pq", "faiss-binary"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_candidates_of_compressed_rows_come_in_the_order_of_today_s_exact_scores(name, dtype) -> None:
    weight_CD, bias_C, hidden_ND = (part.to(dtype) for part in clustered())
    index = made(name, weight_CD, bias_C)
    weight_CD += 0.2 * torch.randn(weight_CD.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found_NK = index.query(hidden_ND, 15)
    rows_NKD = weight_CD.float()[found_NK]
    scores_NK = torch.einsum("nd,nkd->nk", hidden_ND.float(), rows_NKD) + bias_C.float()[found_NK]
    assert bool((found_NK >= 0).all())
    assert bool((scores_NK.diff(dim=1) <= 1e-4).all())


@pytest.mark.parametrize("factory", ANY_FACTORY)
def test_any_factory_string_is_built_updated_restored_and_measured(factory) -> None:
    weight_CD, bias_C, hidden_ND = clustered(1_200)
    index = made("faiss", weight_CD, bias_C, factory=factory, k_factor=4)
    changed = torch.arange(0, 1_200, 40)
    weight_CD[changed] = 3 * hidden_ND[:1]
    bias_C[changed] = 2.0
    assert index.drift(weight_CD, bias_C, changed) > 0.5
    index.update(weight_CD, bias_C, changed)
    assert index.drift(weight_CD, bias_C, torch.arange(1_200)) == 0.0
    found = index.query(hidden_ND[:1], 30)
    assert set(found[0].tolist()) == set(changed.tolist())
    other = make_index("faiss", WIDTH, 1_200, seed=5, factory=factory, k_factor=4)
    other.load_state(index.state(), weight_CD, bias_C)
    assert torch.equal(other.query(hidden_ND, 9), index.query(hidden_ND, 9))


@pytest.mark.parametrize(
    ("name", "settings", "written"),
    [
        ("faiss-flat", {}, 3),
        ("faiss-ivf", {}, 3),
        ("faiss-pq", {}, 3),
        ("faiss-binary", {}, 3),
        ("faiss-binary", {"nlist": 0}, 3),
        ("faiss", {"factory": "OPQ4_16,IVF8,PQ4x4fsr"}, 3),
        ("faiss", {"factory": "PQ4x4fs"}, 900),
        ("faiss-hnsw", {}, 900),
    ],
)
def test_an_update_writes_no_more_rows_than_the_kind_of_index_needs(name, settings, written) -> None:
    weight_CD, bias_C, _ = clustered(900)
    index = made(name, weight_CD, bias_C, **settings)
    assert index.stats().rows_rehashed == 900
    index.update(weight_CD, bias_C, torch.tensor([4, 4, 800, 17]))
    assert index.stats().rows_rehashed == written
    assert index.trainings <= 1


@pytest.mark.parametrize(("name", "settings"), [("faiss-ivf", {}), ("faiss-pq", {"k_factor": 1})])
def test_updated_rows_are_scored_as_if_they_had_been_filed_at_once(name, settings) -> None:
    """FAISS itself gets this wrong for fast-scan codes; see `slidex.lsh.faiss_parts.clear_removed`."""
    weight_CD, bias_C, _ = clustered()
    index = made(name, weight_CD, bias_C, nlist=8, nprobe=8, retrain_share=None, **settings)
    for start in range(5):
        index.update(weight_CD, bias_C, torch.arange(start, len(weight_CD), 9 + start))
    filed = make_index(name, WIDTH, len(weight_CD), seed=5, nlist=8, nprobe=8, retrain_share=None, **settings)
    filed.load_state(index.state(), weight_CD, bias_C)
    filed.build(weight_CD, bias_C)
    twins = [index.query(weight_CD, 200), filed.query(weight_CD, 200)]
    assert recall_at_k(*twins) > 0.995  # but for ties at the end of the list


@pytest.mark.parametrize(
    ("name", "settings"),
    [("faiss-ivf", {}), ("faiss-pq", {}), ("faiss-binary", {}), ("faiss", {"factory": "PQ4x4fs"})],
)
def test_quantisers_are_trained_anew_when_rows_have_moved_and_not_before(name, settings) -> None:
    weight_CD, bias_C, hidden_ND = clustered()
    index = made(name, weight_CD, bias_C, **settings)
    index.build(weight_CD, bias_C)
    weight_CD[:30] += 1.0
    index.build(weight_CD, bias_C)
    assert index.trainings == 1
    resumed = make_index(name, WIDTH, len(weight_CD), seed=5, **settings)
    resumed.load_state(index.state(), weight_CD, bias_C)
    moved_CD = clustered(seed=9)[0]
    for one, trainings in ((index, 2), (resumed, 1)):
        one.build(moved_CD, bias_C)
        assert one.trainings == trainings
    assert torch.equal(index.query(hidden_ND, 30), resumed.query(hidden_ND, 30))


@pytest.mark.parametrize(("share", "trainings"), [(None, 1), (0, 3), (0.5, 2)])
def test_retrain_share_says_how_far_rows_may_move(share, trainings) -> None:
    weight_CD, bias_C, _ = clustered()
    index = made("faiss-ivf", weight_CD, bias_C, retrain_share=share)
    index.build(weight_CD, bias_C)
    index.build(clustered(seed=9)[0], bias_C)
    assert index.trainings == trainings


@pytest.mark.parametrize("name", PLAIN)
def test_drift_grows_with_the_weights_and_ends_with_a_build(name) -> None:
    weight_CD, bias_C, _ = clustered()
    index, everything = made(name, weight_CD, bias_C, **PLAIN[name]), torch.arange(len(weight_CD))
    noise = torch.randn(weight_CD.shape, generator=torch.Generator().manual_seed(2))
    drifts = [index.drift(weight_CD + scale * noise, bias_C, everything) for scale in (0.0, 0.05, 1.0)]
    assert drifts[0] == 0.0
    assert drifts[0] < drifts[1] < drifts[2] <= 1.0
    index.build(weight_CD + noise, bias_C)
    assert index.drift(weight_CD + noise, bias_C, everything) == 0.0
    assert index.drift(weight_CD, bias_C, everything[:0]) == 0.0


def test_pool_takes_the_most_named_classes_then_those_named_first(monkeypatch) -> None:
    weight_CD = torch.zeros(6, WIDTH)
    weight_CD[:4, :4] = torch.eye(4) * torch.tensor([4.0, 3.0, 2.0, 1.0])
    index = made("faiss-flat", weight_CD, torch.tensor([0.0, 0.0, 0.0, 0.0, -9.0, -9.0]))
    hidden_ND = torch.zeros(2, WIDTH)
    hidden_ND[0, :4] = torch.tensor([1.0, 0.1, 1.0, 0.0])  # 0, 2
    hidden_ND[1, :4] = torch.tensor([0.1, 1.0, 1.0, 0.0])  # 1, 2
    monkeypatch.setattr("slidex.lsh.faiss_index.POOL_CANDIDATES", 4)
    assert index.pool(hidden_ND, 1).tolist() == [2]
    monkeypatch.setattr("slidex.lsh.faiss_index.POOL_CANDIDATES", 2)
    assert index.pool(hidden_ND, 2)[-1].item() == 2
    draws = {tuple(index.pool(hidden_ND, 2, step=step).tolist()) for step in range(30)}
    assert draws == {(0, 2), (1, 2)}


SETTINGS = {
    "faiss": {"factory": "SQ4", "k_factor": 3},
    "faiss-ivf": {"nlist": 12, "nprobe": 1},
    "faiss-pq": {"nlist": 12, "nprobe": 1, "m": 3, "bits": 8, "k_factor": 1},
    "faiss-hnsw": {"M": 3, "ef_construction": 3, "ef_search": 200},
    "faiss-binary": {"bits": 128, "center": True, "nlist": 12, "nprobe": 1, "k_factor": 1},
}
BASE = {
    "faiss": {"factory": "SQ8"},
    "faiss-ivf": {"nprobe": 2},
    "faiss-hnsw": {"M": 4, "ef_search": 8},
    "faiss-pq": {"nprobe": 3},
}


@pytest.mark.parametrize(("name", "setting"), [(name, each) for name in SETTINGS for each in SETTINGS[name]])
def test_every_setting_changes_the_answer(name, setting) -> None:
    weight_CD, bias_C, hidden_ND = clustered()
    weight_CD += 1.0
    base = BASE.get(name, {}) | ({"factory": "SQ4"} if setting == "k_factor" and name == "faiss" else {})
    before = made(name, weight_CD, bias_C, **base).query(hidden_ND, 12)
    after = made(name, weight_CD, bias_C, **(base | {setting: SETTINGS[name][setting]})).query(hidden_ND, 12)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("setting", [{"nprobe": 1}, {"ef_search": 1}])
def test_search_settings_reach_inside_a_factory_s_index(setting) -> None:
    weight_CD, bias_C, hidden_ND = clustered()
    base = {"factory": "OPQ4_16,IVF30_HNSW4,Flat", "nprobe": 12, "ef_search": 64}
    answers = [made("faiss", weight_CD, bias_C, **(base | s)).query(hidden_ND, 12) for s in ({}, setting)]
    assert not torch.equal(*answers)


def test_training_rows_change_the_cells() -> None:
    weight_CD, bias_C, _ = clustered(3_000)
    loads = [
        made("faiss-ivf", weight_CD, bias_C, nlist=10, train_rows=rows).stats().max_bucket_load
        for rows in (None, 390)
    ]
    assert loads[0] != loads[1]


def test_cells_are_counted() -> None:
    weight_CD, bias_C, _ = clustered()
    stats = made("faiss-ivf", weight_CD, bias_C, nlist=10).stats()
    assert (stats.tables, stats.mean_bucket_load) == (1, 150.0)
    assert stats.max_bucket_load >= 150
    assert stats.bytes >= 1_500 * (4 * (WIDTH + 1) + 8)


@pytest.mark.parametrize(
    ("name", "settings", "parts"),
    [
        ("faiss", {"factory": "IFV8,Flat"}, ["'factory'", "'IFV8,Flat'", "could not parse"]),
        ("faiss", {"factory": 8}, ["'factory'", "text", "8"]),
        ("faiss", {"factory": "IVF100,Flat"}, ["'factory'", "at most 25 cells", "1000 classes", "IVF100"]),
        ("faiss", {"factory": "IDMap,Flat"}, ["'factory'", "without IDMap"]),
        ("faiss", {"factory": "IVF8,Flat", "nprobe": 9}, ["'nprobe'", "1 to 8", "9"]),
        ("faiss", {"factory": "Flat", "nprobe": 2}, ["'nprobe'", "cells (IVF)", "'Flat'", "2"]),
        ("faiss", {"factory": "IVF8,Flat", "ef_search": 9}, ["'ef_search'", "HNSW", "'IVF8,Flat'"]),
        ("faiss-ivf", {"nlist": 26}, ["'nlist'", "1 to 25", "26"]),
        ("faiss-ivf", {"nlist": 0}, ["'nlist'", "1 to 25", "0"]),
        ("faiss-ivf", {"nlist": 8, "nprobe": 0}, ["'nprobe'", "1 to 8", "0"]),
        ("faiss-ivf", {"nlist": 10, "train_rows": 389}, ["'train_rows'", "at least 390", "389"]),
        ("faiss-ivf", {"retrain_share": 1.5}, ["'retrain_share'", "0 to 1", "1.5"]),
        ("faiss-ivf", {"device": "tpu"}, ["'device'", "'cpu' or 'cuda'", "'tpu'"]),
        ("faiss-pq", {"m": 18}, ["'m'", "1 to 17", "18"]),
        ("faiss-pq", {"bits": 5}, ["'bits'", "4 or 8", "5"]),
        ("faiss-pq", {"device": "cuda"}, ["'bits'", "8 on a GPU", "4"]),
        ("faiss-pq", {"k_factor": 0}, ["'k_factor'", "at least 1", "0"]),
        ("faiss-hnsw", {"M": 1}, ["'M'", "2 to 512", "1"]),
        ("faiss-hnsw", {"ef_construction": 0}, ["'ef_construction'", "at least 1", "0"]),
        ("faiss-binary", {"bits": 100}, ["'bits'", "multiple of 16", "100"]),
        ("faiss-binary", {"nlist": 0, "nprobe": 2}, ["'nprobe'", "cells (IVF)", "2"]),
    ],
)
def test_bad_settings_name_the_setting_its_limits_and_the_value(name, settings, parts) -> None:
    with pytest.raises(ConfigError) as caught:
        make_index(name, WIDTH, 1_000, **settings)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_what_faiss_cannot_train_is_refused_in_our_words() -> None:
    weight_CD, bias_C, _ = clustered(200)
    with pytest.raises(ConfigError, match=r"cannot train '.*' on 200 rows: .*"):
        made("faiss", weight_CD, bias_C, factory="RQ1x10")


def test_another_index_s_state_is_refused() -> None:
    weight_CD, bias_C, _ = clustered(900)
    index, other = (
        made("faiss-ivf", weight_CD, bias_C, nlist=8),
        made("faiss-ivf", weight_CD, bias_C, nlist=9),
    )
    with pytest.raises(ConfigError, match=r"'state'.*8.*9"):
        index.load_state(other.state(), weight_CD, bias_C)
    broken = index.state() | {"index": index.state()["index"][:50]}
    with pytest.raises(ConfigError, match="not a FAISS index"):
        index.load_state(broken, weight_CD, bias_C)


def test_faiss_s_globals_are_put_back() -> None:
    before = faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold
    weight_CD, bias_C, hidden_ND = clustered(300)
    made("faiss-hnsw", weight_CD, bias_C).query(hidden_ND, 3)
    assert (faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold) == before


def test_cuda_without_a_gpu_says_what_is_missing(monkeypatch) -> None:
    monkeypatch.delattr(faiss, "StandardGpuResources", raising=False)
    with pytest.raises(ConfigError, match="no GPU code: uninstall faiss-cpu"):
        make_index("faiss-flat", WIDTH, 10, device="cuda")
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0, raising=False)
    with pytest.raises(ConfigError, match="sees no GPU"):
        make_index("faiss-flat", WIDTH, 10, device="cuda")


def test_cuda_searches_a_copy_made_after_every_change(monkeypatch) -> None:
    """With a stand-in for FAISS's GPU functions: no GPU ever ran this."""
    copies = []

    def to_gpu(resources, device, index):
        if "HNSW" in type(index).__name__:
            raise RuntimeError("Error in to_gpu at /x/y.cpp:1: This index type is not implemented on GPU.")
        copies.append(faiss.clone_index(index))
        return copies[-1]

    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", to_gpu, raising=False)
    weight_CD, bias_C, hidden_ND = clustered(900)
    index = made("faiss-ivf", weight_CD, bias_C, device="cuda")
    weight_CD[7] = 5 * hidden_ND[0]
    index.update(weight_CD, bias_C, torch.tensor([7]))
    assert len(copies) == 2
    assert index.query(hidden_ND[:1], 1).item() == 7
    flat = made("faiss-flat", torch.zeros(2_100, WIDTH), None, device="cuda")
    with pytest.raises(ConfigError, match=r"'k'.*1 to 2048"):
        flat.query(hidden_ND, 2_050)
    with pytest.raises(ConfigError, match="cannot put 'HNSW8' on a GPU: This index type"):
        made("faiss", weight_CD, bias_C, factory="HNSW8", device="cuda")


def test_settings_are_listed_with_defaults() -> None:
    assert index_settings("faiss")["factory"] == "Flat"
    assert index_settings("faiss-pq")["k_factor"] == 2


def test_weights_on_a_gpu_need_a_search_on_a_gpu(monkeypatch) -> None:
    weight_CD, bias_C, _ = clustered(900)
    index = made("faiss-flat", weight_CD, bias_C)
    monkeypatch.setattr("slidex.lsh.faiss_index.is_cuda", lambda _: True)
    for call in (index.build, lambda *weights: index.load_state(index.state(), *weights)):
        with pytest.raises(ConfigError, match=r"'device'.*'cuda' for weights on.*'simhash' or 'dwta'"):
            call(weight_CD, bias_C)
