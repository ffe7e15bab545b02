"""Whatever is missing for CUDA has a message of its own that says what to do, and nothing falls back to the CPU."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import numpy as np
import pytest
import torch

from slidex import kernels
from slidex.errors import DeviceError, MissingExtraError
from slidex.kernels.cuda import environment


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A machine on which everything is in order; a test changes one thing of it."""
    state: dict[str, object] = {
        "numba-cuda": "0.30.4",
        "cuda-bindings": "13.0.3",
        "torch": "13.0",
        "driver": (13, 0),
        "gpus": 2,
        "capability": (9, 0),
        "free": 20 * 2**30,
    }

    def version(name: str) -> object:
        if state[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return state[name]

    monkeypatch.delenv("NUMBA_ENABLE_CUDASIM", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(environment.importlib.metadata, "version", version)
    monkeypatch.setattr(environment, "_built_for", lambda: state["torch"])
    monkeypatch.setattr(environment, "driver_version", lambda: state["driver"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: state["gpus"])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: state["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Test GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (state["free"], 24 * 2**30))
    return state


def test_a_machine_in_order_gets_the_kernels(machine: dict[str, object]) -> None:
    for device in ("cuda", "cuda:1", torch.device("cuda", 0)):
        assert kernels.get(device).__name__ == "slidex.kernels.cuda"
    machine["torch"], machine["driver"] = "12.8", (13, 0)  # a driver serves older CUDA versions
    machine["cuda-bindings"] = "12.9.1"
    assert kernels.get("cuda").__name__ == "slidex.kernels.cuda"


@pytest.mark.parametrize(
    ("part", "value", "kind", "message"),
    [
        (
            "numba-cuda",
            None,
            MissingExtraError,
            r"numba-cuda, which is not installed.*pip install 'slidex\[cuda\]'",
        ),
        ("numba-cuda", "0.22.1", MissingExtraError, r"numba-cuda 0\.30 or newer\. Found 0\.22\.1.*--upgrade"),
        ("torch", None, DeviceError, r"This torch .* is built without CUDA\. Install a CUDA build"),
        ("driver", None, DeviceError, r"No NVIDIA driver was found.*CUDA 13 or newer"),
        (
            "driver",
            (12, 4),
            DeviceError,
            r"too old: it supports CUDA 12\.4.*needs CUDA 13.*torch built for CUDA 12 and numba-cuda\[cu12\]",
        ),
        ("gpus", 0, DeviceError, r"shows no GPU\. Check it with: nvidia-smi"),
        ("gpus", 1, DeviceError, r"no GPU 'cuda:1'\. The driver shows cuda:0\."),
        ("capability", (7, 0), DeviceError, r"cuda:1 \(Test GPU\) has compute capability 7\.0.*need 7\.5"),
    ],
)
def test_a_missing_part_is_named(
    machine: dict[str, object], part: str, value: object, kind: type[Exception], message: str
) -> None:
    machine[part] = value
    with pytest.raises(kind, match=message):
        kernels.get("cuda:1")


def test_a_numba_cuda_for_a_newer_cuda_than_the_driver_s_is_named(machine: dict[str, object]) -> None:
    """As ``slidex[cuda]`` brings it beside a torch for CUDA 12."""
    machine["torch"], machine["driver"] = "12.8", (12, 8)
    with pytest.raises(
        DeviceError,
        match=r"CUDA 13 \(cuda-bindings 13\.0\.3\).*CUDA 12\.8.*'numba-cuda\[cu12\]' 'cuda-bindings==12",
    ):
        kernels.get("cuda")
    machine["cuda-bindings"] = "12.9.1"
    assert kernels.get("cuda").__name__ == "slidex.kernels.cuda"


def test_a_numpy_too_new_for_numba_cuda_is_named(
    machine: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(np, "row_stack")
    monkeypatch.setattr(np, "__version__", "2.5.2")
    with pytest.raises(
        MissingExtraError, match=r"older than 2\.5\. Found 2\.5\.2\. .*pip install 'numpy<2\.5'"
    ):
        kernels.get("cuda")


def test_hidden_gpus_are_named(machine: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    machine["gpus"] = 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(DeviceError, match=r"shows no GPU\. CUDA_VISIBLE_DEVICES is '': unset it"):
        kernels.get("cuda")


def test_the_driver_is_asked_for_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def __init__(self, name: str) -> None:
            assert name == environment._driver_library()

        def cuDriverGetVersion(self, pointer: object) -> int:  # noqa: N802  (the driver's name)
            pointer._obj.value = 12080
            return 0

    monkeypatch.setattr(environment.ctypes, "CDLL", Library)
    assert environment.driver_version() == (12, 8)
    monkeypatch.setattr(Library, "cuDriverGetVersion", lambda *_: 999)
    assert environment.driver_version() is None
    monkeypatch.setattr(environment.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert environment.driver_version() is None


def test_without_numba_cuda_the_rest_of_slidex_works() -> None:
    script = (
        "import importlib.metadata as m, sys\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name == 'numba-cuda': raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "import slidex.cli, slidex.kernels\n"
        "slidex.kernels.get('cpu')\n"
        "assert not any('cuda.launch' in name for name in sys.modules)\n"
        "try: slidex.kernels.get('cuda')\n"
        "except slidex.errors.MissingExtraError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "pip install 'slidex[cuda]'" in done.stdout, done.stderr
