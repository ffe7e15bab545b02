"""What CUDA kernels need of this machine, and a plain word when a part of it is missing.

Nothing here imports numba-cuda or starts a CUDA context, so that it can be asked anywhere. There is no way round a
missing part: a kernel asked for on a GPU runs on a GPU or fails with one of these messages.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import sys

import numpy as np
import torch

from slidex.errors import DeviceError, MissingExtraError, SlidexError

OLDEST_NUMBA_CUDA = (0, 30)
OLDEST_CAPABILITY = (7, 5)  # what CUDA 13 still compiles for


def simulated() -> bool:
    """Whether Numba runs CUDA kernels in its simulator, on the CPU, for tests (NUMBA_ENABLE_CUDASIM=1)."""
    return os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")


def device_type() -> str:
    """Type of the torch device whose tensors the kernels take: "cuda", and "cpu" in the simulator."""
    return "cpu" if simulated() else "cuda"


def require_numba_cuda() -> None:
    """Raise unless numba-cuda is there and works with the numpy that is there.

    Raises:
        MissingExtraError: It is missing, too old, or numpy is too new for it.
    """
    installed = _installed("numba-cuda")
    if installed is None:
        raise MissingExtraError(
            "The CUDA kernels need the package numba-cuda, which is not installed. Install it with: "
            "pip install 'slidex[cuda]'"
        )
    if _numbers(installed) < OLDEST_NUMBA_CUDA:
        raise MissingExtraError(
            f"The CUDA kernels need numba-cuda {_dotted(OLDEST_NUMBA_CUDA)} or newer. Found {installed}. "
            "Update it with: pip install --upgrade 'slidex[cuda]'"
        )
    if not hasattr(np, "row_stack"):  # numba-cuda up to 0.30 calls it, numpy from 2.5 on lacks it
        raise MissingExtraError(
            f"numba-cuda {installed} needs a numpy older than 2.5. Found {np.__version__}. "
            "Change it with: pip install 'numpy<2.5'"
        )


def require_device(device: torch.device | str = "cuda") -> None:
    """Raise unless kernels can run on a CUDA device; in the simulator, unless numba-cuda is there.

    Args:
        device: ``cuda`` for any, or ``cuda:1`` for one.

    Raises:
        MissingExtraError: As `require_numba_cuda`.
        DeviceError: torch has no CUDA, the driver is missing or too old, or there is no such GPU.
    """
    require_numba_cuda()
    if simulated():
        return
    built_for = _built_for()
    if built_for is None:
        raise DeviceError(
            f"This torch ({torch.__version__}) is built without CUDA. Install a CUDA build of torch: "
            "https://pytorch.org/get-started/locally"
        )
    driver = driver_version()
    if driver is None:
        raise DeviceError(
            f"No NVIDIA driver was found ({_driver_library()} does not load). Install a driver for CUDA "
            f"{_numbers(built_for)[0]} or newer; in a container, start it with access to the GPUs."
        )
    if driver[0] < _numbers(built_for)[0]:
        raise DeviceError(
            f"The NVIDIA driver is too old: it supports CUDA {_dotted(driver)}, torch {torch.__version__} needs CUDA "
            f"{_numbers(built_for)[0]}. Update the driver, or install a torch built for CUDA {driver[0]} and "
            f"numba-cuda[cu{driver[0]}]."
        )
    bindings = _installed("cuda-bindings")
    if bindings is not None and _numbers(bindings)[0] > driver[0]:
        raise DeviceError(
            f"numba-cuda is installed for CUDA {_numbers(bindings)[0]} (cuda-bindings {bindings}). The NVIDIA driver "
            f"supports CUDA {_dotted(driver)}. Update the driver, or install with: "
            f"pip install 'numba-cuda[cu{driver[0]}]' 'cuda-bindings=={driver[0]}.*'"
        )
    _require_visible(torch.device(device))


def _require_visible(device: torch.device) -> None:
    count = torch.cuda.device_count()
    if count == 0:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = (
            "" if visible is None else f" CUDA_VISIBLE_DEVICES is {visible!r}: unset it to see all of them."
        )
        raise DeviceError(f"The NVIDIA driver shows no GPU.{hidden} Check it with: nvidia-smi")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        names = ", ".join(f"cuda:{i}" for i in range(count))
        raise DeviceError(f"There is no GPU '{device}'. The driver shows {names}.")
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_CAPABILITY:
        raise DeviceError(
            f"The GPU cuda:{index} ({torch.cuda.get_device_name(index)}) has compute capability {_dotted(capability)}. "
            f"The kernels need {_dotted(OLDEST_CAPABILITY)} or newer."
        )


def driver_version() -> tuple[int, int] | None:
    """The newest CUDA version the installed NVIDIA driver supports, such as (13, 0); None without a driver."""
    try:
        library = ctypes.CDLL(_driver_library())
        version = ctypes.c_int()
        status = library.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return (version.value // 1000, version.value % 1000 // 10) if status == 0 else None


def gpus() -> str | list[dict[str, str | int]]:
    """Name, memory and free memory of each GPU, in bytes, or why there is none."""
    if not torch.cuda.is_available():
        return "none" if _built_for() else "none (this torch is built without CUDA)"
    return [
        {
            "name": torch.cuda.get_device_name(index),
            "memory_bytes": torch.cuda.get_device_properties(index).total_memory,
            "free_bytes": torch.cuda.mem_get_info(index)[0],
        }
        for index in range(torch.cuda.device_count())
    ]


def driver() -> str:
    """What the NVIDIA driver supports, in words."""
    version = driver_version()
    return "none" if version is None else f"for CUDA {_dotted(version)}"


def readiness() -> str:
    """Whether kernels can run on a GPU here, or what to do for it."""
    try:
        require_device()
    except SlidexError as error:
        return f"no: {error}"
    return "in the simulator" if simulated() else "yes"


def _installed(name: str) -> str | None:
    """Version of a distribution; None where it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _built_for() -> str | None:
    return torch.version.cuda


def _driver_library() -> str:
    return "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
