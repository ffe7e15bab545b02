"""The one door to numba-cuda: kernels compiled for the types they are called with, launched on torch's stream.

Kernel modules take `cuda` from here and mark kernels with `kernel`. A launch copies nothing and waits for nothing: it
hands over torch's pointers (the CUDA array interface) on torch's current stream. bfloat16 arrays, which Numba does not
know, travel as their bits (uint16); `slidex.kernels.cuda.device` reads and writes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from slidex.errors import DeviceError, MissingExtraError
from slidex.kernels.cuda.environment import driver, driver_version, require_numba_cuda, simulated

require_numba_cuda()

import numba  # noqa: E402  (a missing package has its own message)
import numba.cuda  # noqa: E402
from numba import types  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    Argument = torch.Tensor | int | float | tuple["Argument", ...]

__all__ = ["WARP", "Kernel", "blocks_for", "cuda", "float32", "kernel", "types"]

cuda: Any = numba.cuda
"""The module with `threadIdx`, `syncthreads` and the rest, under the one name that the simulator exchanges."""

float32 = types.float32
"""Element type for `cuda.shared.array`, where numpy's would not do in the simulator."""

WARP = 32
_MOST_VIEWS = 4096  # a view is some hundred bytes
_TYPES = {
    torch.float32: types.float32,
    torch.float16: types.float16,
    torch.bfloat16: types.uint16,
    torch.int64: types.int64,
    torch.int32: types.int32,
    torch.int16: types.int16,
    torch.uint8: types.uint8,
    torch.bool: types.boolean,
}
_TYPESTR = {dtype: np.dtype(str(kind)).str for dtype, kind in _TYPES.items()}

_SIMULATED = simulated()
if not _SIMULATED:
    # Most grids of a small batch are small; a warning for each launch would say nothing new.
    numba.config.CUDA_LOW_OCCUPANCY_WARNINGS = 0  # pyrefly: ignore[missing-attribute]


class Kernel:
    """A CUDA kernel.

    Args:
        function: Its Python function. Float arguments arrive as float32, integers as int64, tensors as C-contiguous
            arrays of their dtype.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self.name = function.__name__.lstrip("_")
        self._compiled: dict[tuple[object, ...], Any] = {}

    def signature(self, arguments: tuple[Argument, ...]) -> Any:
        """The Numba signature that a launch with these arguments uses."""
        return types.void(*map(_type, arguments))

    def launch(
        self, blocks: int | tuple[int, ...], threads: int, *arguments: Argument, shared: int = 0
    ) -> None:
        """Enqueue the kernel on torch's current stream of the arguments' device.

        Args:
            blocks: Grid size, up to three numbers; nothing happens where one is 0.
            threads: Threads a block, a multiple of `WARP`.
            arguments: Contiguous tensors on one device, integers, floats, and tuples of these.
            shared: Bytes of dynamic shared memory a block.

        Raises:
            MissingExtraError: A library that compiles kernels is missing.
            DeviceError: The driver is too old for what that library makes.
        """
        grid = (blocks,) if isinstance(blocks, int) else blocks
        if 0 in grid:
            return
        if _SIMULATED:
            cuda.jit(self.function)[grid, threads, 0, shared](*_converted(arguments, _simulated_view))
            return
        device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
        key = device.index, _key(arguments)
        with torch.cuda.device(device):
            compiled = self._compiled.get(key) or self._compile(key, arguments)
            stream = _stream(torch.cuda.current_stream(device).cuda_stream)
            compiled[grid, threads, stream, shared](*_converted(arguments, _view))

    def _compile(self, key: tuple[object, ...], arguments: tuple[Argument, ...]) -> Any:
        try:
            compiled = cuda.jit(self.signature(arguments), lto=False)(self.function)
        except Exception as error:
            _explain(error)
            raise
        self._compiled[key] = compiled
        return compiled


def _explain(error: Exception) -> None:
    """Raises what a person can do about an error in compiling, where it is the machine's."""
    text = str(error).lower()
    if "unsupported_ptx" in text or "unsupported .version" in text:
        version = ".".join(map(str, driver_version() or (13, 0)))
        raise DeviceError(
            f"The NVIDIA driver (it is {driver()}), or nvJitLink, is older than the library that compiles CUDA "
            f"kernels: {error}. Update the driver, or take older libraries with: "
            f"pip install 'cuda-toolkit=={version}.*'"
        ) from error
    if any(library in text for library in ("nvvm", "nvrtc", "libdevice", "nvjitlink")):
        raise MissingExtraError(
            f"A library that compiles CUDA kernels is missing or fails: {error}. Install it with: "
            "pip install 'slidex[cuda]'; or set CUDA_HOME to a CUDA toolkit."
        ) from error


def kernel(function: Callable[..., None]) -> Kernel:
    """Decorator: the function is a CUDA kernel."""
    return Kernel(function)


def blocks_for(work: int, per_block: int) -> int:
    """Blocks that cover so many units of work."""
    return -(-work // per_block)


def _type(argument: Argument) -> Any:
    if isinstance(argument, torch.Tensor):
        return types.Array(_TYPES[argument.dtype], argument.dim(), "C")
    if isinstance(argument, tuple):
        return types.BaseTuple.from_types(tuple(map(_type, argument)))
    return types.float32 if isinstance(argument, float) else types.int64


def _key(argument: Argument) -> object:
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.dim()
    return tuple(map(_key, argument)) if isinstance(argument, tuple) else type(argument)


def _converted(arguments: tuple[Argument, ...], view: Callable[[torch.Tensor], Any]) -> tuple[Any, ...]:
    """The arguments as Numba takes them."""
    converted = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            converted.append(view(argument))
        elif isinstance(argument, tuple):
            converted.append(_converted(argument, view))
        else:
            converted.append(np.float32(argument) if isinstance(argument, float) else argument)
    return tuple(converted)


def _simulated_view(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


_views: dict[tuple[object, ...], Any] = {}
_streams: dict[tuple[int, int], Any] = {}


def _view(tensor: torch.Tensor) -> Any:
    """Numba's view of a tensor's memory; it owns nothing, so to keep it for the next call keeps no memory alive."""
    key = (tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.device.index)
    view = _views.get(key)
    if view is None:
        if len(_views) >= _MOST_VIEWS:
            _views.clear()
        interface = {
            "shape": tuple(tensor.shape),
            "strides": None,
            "typestr": _TYPESTR[tensor.dtype],
            "data": (tensor.data_ptr(), False),
            "version": 3,
            "stream": None,
        }
        view = _views[key] = cuda.from_cuda_array_interface(interface, owner=None, sync=False)
    return view


def _stream(pointer: int) -> Any:
    key = (torch.cuda.current_device(), pointer)
    if key not in _streams:
        _streams[key] = cuda.external_stream(pointer) if pointer else 0  # Numba's name of the default stream
    return _streams[key]
