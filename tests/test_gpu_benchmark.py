"""What a CPU can show of the GPU benchmark: the rivals' arithmetic, bytes, tables, and that it refuses to run."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional as F  # noqa: N812

from benchmarks import gpu, gpu_kernels, gpu_results, gpu_rivals, report
from benchmarks.gpu_clock import Clock
from benchmarks.gpu_results import Case, Result
from slidex.errors import DeviceError
from slidex.kernels.cuda import environment
from slidex.nn import memory
from slidex.nn.selection import make_config_index, settle_sampling
from tests.nn.device_path import take_device_path

CPU = torch.device("cpu")
TINY = Case(300, 16, 8)
pytestmark = pytest.mark.usefixtures("one_thread")


def problem():
    torch.manual_seed(0)
    hidden_ND = torch.randn(TINY.rows, TINY.width).requires_grad_()
    return hidden_ND, torch.randint(TINY.classes, (TINY.rows,))


def stepped(make, *arguments):
    """Loss, gradient of the input and weights after one step."""
    torch.manual_seed(1)
    weight_CD = gpu_rivals.layer(TINY.classes, TINY.width, CPU, torch.float32)
    hidden_ND, target_N = problem()
    loss = make(weight_CD, *arguments)(hidden_ND, target_N)
    return loss, hidden_ND.grad, weight_CD.detach()


@pytest.mark.parametrize("has_torchs", [True, False])
def test_the_dense_and_the_chunked_softmax_are_one(monkeypatch, has_torchs):
    if not has_torchs:
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
        monkeypatch.setattr(gpu_rivals, "SCORES_AT_ONCE", 3 * TINY.classes)
    for mine, theirs in zip(stepped(gpu_rivals.chunked), stepped(gpu_rivals.dense), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_chunked_softmax_asks_torch_for_chunks(monkeypatch):
    """Without options torch's function is the reference, with all scores at once."""
    seen = []

    def fused(hidden_ND, weight_CD, target_N, **options):
        seen.append(options["options"])
        return F.cross_entropy(hidden_ND @ weight_CD.T, target_N)

    monkeypatch.setattr(F, "linear_cross_entropy", fused, raising=False)
    monkeypatch.setattr(torch.nn, "LinearCrossEntropyOptions", lambda: "chunks", raising=False)
    stepped(gpu_rivals.chunked)
    assert seen == ["chunks"]


def test_the_dense_softmax_is_torchs():
    torch.manual_seed(1)
    weight_CD = gpu_rivals.layer(TINY.classes, TINY.width, CPU, torch.float32)
    hidden_ND, target_N = problem()
    want = F.cross_entropy(hidden_ND @ weight_CD.T, target_N)
    loss, grad_ND, after_CD = stepped(gpu_rivals.dense)
    torch.testing.assert_close(loss, want.detach())
    torch.testing.assert_close(grad_ND, torch.autograd.grad(want, hidden_ND)[0])
    moved = (after_CD - weight_CD).abs()
    assert 0.99 * gpu_rivals.LEARNING_RATE < moved.mean() <= moved.max() < 1.01 * gpu_rivals.LEARNING_RATE


def test_the_sampled_softmax_is_near_the_dense_one_and_touches_its_classes_alone():
    loss, grad_ND, after_CD = stepped(gpu_rivals.sampled, 200_000)
    want, want_grad_ND, _ = stepped(gpu_rivals.dense)
    torch.testing.assert_close(loss, want, rtol=2e-3, atol=0)
    torch.testing.assert_close(grad_ND, want_grad_ND, rtol=0.05, atol=2e-4)
    torch.manual_seed(1)
    before_CD = gpu_rivals.layer(TINY.classes, TINY.width, CPU, torch.float32)
    _, _, few_CD = stepped(gpu_rivals.sampled, 5)
    assert 0 < (few_CD != before_CD).any(1).sum() <= TINY.rows + 5
    assert (after_CD != before_CD).any(1).all()


def test_every_way_runs_and_is_shown():
    clock, results = Clock(CPU, steps=2, repeats=2), []
    for way, make in gpu.ways(TINY, CPU, torch.float32).items():
        if way.endswith("FAISS"):
            continue
        results.append(gpu.measure(TINY, way, make, CPU, torch.float32, clock))
        assert results[-1].milliseconds > 0
        assert results[-1].learns
        assert results[-1].host_per_device > 0
    assert [result.way for result in results][:3] == ["dense", "slidex, shared", "slidex, per_sample"]
    assert all("float32, adam; query" in result.note for result in results[1:3])
    assert [result.index_share is None for result in results] == [True, False, False, True, True]
    assert all(f": {result.index_share:.0%}" in result.note for result in results[1:3])
    table = gpu.rows_of(results)
    assert {len(row) for row in table} == {len(gpu.HEADINGS)}
    assert table[0][10] == "1"
    hidden_ND, target_N = gpu.batches(TINY, CPU, torch.float32)[0]
    assert hidden_ND.shape == (8, 16)
    assert 0 <= target_N.min() <= target_N.max() < 300
    step = gpu.slidex_step(TINY, CPU, torch.float32, mode="shared", pool_size=50)
    losses = [step(hidden_ND, target_N) for _ in range(50)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_a_slow_step_is_timed_once(monkeypatch, seconds):
    """Else one way at one size could take all of the time that there is."""
    calls, now = [], iter(range(10**6))

    def make():
        def step(hidden_ND, target_N):
            calls.append(target_N)
            return torch.tensor(9.0 - len(calls))

        return step

    monkeypatch.setattr(gpu.time, "perf_counter", lambda: seconds * next(now))
    result = gpu.measure(TINY, "chunked", make, CPU, torch.float32, Clock(CPU, steps=2, repeats=2))
    assert result.learns
    if seconds:
        assert (len(calls), result.milliseconds, result.host_per_device) == (4, 60_000.0, None)
        assert [torch.equal(calls[at], calls[at + 2]) for at in (0, 1)] == [True, True]
    else:
        assert len(calls) > 2 * gpu.BATCHES + 4


def test_the_driver_is_named(monkeypatch):
    monkeypatch.setattr(environment, "driver", lambda: "for CUDA 13.0")
    monkeypatch.setattr(
        gpu.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="580.159.03\n580.159.03\n")
    )
    assert gpu.driver() == "580.159.03, for CUDA 13.0"

    def missing(*_, **__):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(gpu.subprocess, "run", missing)
    assert gpu.driver() == "for CUDA 13.0"


def test_a_copy_without_history_is_told_its_commit(monkeypatch, tmp_path):
    assert report.commit(tmp_path) == "unknown"
    monkeypatch.setenv("SLIDEX_COMMIT", "1234abc")
    assert report.commit(tmp_path) == "1234abc"


def test_hot_kernels_that_make_too_little_of_the_memory_are_named():
    found = [gpu_kernels.Share(name, 1, 1.0, share) for name, share in (("a", 0.6), ("b", 0.59), ("c", 0.1))]
    words = "goal of 60% of a copy's rate in each hot kernel: got it in 1 of 2; not b (59%)"
    assert gpu_results.kernel_goal(found, ("a", "b")) == words


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("2 GB more"), DeviceError("too little")])
def test_what_does_not_fit_is_said(error):
    def make():
        raise error

    result = gpu.measure(TINY, "dense", make, CPU, torch.float32, Clock(CPU, 1, 1))
    assert result.milliseconds is None
    (row,) = gpu.rows_of([result])
    assert row[-1] == f"does not fit: {error}"
    assert len(row) == len(gpu.HEADINGS)


def test_ratios_and_goals_are_of_what_was_measured():
    million = Case(1_000_000, 768, 256)
    ten = Case(10_000_000, 768, 256)
    thirty = Case(30_000_000, 768, 256)
    results = [
        Result(million, "dense", 30.0, 8_000_000_000, ""),
        Result(million, "slidex, shared", 5.0, 2_000_000_000, ""),
        Result(million, "slidex, per_sample", 10.0, 1_000_000_000, ""),
        Result(ten, "dense", None, 0, "does not fit"),
        Result(ten, "slidex, shared", 7.0, 2_000_000_000, ""),
        Result(thirty, "slidex, shared", None, 0, "does not fit"),
    ]
    assert [row[10:12] for row in gpu.rows_of(results)[:3]] == [["1", "1"], ["6", "0.25"], ["3", "0.125"]]
    assert gpu.goals(results) == [
        "goal at C = 1,000,000, D = 768, N = 256: 5 times as fast as dense; got 6 times, 0.25 of its memory",
        "goal at C = 10,000,000, D = 768, N = 256: 30 times as fast as dense in 0.33 of its memory; got dense does not "
        "fit",
        "goal at C = 30,000,000, D = 768, N = 256: does not fit",
    ]
    assert gpu.goals(results[:3])[1:] == []
    trained = Result(thirty, "slidex, shared", 7.0, 66_600_000_000, "", (9.0, 5.0))
    words = "goal at C = 30,000,000, D = 768, N = 256: "
    assert gpu.goals([trained]) == [f"{words}trains, as it should: loss 9.000, then 5.000, in 66.6 GB"]
    stalled = trained._replace(losses=(9.0, 9.1))
    assert gpu.goals([stalled]) == [f"{words}runs, but does not learn: loss 9.000, then 9.100"]


def test_the_sizes_that_the_goals_are_about_come_first_and_all_are_there():
    first = gpu.CASES[: len(gpu.GOALS)]
    assert [(case.classes, case.width) for case in first] == list(gpu.GOALS)
    assert {case.rows for case in first} == {256}
    assert len(set(gpu.CASES)) == len(gpu.CASES) == 20


def test_thirty_million_classes_in_bfloat16_with_a_number_a_row_fit_one_gpu():
    """Of 80 GB, by the estimates with which a layer asks the GPU."""
    case = Case(30_000_000, 768, 2048)
    options = gpu.slidex_options(case, mode="shared", pool_size=gpu.POOL)
    assert options.optimizer == "rowwise_adagrad"
    index = make_config_index(settle_sampling(options), case.width, case.classes)
    needed = 2 * case.classes * case.width + memory.index_bytes(index) + memory._RESERVE
    needed += memory.optimizer_bytes(options.optimizer, case.classes, case.width, bias=False)
    needed += memory.step_bytes(options, case.width, case.classes, case.rows, case.rows, torch.bfloat16)
    assert 46e9 < needed < 80e9
    assert gpu.slidex_options(TINY).optimizer == "adam"


def test_thirty_million_classes_would_learn_as_fast_as_a_few_do(monkeypatch):
    """Their rule and rate, on a GPU's path, with rows of bfloat16."""
    take_device_path(monkeypatch)
    monkeypatch.setattr(gpu, "FULL_STATE", 0)
    clock, case = Clock(CPU, steps=2, repeats=3), Case(2000, 64, 16)
    for mode in ("shared", "per_sample"):

        def make(mode=mode):
            return gpu.slidex_step(case, CPU, torch.bfloat16, mode=mode, precision="float32")

        result = gpu.measure(case, f"slidex, {mode}", make, CPU, torch.bfloat16, clock)
        assert "bfloat16, rowwise_adagrad; query" in result.note
        assert result.learns


def test_kernels_are_called_with_what_they_take_and_bytes_are_those_of_their_arrays():
    sizes = gpu_kernels.Sizes(classes=200, width=8, rows=4, slots=6, pool=20, scored=20, features=3)
    calls = gpu_kernels.calls(sizes, CPU, torch.float32)
    assert set(gpu_kernels.HOT) < set(calls)
    block_UD = calls["gather_rows"][0][0][:20]
    assert calls["gather_rows"][1] == 2 * block_UD.nbytes + 20 * (8 + 4)
    grad_NA, target_NA, _ = calls["softmax_loss"][0]
    assert calls["softmax_loss"][1] == 2 * grad_NA.nbytes + target_NA.nbytes + 4 * 4
    active_NA = calls["pair_logits"][0][3]
    rows = len(active_NA.unique()) * 8 * 4
    assert calls["pair_logits"][1] == 4 * 8 * 4 + rows + active_NA.nbytes + 4 * 24
    assert calls["pair_update"][1] == 4 * 8 * 4 + 6 * rows + active_NA.nbytes + 4 * 24
    clock = Clock(CPU, steps=1, repeats=1)
    rate = gpu_kernels.copy_rate(CPU, clock, 1 << 20)
    assert rate > 1e8
    found = gpu_kernels.shares(sizes, CPU, torch.float32, clock, rate)
    assert [share.kernel for share in found] == list(calls)
    for share in found:
        assert share.share == pytest.approx(share.nbytes / share.seconds / rate)
    assert all(len(row) == 4 for row in gpu.kernel_rows(found))


def test_a_kernel_s_share_is_of_the_device_s_time():
    """A launch takes the host longer than the device needs for many a kernel."""
    clock = SimpleNamespace(seconds=lambda _: 1.0, device_seconds=lambda call: (call(), 0.5)[1])
    sizes = gpu_kernels.Sizes(classes=200, width=8, rows=4, slots=6, pool=20, scored=20, features=3)
    for share in gpu_kernels.shares(sizes, CPU, torch.float32, clock, rate=1e3):
        assert share.seconds == 0.5
        assert share.share == share.nbytes / 500


def test_what_hot_kernels_move_is_more_than_a_cache_holds(monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: torch.zeros(()).expand(shape))
    monkeypatch.setattr(gpu_kernels.RowState, "zeros_like", lambda _: None)
    calls = gpu_kernels.calls(gpu_kernels.Sizes(), CPU, torch.float32)
    assert all(calls[name][1] > 2 * 60e6 for name in gpu_kernels.HOT)


def test_launch_overhead_is_what_the_device_waits():
    bound = Result(TINY, "slidex, shared", 0.5, 0, "", None, 500.0, 200.0)
    ahead = Result(TINY, "slidex, per_sample", 1.0, 0, "", None, 400.0, 1000.0, 0.5)
    faiss = Result(TINY, "slidex, shared, FAISS", 3.0, 0, "", None, None, None, 0.75)
    slow = Result(TINY, "dense", 2.0, 10**9, "", None, 4000.0, 1.0)
    assert (bound.host_per_device, bound.waiting_share) == (2.5, 0.6)
    assert (ahead.host_per_device, ahead.waiting_share) == (0.4, 0.0)
    assert (faiss.host_per_device, faiss.waiting_share) == (None, None)
    cells = [row[4:10] for row in gpu.rows_of([bound, ahead, faiss])]
    assert cells == [
        ["0.5", "500", "200", "2.50", "60%", "0.00"],
        ["1", "400", "1000", "0.40", "0%", "0.00"],
        ["3", "", "", "", "", "0.00"],
    ]
    assert gpu_results.launch_goal([bound, ahead, faiss, slow]) == [
        "goal of a device that waits for the host at most 10% of a step: got it in 1 of 2 lines; not slidex, shared at "
        "C = 300, D = 16, N = 8 (60%)"
    ]
    assert gpu_results.launch_goal([faiss, slow]) == []
    assert gpu_results.index_goals([bound, ahead, faiss, slow]) == [
        "goal of query and rehash by our tables in at most 50% of a step: got it in 1 of 1 lines",
        "goal of query and rehash by FAISS in at most 50% of a step: got it in 0 of 1 lines; not slidex, shared, FAISS "
        "at C = 300, D = 16, N = 8 (75%)",
    ]


def test_goals_are_for_our_own_tables():
    million = Case(1_000_000, 768, 256)
    results = [
        Result(million, "dense", 30.0, 8_000_000_000, ""),
        Result(million, "slidex, shared", 5.0, 2_000_000_000, ""),
        Result(million, "slidex, shared, FAISS", 1.0, 2_000_000_000, ""),
    ]
    assert gpu.goals(results)[0].endswith("got 6 times, 0.25 of its memory")


def test_a_whole_run_prints_and_keeps_what_it_measured(monkeypatch, tmp_path):
    """On a GPU's path, but for the CUDA kernels' own table."""
    take_device_path(monkeypatch)
    monkeypatch.setattr(environment, "require_device", lambda _: None)
    monkeypatch.setattr(gpu, "driver", lambda: "none")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "the CPU")
    monkeypatch.setattr(gpu_kernels, "copy_rate", lambda *_: 1e9)
    monkeypatch.setattr(
        gpu_kernels, "shares", lambda *_: [gpu_kernels.Share("pair_logits", 10**6, 1e-3, 0.7)]
    )
    monkeypatch.setattr(gpu, "Clock", lambda device: Clock(device, steps=1, repeats=1))
    monkeypatch.setattr(gpu, "CASES", [TINY, TINY._replace(rows=9)])
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    kept_after, write = [], report.write_results
    monkeypatch.setattr(gpu, "write_results", lambda *of: kept_after.append(len(of[2])) or write(*of))
    result = CliRunner().invoke(gpu.main, ["--device", "cpu"], catch_exceptions=False)
    assert result.exit_code == 0
    lines = [line for line in result.stdout.splitlines() if line.startswith("| 300 |")]
    assert len(lines) == 2 * 7
    assert {line.count(" | ") for line in lines} == {len(gpu.HEADINGS) - 1}
    assert sum("not measured: The 'device' parameter" in line for line in lines) == 4
    assert "| pair_logits | 1.0 | 1000.0 | 70% |" in result.stdout
    assert "goal of 60% of a copy's rate in each hot kernel: got it in 1 of 1\n" in result.stdout
    assert "goal of query and rehash by our tables in at most 50% of a step: got it in" in result.stdout
    assert "goal of a device that waits for the host at most 10% of a step: got it in" in result.stdout
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept["machine"]["gpu"] == "the CPU"
    assert kept_after[:14] == list(range(1, 15))  # what is measured stays, whatever comes
    assert len(kept["results"]) == 14
    shared = next(line for line in kept["results"] if line["way"] == "slidex, shared")
    assert shared["case"] == TINY._asdict()
    assert min(shared[name] for name in ("host_microseconds", "device_microseconds", "index_share")) > 0
    late = CliRunner().invoke(gpu.main, ["--device", "cpu", "--minutes", "0"], catch_exceptions=False)
    assert (
        "not begun within 0 minutes: dense at C = 300, D = 16, N = 8; slidex, shared at C = 300"
        in late.stdout
    )


def test_without_a_gpu_nothing_is_measured(monkeypatch):
    def none(device):
        raise DeviceError("The NVIDIA driver shows no GPU.")

    monkeypatch.setattr(environment, "require_device", none)
    result = CliRunner().invoke(gpu.main, [])
    assert result.exit_code == 1
    assert result.stderr == "Nothing was measured. The NVIDIA driver shows no GPU.\n"
    assert result.stdout == ""
