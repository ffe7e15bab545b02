"""The plan against the step times it was fitted to, the report on this machine and on stranger ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidex import doctor
from slidex.doctor import MODES, NEAR_TIE, format_report, has_native_bf16, plan, report
from slidex.errors import ConfigError, DeviceError


@pytest.mark.parametrize(
    ("mode", "native_bf16", "low", "high"),
    [
        ("exact", False, 2100, 2250),  # 2,177 ms measured
        ("exact", True, 540, 610),  # 579 ms
        ("per_sample", False, 43, 91),  # 43 (Zipf) to 71 ms (uniform), and 14 ms of selection
        ("shared", True, 15, 30),  # products, gather and update of 16,384 rows, and 3 ms of selection
    ],
)
def test_plan_reproduces_the_steps_it_was_fitted_to(mode, native_bf16, low, high):
    costs = plan(670_091, 128, 256, pool_size=16_384, active=1000, native_bf16=native_bf16).costs
    assert low < costs[mode].milliseconds < high


@pytest.mark.parametrize(
    ("num_classes", "batch_size", "native_bf16", "mode"),
    [
        (4_000, 256, False, "exact"),
        (8_000, 256, False, "shared"),
        (8_000, 256, True, "exact"),  # 6.9 ms, encoder included, two threads; shared 6.2 ms
        (16_000, 256, True, "shared"),  # 6 ms, exact 11 ms
        (16_000, 8, False, "per_sample"),
        (145_000, 256, True, "shared"),
        (670_091, 256, False, "shared"),
        (10_000_000, 1, True, "per_sample"),
    ],
)
def test_plan_chooses_by_size(num_classes, batch_size, native_bf16, mode):
    chosen = plan(num_classes, 128, batch_size, native_bf16=native_bf16)
    assert chosen.mode == mode
    assert chosen.reason.startswith(f"{mode}: ")


def test_plan_counts_bytes():
    costs = plan(1000, 8, 4, pool_size=50, active=10, num_tables=3).costs
    hidden = 2 * 4 * 4 * 8
    for cost in costs.values():
        assert (cost.weight_bytes, cost.optimizer_bytes) == (32_000, 64_000)
    assert [costs[mode].index_bytes for mode in MODES] == [0, 24_000, 24_000]
    assert [costs[mode].activation_bytes - hidden for mode in MODES] == [
        4 * 4 * 1000,
        4 * (4 * 54 + 2 * 54 * 8),
        24 * 4 * 10,
    ]
    assert costs["exact"].total_bytes == 32_000 + 64_000 + hidden + 16_000


@pytest.mark.parametrize(
    ("optimizer", "moments"), [("adam", 16_000), ("rowwise_adam", 9_000), ("rowwise_adagrad", 1_000)]
)
def test_plan_counts_the_state_of_the_optimizer(optimizer, moments):
    for cost in plan(1000, 8, 4, optimizer=optimizer).costs.values():
        assert cost.optimizer_bytes == 4 * moments
    shown = report(1000, 8, 4, optimizer=optimizer)["plan"]["costs"]["shared"]["optimizer_bytes"]
    assert shown == 4 * moments
    with pytest.raises(ConfigError, match="'optimizer' parameter must be one of"):
        plan(1000, 8, 4, optimizer="sgd")


def test_plan_leaves_out_what_does_not_fit():
    free = plan(5_000, 128, 2048)
    assert (free.mode, free.fits) == ("exact", True)
    tight = plan(5_000, 128, 2048, available_bytes=free.costs["exact"].total_bytes - 1)
    assert (tight.mode, tight.fits) == ("per_sample", True)
    assert tight.reason.endswith("; exact and shared would not fit in memory.")
    assert plan(5_000, 128, 2048, available_bytes=free.costs["exact"].total_bytes).mode == "exact"
    nothing = plan(100_000_000, 128, 256, available_bytes=2**30)
    assert (nothing.mode, nothing.fits) == ("per_sample", False)
    assert "of 1.0 GiB available" in nothing.reason


sizes = st.integers(1, 10**8)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    num_classes=sizes, hidden_width=st.integers(1, 4096), batch_size=st.integers(1, 10**5), bf16=st.booleans()
)
def test_the_chosen_mode_is_never_far_from_the_fastest(num_classes, hidden_width, batch_size, bf16):
    chosen = plan(num_classes, hidden_width, batch_size, native_bf16=bf16)
    fastest = min(cost.milliseconds for cost in chosen.costs.values())
    assert 0 < fastest <= chosen.costs[chosen.mode].milliseconds <= NEAR_TIE * fastest
    doubled = plan(2 * num_classes, hidden_width, batch_size, native_bf16=bf16)
    assert all(doubled.costs[m].milliseconds >= chosen.costs[m].milliseconds for m in MODES)


@pytest.mark.parametrize(
    "change", [{"num_classes": 0}, {"batch_size": -1}, {"hidden_width": 1.5}, {"active": 0}]
)
def test_plan_names_a_bad_size(change):
    with pytest.raises(
        ConfigError, match=f"The '{next(iter(change))}' parameter of plan must be an integer >= 1"
    ):
        plan(**({"num_classes": 10, "hidden_width": 8, "batch_size": 4} | change))


def test_report_is_json_and_knows_this_machine():
    result = report(145_000, 64, 32)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert "unknown" not in json.dumps(result) or sys.platform != "linux"
    assert result["cpu"]["usable_cores"] >= 1
    assert result["threads"]["numba_layer"] in ("omp", "tbb", "workqueue")
    assert result["plan"]["mode"] in MODES
    assert "plan" not in report()
    text = format_report(result)
    assert "plan for 145,000 classes, width 64, batch 32" in text
    assert all(result["versions"][name] in text for name in ("slidex", "torch", "numba"))
    assert result["plan"]["reason"] in text


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16\n", True),
        ("flags : fpu amx_bf16 amx_tile\n", True),
        ("Features : fp asimd bf16\n", True),
        ("flags : fpu avx2 avx512f\n", False),
        ("processor : 0\n", None),
        (None, None),
    ],
)
def test_bf16_is_read_from_the_cpu_flags(tmp_path, monkeypatch, text, answer):
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(doctor, "_CPUINFO", tmp_path / "cpuinfo")
    assert has_native_bf16() is answer
    precision = report(1000)["plan"]["precision"]
    assert precision == ("bfloat16" if answer else "float32")
    assert report(1000, dtype="float32")["plan"]["precision"] == "float32"


def test_a_container_limit_lowers_memory(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal:    8000 kB\nMemFree:   1000 kB\nMemAvailable:   6000 kB\n")
    monkeypatch.setattr(doctor, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(doctor, "_CGROUP", tmp_path)
    for limit, expected in (("max", (8_192_000, 6_144_000)), ("3000000", (3_000_000, 2_000_000))):
        (tmp_path / "memory.max").write_text(limit + "\n")
        (tmp_path / "memory.current").write_text("1000000\n")
        memory = report()["memory"]
        assert (memory["total_bytes"], memory["available_bytes"]) == expected


def test_a_system_that_tells_only_total_memory_is_planned_without_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_MEMINFO", tmp_path / "absent")
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 100}[name])
    result = report(100_000_000)
    assert result["memory"] == {"total_bytes": 409_600, "available_bytes": "unknown (no /proc/meminfo)"}
    assert result["plan"]["fits"]


def test_a_system_without_any_of_it_still_gets_a_whole_report(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("not on this system")

    for name in ("_CPUINFO", "_MEMINFO", "_CGROUP"):
        monkeypatch.setattr(doctor, name, tmp_path / "absent")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "sysconf", refuse, raising=False)
    monkeypatch.setattr(doctor.shutil, "disk_usage", refuse)
    monkeypatch.setattr(doctor.torch.backends.cpu, "get_cpu_capability", refuse)
    result = report(1000)
    assert result["memory"] == result["disk_free_bytes"] == result["cpu"]["simd"]
    assert result["memory"] == "unknown (OSError: not on this system)"
    assert result["cpu"]["native_bf16"].startswith("unknown")
    assert result["cpu"]["usable_cores"] == os.cpu_count()
    assert result["plan"]["mode"] == "exact"
    assert "unknown (OSError: not on this system)" in format_report(result)


def test_optional_packages_are_reported_by_the_wheel_that_brings_them(monkeypatch):
    present = {"faiss-cpu": "1.13.2", "faiss-gpu-cuvs": "1.14.0", "numba-cuda": "0.30"}

    def version(name):
        if name in present:
            return present[name]
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: None)
    assert "simhash" in report()["indexes"].split(", ")
    assert report()["faiss"].startswith("faiss-cpu 1.13.2, faiss-gpu-cuvs 1.14.0 (keep only one")
    assert report()["numba_cuda"] == "numba-cuda 0.30"
    present.clear()
    assert report()["faiss"] == report()["numba_cuda"] == "not installed"
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: object())
    assert report()["faiss"] == "installed, from an unknown wheel"


def test_gpus_are_listed_with_their_memory(monkeypatch):
    class Device:
        name, total_memory = "Test GPU", 16 * 2**30

    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(doctor.torch.cuda, "get_device_properties", lambda _: Device)
    monkeypatch.setattr(doctor.torch.cuda, "get_device_name", lambda _: Device.name)
    monkeypatch.setattr(doctor.torch.cuda, "mem_get_info", lambda _: (15 * 2**30, 16 * 2**30))
    result = report()
    assert result["gpu"] == [{"name": "Test GPU", "memory_bytes": 16 * 2**30, "free_bytes": 15 * 2**30}]
    assert "Test GPU (16.0 GiB, 15.0 GiB free)" in format_report(result)


def test_the_report_says_whether_cuda_kernels_can_run(monkeypatch):
    monkeypatch.setattr(doctor.environment, "driver_version", lambda: (13, 0))
    monkeypatch.setattr(doctor.environment, "require_device", lambda: None)
    monkeypatch.setattr(doctor.environment, "simulated", lambda: False)
    result = report()
    assert (result["cuda_driver"], result["cuda_kernels"]) == ("for CUDA 13.0", "yes")

    def refuse():
        raise DeviceError("No NVIDIA driver was found. Install one.")

    monkeypatch.setattr(doctor.environment, "driver_version", lambda: None)
    monkeypatch.setattr(doctor.environment, "require_device", refuse)
    result = report()
    assert result["cuda_driver"] == "none"
    assert "cuda kernels            no: No NVIDIA driver was found. Install one." in format_report(result)


def test_a_report_is_quick():
    report()  # compiles the probe kernel once, or finds it in the cache
    used = time.process_time()
    report(670_091)
    assert time.process_time() - used < 0.5


def test_report_rejects_an_unknown_dtype():
    with pytest.raises(ConfigError, match="The 'dtype' parameter of report must be"):
        report(dtype="int8")


def test_a_fresh_process_reports():
    command = "from slidex import doctor; print(doctor.format_report(doctor.report(1000)))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "numba layer" in done.stdout
