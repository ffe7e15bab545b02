"""What `make gpu-check` would run, without a GPU: every part, each with what it needs, and no longer than it may."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from slidex.errors import DeviceError
from slidex.kernels.cuda import environment
from tests.kernels.cases import KERNELS
from tests.kernels.cuda import check

PARTS = ("suites", "memory accesses", "benchmark")


class Machine:
    """In place of `subprocess.run`: remembers what ran, and how; each part takes some seconds of a clock of its own."""

    def __init__(self) -> None:
        self.ran: dict[str, dict[str, Any]] = {}
        self.statuses = dict.fromkeys(PARTS, 0)
        self.takes = dict.fromkeys(PARTS, 30.0)
        self.now = 1000.0

    def run(self, words: list[str], **options: Any) -> SimpleNamespace:
        part = "memory accesses" if "compute-sanitizer" in words[0] else "suites"
        part = "benchmark" if "benchmarks.gpu" in words else part
        self.ran[part] = {"words": words, **options}
        self.now += min(self.takes[part], options["timeout"])
        if self.takes[part] > options["timeout"]:
            raise subprocess.TimeoutExpired(words, options["timeout"])
        return SimpleNamespace(returncode=self.statuses[part])


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(environment, "simulated", lambda: False)
    monkeypatch.setattr(environment, "require_device", lambda _: None)
    monkeypatch.setattr(check.shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    monkeypatch.setattr(check.subprocess, "run", machine.run)
    monkeypatch.setattr(check.time, "monotonic", lambda: machine.now)
    return machine


def test_all_parts_run_and_pass(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main() == 0
    assert tuple(machine.ran) == PARTS
    assert capsys.readouterr().out.endswith("suites: passed\nmemory accesses: passed\nbenchmark: passed\n")
    suites = machine.ran["suites"]["words"]
    for name in (
        "on_device",
        "on_device_hash_index",
        "on_device_head",
        "on_device_ops",
        "on_device_training",
    ):
        assert any(word.endswith(f"{name}.py") for word in suites), name


@pytest.mark.parametrize("failing", PARTS)
def test_a_part_that_fails_keeps_none_from_running(
    machine: Machine, failing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.statuses[failing] = 7
    assert check.main() == 1
    assert tuple(machine.ran) == PARTS
    assert f"\n{failing}: failed with status 7\n" in capsys.readouterr().out


def test_all_of_it_takes_ten_minutes_at_most(machine: Machine) -> None:
    check.main()
    (minutes,) = (word for word in machine.ran["benchmark"]["words"] if word[0].isdigit())
    assert float(minutes) == pytest.approx((check.SECONDS - 60 - check.ENDING) / 60, abs=0.01)
    machine.takes = dict.fromkeys(PARTS, 10_000.0)
    machine.now = 0.0
    assert check.main() == 1
    assert machine.now <= check.SECONDS < 600
    assert machine.ran["benchmark"]["timeout"] > 120


def test_a_part_that_hangs_is_ended(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.takes["memory accesses"] = 1e4
    assert check.main() == 1
    assert "memory accesses: ended after 150 s, as it had not by itself\n" in capsys.readouterr().out


def test_memory_is_checked_tensor_by_tensor(machine: Machine) -> None:
    """Blocks that torch's allocator shares among tensors would hide a step over the end of one."""
    check.main()
    ran = machine.ran["memory accesses"]
    assert ran["env"]["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert "PYTORCH_NO_CUDA_MEMORY_CACHING" not in machine.ran["benchmark"]["env"]
    words = " ".join(ran["words"])
    assert words.startswith(
        "/usr/bin/compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 99 "
    )


def test_the_small_suite_has_every_kernel() -> None:
    """Also those of the hash index, and none that asks whether the allocator waits."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only"]
    words += [*(str(path) for path in check.SUITES if "training" not in path.name), "-k", check.SMALL]
    done = subprocess.run(words, cwd=check.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    for name in KERNELS:
        assert f"as_exact_as_torch[{name}-adam-plain-torch.float32]" in done.stdout
    assert "waits_for_nothing" not in done.stdout
    assert done.stdout.count("same_codes") == 11


def test_without_a_sanitizer_the_check_has_not_passed(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check.shutil, "which", lambda *_, **__: None)
    assert check.main() == 1
    assert "memory accesses: not checked: there is no compute-sanitizer" in capsys.readouterr().out
    assert list(machine.ran) == ["suites", "benchmark"]


def test_the_toolkit_is_found(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """numba-cuda finds libnvvm by CUDA_HOME; compute-sanitizer may be in the toolkit without being on the PATH."""
    for name in ("nvcc", "compute-sanitizer"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text("")
        (tmp_path / "bin" / name).chmod(0o755)
    nvcc, there = str(tmp_path / "bin" / "nvcc"), str(tmp_path / "bin" / "compute-sanitizer")

    def which(name: str, path: str | None = None) -> str | None:
        if path is None:
            return nvcc if name == "nvcc" else None
        return there if str(tmp_path / "bin") in path.split(os.pathsep) else None

    monkeypatch.setattr(check.shutil, "which", which)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        os.environ.pop(name, None)
    assert check.main() == 0
    assert machine.ran["benchmark"]["env"]["CUDA_HOME"] == str(tmp_path)
    assert machine.ran["memory accesses"]["words"][0] == there
    os.environ["CUDA_HOME"] = "/opt/cuda"
    assert check.toolkit() == Path("/opt/cuda")
    check.main()
    assert machine.ran["suites"]["env"]["CUDA_HOME"] == "/opt/cuda"


def test_plugins_and_warnings_of_the_machine_fail_nothing(machine: Machine) -> None:
    check.main()
    suites = machine.ran["suites"]
    assert suites["env"]["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] == "1"
    at = suites["words"].index("-W")
    assert suites["words"][at + 1] == "default"


def test_numpy_from_2_5_on_gets_what_numba_cuda_calls(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(np, "row_stack")
    os.environ["PYTHONPATH"] = "/somewhere"
    seen = []
    run = machine.run

    def looked_at(words: list[str], **options: Any) -> SimpleNamespace:
        folder, rest = options["env"]["PYTHONPATH"].split(os.pathsep, 1)
        seen.append((Path(folder, "sitecustomize.py").read_text(), rest))
        return run(words, **options)

    monkeypatch.setattr(check.subprocess, "run", looked_at)
    assert check.main() == 0
    assert vars(np)["row_stack"] is np.vstack
    assert seen == [(check.ROW_STACK, "/somewhere")] * 3


def test_without_a_gpu_nothing_runs(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(device: str) -> None:
        raise DeviceError("The NVIDIA driver shows no GPU.")

    monkeypatch.setattr(environment, "require_device", none)
    assert check.main() == 1
    assert capsys.readouterr().err == "No GPU was checked. The NVIDIA driver shows no GPU.\n"
    assert machine.ran == {}


def test_another_package_called_tests_is_not_in_the_way(tmp_path: Path) -> None:
    """Some wheels put one into site-packages, where it would hide a folder without ``__init__.py``."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").write_text("")
    surroundings = os.environ | {"PYTHONPATH": str(tmp_path), "NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.cuda.check"],
        cwd=check.ROOT,
        env=surroundings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == "No GPU was checked. NUMBA_ENABLE_CUDASIM is set: unset it.\n"
