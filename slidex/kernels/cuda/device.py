"""What kernels call on the device: floats of 16 bits in and out, sums and maxima over a warp and over a block.

`wide`, `store` and `store_stochastic` are plain functions with a second body for compiled code, so that the simulator
runs them too.
All reductions have a fixed order. Kernels are launched with whole warps and call the reductions with all lanes.

The innermost loops count in uint64 with ``while``: Numba adds instructions to each access by a signed index, for
indices from the end, and to each turn of a ``for``. Unsigned numbers must not meet signed ones, which would make
floats of both; the tests look for float64 in what is compiled.
"""

from __future__ import annotations

import numpy as np

from slidex.kernels.cuda.environment import simulated
from slidex.kernels.cuda.launch import WARP, cuda, float32, types
from slidex.kernels.rounding import BIAS_COLUMN, MIX_1, MIX_2, SMALLEST_NORMAL_HALF

ALL_LANES = 0xFFFFFFFF
STRIDE = np.uint64(WARP)
"""From a lane's column to its next."""
_QUIET_NAN = 0x7FC0
_MOST_WARPS = 32  # of a block
OF_BIAS = np.uint32(BIAS_COLUMN & 0xFFFFFFFF)
"""Added to a row's key, as a column is, for its bias."""
_MIX_1, _MIX_2 = np.uint32(MIX_1), np.uint32(MIX_2)
_HALF = np.uint32(16)
_OF_BFLOAT16, _OF_HALF = np.uint32(0xFFFF), np.uint32(0x1FFF)  # the bits of a float32 that do not fit
_SMALL = np.float32(SMALLEST_NORMAL_HALF)


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


@cuda.jit(device=True)
def mix32(x):
    """`slidex.kernels.rounding.mix32` of a uint32, as uint32."""
    x = np.uint32((x ^ (x >> _HALF)) * _MIX_1)
    x = np.uint32((x ^ (x >> np.uint32(13))) * _MIX_2)
    return np.uint32(x ^ (x >> _HALF))


@cuda.jit(device=True)
def row_key(key, row):
    """Of the random bits of a row's step, as uint32: plus a column or `OF_BIAS`, what `store_stochastic` takes."""
    return mix32(np.uint32(np.uint32(key) ^ np.uint32(row)))


@cuda.jit(device=True)
def lifted(x):
    """What puts a number that float16 holds as a subnormal one binade above these, where its neighbours are as far."""
    if -_SMALL < x < _SMALL:
        return _SMALL if x >= np.float32(0) else -_SMALL
    return np.float32(0)


def store_stochastic(array, i, x, counter):
    """``array[i] = x`` for a float32 x; one of 16 bits as `slidex.kernels.rounding.stochastic_round` rounds it.

    Its random bits are those of `mix32(counter)`, counter a uint32.
    """
    if array.dtype == np.float32:
        array[i] = x
    elif not np.isfinite(x):
        store(array, i, x)
    elif array.dtype == np.uint16:
        array[i] = (int(x.view(np.uint32)) + int(mix32(counter) & _OF_BFLOAT16)) >> 16
    else:
        lift = lifted(x)
        bits = np.float32(x + lift).view(np.uint32) + (mix32(counter) & _OF_HALF)
        array[i] = (bits & ~_OF_HALF).view(np.float32) - lift


def _register() -> None:
    """Give `wide`, `store` and `store_stochastic` the bodies that Numba compiles."""
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

    @overload(store_stochastic, target="cuda")
    def _store_stochastic(array, i, x, counter):  # noqa: ARG001
        if array.dtype == types.float32:

            def store_float(array, i, x, counter):  # noqa: ARG001
                array[i] = x

            return store_float

        if array.dtype == types.float16:

            def store_half(array, i, x, counter):
                lift = lifted(x)
                bits = np.uint32(libdevice.float_as_int(x + lift))  # pyrefly: ignore[bad-argument-type]
                cut = np.uint32(np.uint32(bits + (mix32(counter) & _OF_HALF)) & ~_OF_HALF)
                rounded = libdevice.int_as_float(np.int32(cut)) - lift
                array[i] = rounded if x - x == np.float32(0) else x

            return store_half

        def store_bits(array, i, x, counter):
            bits = np.uint32(libdevice.float_as_int(x))  # pyrefly: ignore[bad-argument-type]
            rounded = np.uint32(bits + (mix32(counter) & _OF_BFLOAT16))  # infinity stays what it is
            array[i] = np.uint16(rounded >> _HALF) if x == x else np.uint16(_QUIET_NAN)  # noqa: PLR0124

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
