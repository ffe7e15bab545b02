"""What a launch hands to numba-cuda: pointers of torch on torch's stream, compiled once for each set of types."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from slidex import kernels
from slidex.errors import DeviceError, MissingExtraError
from slidex.kernels.cuda import environment
from tests.kernels.cases import Problem, Shape
from tests.kernels.cuda.running import compile_ptx, recorded_launches

pytest.importorskip("numba_cuda", reason="numba-cuda is installed on Linux x86-64 only (extra dev)")

from numba.cuda import api, dispatcher
from numba.cuda.cudadrv import devices

from slidex.kernels.cuda import launch


class Recorder:
    """In place of `numba.cuda`: remembers what it is asked to compile and to launch."""

    def __init__(self) -> None:
        self.compiled: list[Any] = []
        self.launched: list[tuple[Any, tuple[Any, ...]]] = []
        self.failure: Exception | None = None

    def jit(self, signature: Any, lto: bool) -> Any:
        assert lto is False
        if self.failure:
            raise self.failure
        self.compiled.append(signature)
        return lambda _: self

    def __getitem__(self, configuration: Any) -> Any:
        return lambda *arguments: self.launched.append((configuration, arguments))

    def from_cuda_array_interface(
        self, interface: dict[str, Any], owner: object, sync: bool
    ) -> dict[str, Any]:
        assert owner is None
        assert sync is False
        return interface

    def external_stream(self, pointer: int) -> tuple[str, int]:
        return "stream", pointer


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(launch, "cuda", recorder)
    monkeypatch.setattr(launch, "_views", {})
    monkeypatch.setattr(launch, "_streams", {})
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=77))
    return recorder


def _kernel() -> Any:
    return launch.Kernel(lambda *_: None)


def test_a_launch_passes_pointers_on_torchs_stream(recorder: Recorder) -> None:
    x, y, none = torch.zeros(3, 4), torch.zeros(5, dtype=torch.bfloat16), torch.empty(0, 2, dtype=torch.int64)
    _kernel().launch((2, 3), 64, x, 7, (y, none), (0.1, 0.2), shared=256)
    ((configuration, arguments),) = recorder.launched
    assert configuration == ((2, 3), 64, ("stream", 77), 256)
    first, seven, (bits, empty), floats = arguments
    assert first == {
        "shape": (3, 4),
        "strides": None,
        "typestr": "<f4",
        "data": (x.data_ptr(), False),
        "version": 3,
        "stream": None,
    }
    assert (bits["typestr"], bits["data"]) == ("<u2", (y.data_ptr(), False))
    assert (empty["typestr"], empty["shape"]) == ("<i8", (0, 2))
    assert seven == 7
    assert floats == (np.float32(0.1), np.float32(0.2))
    assert [type(number) for number in floats] == [np.float32] * 2


def test_the_default_stream_is_numbas(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    _kernel().launch(1, 32, torch.zeros(1))
    assert recorder.launched[0][0][2] == 0


def test_a_kernel_is_compiled_once_for_each_set_of_types(recorder: Recorder) -> None:
    kernel, other = _kernel(), _kernel()
    for size in (1, 2, 3):
        kernel.launch(1, 32, torch.zeros(size), size)
    assert len(recorder.compiled) == 1
    kernel.launch(1, 32, torch.zeros(1).half(), 1)
    kernel.launch(1, 32, torch.zeros(1, 1), 1)
    kernel.launch(1, 32, torch.zeros(1), 1.0)
    other.launch(1, 32, torch.zeros(1), 1)
    assert len(recorder.compiled) == 5
    assert len(recorder.launched) == 7


def test_views_of_the_same_memory_are_made_once_and_never_too_many(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.zeros(6)
    kernel = _kernel()
    for _ in range(3):
        kernel.launch(1, 32, x)
    kernel.launch(1, 32, x.view(2, 3))
    kernel.launch(1, 32, x.view(torch.int32))
    views = [arguments[0] for _, arguments in recorder.launched]
    assert views[0] is views[1] is views[2]
    assert views[3]["shape"] == (2, 3)
    assert views[4]["typestr"] == "<i4"
    monkeypatch.setattr(launch, "_MOST_VIEWS", 3)
    kernel.launch(1, 32, x[:3])
    assert len(launch._views) == 1


def test_an_empty_grid_launches_nothing(recorder: Recorder) -> None:
    _kernel().launch(0, 32, torch.zeros(1))
    _kernel().launch((4, 0), 32, torch.zeros(1))
    assert recorder.compiled == recorder.launched == []


def test_a_missing_compiler_library_is_named(recorder: Recorder) -> None:
    recorder.failure = RuntimeError("libnvvm.so.4: cannot open shared object file")
    with pytest.raises(MissingExtraError, match=r"libnvvm\.so\.4.*pip install 'slidex\[cuda\]'"):
        _kernel().launch(1, 32, torch.zeros(1))
    recorder.failure = RuntimeError("Failure finding libnvJitLink.so")
    with pytest.raises(MissingExtraError, match="or set CUDA_HOME to a CUDA toolkit"):
        _kernel().launch(1, 32, torch.zeros(1))
    recorder.failure = TypeError("something else")
    with pytest.raises(TypeError, match="something else"):
        _kernel().launch(1, 32, torch.zeros(1))


@pytest.mark.parametrize(
    "said",
    ["CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "ptxas: Unsupported .version 9.3; current version is '9.0'"],
)
def test_a_driver_older_than_the_compiler_is_named(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    """Of the same major version, which `slidex.kernels.cuda.environment` lets pass."""
    monkeypatch.setattr(environment, "driver_version", lambda: (13, 0))
    monkeypatch.setattr(launch, "driver_version", lambda: (13, 0))
    recorder.failure = RuntimeError(said)
    with pytest.raises(
        DeviceError, match=r"driver \(it is for CUDA 13\.0\).*older.*pip install 'cuda-toolkit==13\.0\.\*'"
    ):
        _kernel().launch(1, 32, torch.zeros(1))


@pytest.mark.parametrize(
    "name", ["embedding_bag", "softmax_loss", "pair_logits", "pair_update", "rows_update"]
)
def test_what_numba_hands_over_is_what_the_compiled_kernel_takes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Number and kind of all parameters, also of empty arrays and of tuples: the last step before a launch."""
    given: list[tuple[Any, ...]] = []
    with recorded_launches() as recorded:
        record = launch.Kernel.launch
        monkeypatch.setattr(
            launch.Kernel, "launch", lambda *a, shared=0: given.append(a[3:]) or record(*a, shared=shared)
        )
        getattr(kernels.cuda, name)(*Problem(Shape(optional=False)).arguments(name, torch.float32))
    # Without a driver there is no context, which an array of Numba's only keeps.
    monkeypatch.setattr(api, "current_context", lambda: None)
    monkeypatch.setattr(devices, "get_context", lambda: None)
    monkeypatch.setattr(launch.cuda, "from_cuda_array_interface", api.from_cuda_array_interface.__wrapped__)
    monkeypatch.setattr(launch, "_views", {})
    compiled = SimpleNamespace(extensions=[])
    compiled._prepare_args = functools.partial(dispatcher._Kernel._prepare_args, compiled)
    handed: list[Any] = []
    for kind, value in zip(
        recorded[0].signature.args, launch._converted(given[0], launch._view), strict=True
    ):
        compiled._prepare_args(kind, value, 0, [], handed)
    (parameters,) = re.findall(r"\.entry \w+\(([^)]*)\)", compile_ptx(recorded[0], (9, 0)))
    kinds = [
        "f32" if isinstance(x, ctypes.c_float) else {int: "u64", ctypes.c_int64: "u64"}[type(x)]
        for x in handed
    ]
    assert kinds == re.findall(r"\.param \.(\w+) ", parameters)


@pytest.mark.parametrize("name", ["pair_update", "rows_update"])
@pytest.mark.parametrize(("optimizer", "parts"), [("adam", 6), ("rowwise_adam", 1), ("rowwise_adagrad", 1)])
def test_a_wide_row_is_updated_by_several_warps_where_columns_are_independent(
    name: str, optimizer: str, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class that all rows of a batch have is else one warp's work, for which all others wait."""
    laid_out: list[tuple[tuple[int, int], int, int]] = []
    arguments = Problem(Shape(width=700, optimizer=optimizer)).arguments(name, torch.float32)
    with recorded_launches():
        monkeypatch.setattr(
            launch.Kernel,
            "launch",
            lambda _, blocks, threads, *__, shared: laid_out.append((blocks, threads, shared)),
        )
        getattr(kernels.cuda, name)(*arguments)
    (((_, columns), threads, shared),) = laid_out
    assert (columns, threads) == (parts, 128)
    assert shared == 4 * 4 * (128 if parts > 1 else 700) <= 48 << 10
