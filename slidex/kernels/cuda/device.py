"""What kernels call on the device: floats of 16 bits in and out, sums and maxima over a warp and over a block.

`wide` and `store` are plain functions with a second body for compiled code, so that the simulator runs them too.
All reductions have a fixed order. Kernels are launched with whole warps and call the reductions with all lanes.

The innermost loops count in uint64 with ``while``: Numba adds instructions to each access by a signed index, for
indices from the end, and to each turn of a ``for``. Unsigned numbers must not meet signed ones, which would make
floats of both; the tests look for float64 in what is compiled.
"""

from __future__ import annotations

import numpy as np

from slidex.kernels.cuda.environment import simulated
from slidex.kernels.cuda.launch import WARP, cuda, float32, types

ALL_LANES = 0xFFFFFFFF
STRIDE = np.uint64(WARP)
"""From a lane's column to its next."""
_QUIET_NAN = 0x7FC0
_MOST_WARPS = 32  # of a block


def wide(x):
    """An element of a float array as float32; the element of a bfloat16 array is uint16, its bits."""
    if isinstance(x, np.uint16):
        return (np.uint32(x) << np.uint32(16)).view(np.float32)
    return np.float32(x)


def store(array, i, x):
    """``array[i] = x`` for a float32 x, rounded to nearest, ties to even; `i` is an index or a tuple of them."""
    if array.dtype != np.uint16:
        array[i] = x
    elif np.isnan(x):
        array[i] = _QUIET_NAN
    else:
        bits = int(np.float32(x).view(np.uint32))
        array[i] = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def _register() -> None:
    """Give `wide` and `store` the bodies that Numba compiles."""
    from numba.cuda import libdevice  # noqa: PLC0415  (not in the simulator)
    from numba.extending import overload  # noqa: PLC0415

    @overload(wide, target="cuda")
    def _wide(x):
        if x == types.uint16:
            return lambda x: libdevice.int_as_float(np.int32(np.int32(x) << np.int32(16)))
        return lambda x: np.float32(x)  # noqa: PLW0108  (Numba wants a function with this signature)

    @overload(store, target="cuda")
    def _store(array, i, x):  # noqa: ARG001  (Numba wants the function's own names)
        if array.dtype != types.uint16:

            def store_float(array, i, x):
                array[i] = x

            return store_float

        def store_bits(array, i, x):
            bits = np.uint32(libdevice.float_as_int(x))  # pyrefly: ignore[bad-argument-type]
            rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
            array[i] = np.uint16(rounded >> np.uint32(16)) if x == x else np.uint16(_QUIET_NAN)  # noqa: PLR0124

        return store_bits


if not simulated():
    _register()


@cuda.jit(device=True)
def warp_sum(x):
    """Sum over the warp's lanes, the same bits in each of them."""
    for distance in (16, 8, 4, 2, 1):
        x += cuda.shfl_xor_sync(ALL_LANES, x, distance)
    return x


@cuda.jit(device=True)
def warp_max(x):
    """Largest x of the warp's lanes, in each of them."""
    for distance in (16, 8, 4, 2, 1):
        x = max(x, cuda.shfl_xor_sync(ALL_LANES, x, distance))
    return x


@cuda.jit(device=True)
def block_sum(x):
    """Sum over the block's threads, the same bits in each of them; all of the block must call it."""
    scratch = cuda.shared.array(_MOST_WARPS, float32)
    warp = cuda.threadIdx.x // WARP
    x = warp_sum(x)
    if cuda.laneid == 0:
        scratch[warp] = x
    cuda.syncthreads()
    total = np.float32(0)
    for i in range(cuda.blockDim.x // WARP):
        total += scratch[i]
    cuda.syncthreads()
    return total


@cuda.jit(device=True)
def block_max(x):
    """Largest x of the block's threads, in each of them; all of the block must call it."""
    scratch = cuda.shared.array(_MOST_WARPS, float32)
    warp = cuda.threadIdx.x // WARP
    x = warp_max(x)
    if cuda.laneid == 0:
        scratch[warp] = x
    cuda.syncthreads()
    most = scratch[0]
    for i in range(1, cuda.blockDim.x // WARP):
        most = max(most, scratch[i])
    cuda.syncthreads()
    return most
