"""What LLVM can do and Numba does not offer: prefetch, sums in a fixed order, and exponentials that vectorise.

Numba's pip wheels bring no vector mathematics library, so ``math.exp`` is a scalar call of 3 to 4 ns inside
every loop. The float32 versions here are straight-line arithmetic, which LLVM turns into AVX-512 like any
sum. They are compiled *without* ``reassoc``: regrouping would undo the two-part range reduction.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

FUSE = {"contract"}
"""Flags for all kernels: a product and a sum may be one operation, but no sum is regrouped; see `lane_sum`, `lane_dot`.

Numba optimises a function anew in every caller it is linked into, and a process that compiles it calls another of these
copies than one that loads it from the cache. Free to regroup, the copies add in different orders.
"""

CACHE_LINE = 64
_LANES, _CHAINS = 8, 4  # four independent AVX vectors hide the latency of an addition
_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)  # 9 significant bits: products with |n| <= 127 are exact
_LN2_LOW = np.float32(math.log(2) - 0.693359375)
_LOWEST = np.float32(-87.33654)  # log of the smallest normal float32
_ONE = np.float32(1)
_HALF = np.float32(0.5)
_EXP_2, _EXP_3, _EXP_4, _EXP_5, _EXP_6, _EXP_7 = (np.float32(1 / math.factorial(k)) for k in range(2, 8))
_ATANH = tuple(np.float32(2 / (2 * k + 1)) for k in range(8))


@intrinsic
def _prefetch(typingctx, array, offset):  # noqa: ARG001
    """Ask for the cache line that holds element ``offset`` of a C-contiguous array; never faults."""

    def generate(context, builder, signature, arguments):
        data = cgutils.create_struct_proxy(signature.args[0])(context, builder, arguments[0]).data
        pointer = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        word = ir.IntType(32)
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [pointer.type], ir.FunctionType(ir.VoidType(), [pointer.type, word, word, word])
        )
        builder.call(function, [pointer, word(0), word(3), word(1)])  # read, keep in all levels, data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@njit(nogil=True, inline="always")
def prefetch_at(array, offset):
    """Ask for the cache line of one element of a C-contiguous array; an offset outside it does no harm."""
    _prefetch(array, offset)  # pyrefly: ignore[missing-argument]  (Numba passes the first)


@njit(nogil=True, inline="always")
def prefetch_row(matrix, row):
    """Ask for every cache line of one row of a C-contiguous matrix."""
    width = matrix.shape[1]
    for offset in range(0, width, CACHE_LINE // matrix.itemsize):
        _prefetch(matrix, row * width + offset)  # pyrefly: ignore[missing-argument]  (Numba passes the first)


def _fixed_order_sum(context, builder, arrays, array_type):
    """Emits ``sum_i x[i]`` of one array, or ``sum_i x[i] * y[i]`` of two, with every rounding step laid down.

    32 partial sums over whole blocks, 8 over what is left, added as a tree; then the last 7 entries at most.
    """
    kind = context.get_value_type(array_type.dtype)
    vector, word = ir.VectorType(kind, _LANES), ir.IntType(64)
    views = [cgutils.create_struct_proxy(array_type)(context, builder, array) for array in arrays]
    size = cgutils.unpack_tuple(builder, views[0].shape, 1)[0]

    def add(total, at, width):
        pointers = [builder.gep(view.data, [at]) for view in views]
        if width is vector:
            pointers = [builder.bitcast(pointer, vector.as_pointer()) for pointer in pointers]
        parts = [builder.load(pointer, align=array_type.dtype.bitwidth // 8) for pointer in pointers]
        if len(parts) == 1:
            return builder.fadd(total, parts[0])
        name = f"llvm.fma.{'' if width is kind else f'v{_LANES}'}f{array_type.dtype.bitwidth}"
        fused = cgutils.get_or_insert_function(builder.module, ir.FunctionType(width, [width] * 3), name)
        return builder.call(fused, [*parts, total])

    chains = [cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * _LANES)) for _ in range(_CHAINS)]
    block = word(_LANES * _CHAINS)
    whole = builder.mul(builder.udiv(size, block), block)
    with cgutils.for_range_slice(builder, word(0), whole, block, inc=True) as (i, _):
        for c, chain in enumerate(chains):
            builder.store(add(builder.load(chain), builder.add(i, word(c * _LANES)), vector), chain)
    vectors = builder.mul(builder.udiv(size, word(_LANES)), word(_LANES))
    with cgutils.for_range_slice(builder, whole, vectors, word(_LANES), inc=True) as (i, _):
        builder.store(add(builder.load(chains[0]), i, vector), chains[0])
    sums = [builder.load(chain) for chain in chains]
    while len(sums) > 1:
        sums = [builder.fadd(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
    sums = [builder.extract_element(sums[0], ir.IntType(32)(lane)) for lane in range(_LANES)]
    while len(sums) > 1:
        sums = [builder.fadd(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
    total = cgutils.alloca_once_value(builder, sums[0])
    with cgutils.for_range_slice(builder, vectors, size, word(1), inc=True) as (i, _):
        builder.store(add(builder.load(total), i, kind), total)
    return builder.load(total)


@intrinsic
def _lane_sum(typingctx, x):  # noqa: ARG001
    def generate(context, builder, signature, arguments):
        return _fixed_order_sum(context, builder, arguments, signature.args[0])

    return (x.dtype(x), generate) if x.layout == "C" else None


@intrinsic
def _lane_dot(typingctx, x, y):  # noqa: ARG001
    def generate(context, builder, signature, arguments):
        return _fixed_order_sum(context, builder, arguments, signature.args[0])

    return (x.dtype(x, y), generate) if x.layout == y.layout == "C" and x.dtype == y.dtype else None


@njit(nogil=True)
def lane_sum(x):
    """Sum of a C-contiguous float array (size,), in an order that depends on nothing but its size; 0 if empty."""
    return _lane_sum(x)  # pyrefly: ignore[missing-argument]  (Numba passes the first)


@njit(nogil=True)
def lane_dot(x, y):
    """Inner product of two C-contiguous arrays (size,) of one float dtype, fused, in the order of `lane_sum`."""
    return _lane_dot(x, y)  # pyrefly: ignore[missing-argument]


def exp_nonpositive(x):
    """``exp(x)`` for x <= 0; -inf gives 0, NaN gives NaN. The body is for plain Python, njit code has its own.

    float32: ``2^n * p(r)`` with ``x = n ln 2 + r``, |r| <= ln(2)/2, p of degree 7; relative error below 2e-7;
    values under the smallest normal number become 0. float64: ``math.exp``.
    """
    return math.exp(x)


@njit(nogil=True, error_model="numpy", fastmath={"contract"})
def _exp_nonpositive_32(x):
    clamped = x if x > _LOWEST else _LOWEST  # also takes NaN away from the integer conversion
    n = np.int32(clamped * _LOG2_E - _HALF)
    whole = np.float32(n)
    r = (clamped - whole * _LN2_HIGH) - whole * _LN2_LOW
    p = _EXP_6 + r * _EXP_7
    p = _EXP_5 + r * p
    p = _EXP_4 + r * p
    p = _EXP_3 + r * p
    p = _EXP_2 + r * p
    p = _ONE + r * p
    p = _ONE + r * p
    result = p * np.int32((n + np.int32(127)) << np.int32(23)).view(np.float32)
    if x < _LOWEST:
        result = np.float32(0)
    return result if x == x else x  # noqa: PLR0124  (NaN)


@overload(exp_nonpositive)
def _exp_nonpositive(x):
    if x == types.float32:
        return lambda x: _exp_nonpositive_32(x)  # noqa: PLW0108  (Numba wants a function with this signature)
    return lambda x: math.exp(x)  # noqa: PLW0108


def log1p_unit(x):
    """``log(1 + x)`` for x in [0, 1]. The body is for plain Python, njit code has its own.

    float32: ``2 atanh(s)`` with ``s = x / (2 + x) <= 1/3``, eight terms; relative error below 3e-7. float64:
    ``math.log1p``.
    """
    return math.log1p(x)


@njit(nogil=True, error_model="numpy", fastmath={"contract"})
def _log1p_unit_32(x):
    s = x / (np.float32(2) + x)
    square = s * s
    p = _ATANH[6] + square * _ATANH[7]
    p = _ATANH[5] + square * p
    p = _ATANH[4] + square * p
    p = _ATANH[3] + square * p
    p = _ATANH[2] + square * p
    p = _ATANH[1] + square * p
    p = _ATANH[0] + square * p
    return s * p


@overload(log1p_unit)
def _log1p_unit(x):
    if x == types.float32:
        return lambda x: _log1p_unit_32(x)  # noqa: PLW0108
    return lambda x: math.log1p(x)  # noqa: PLW0108


def widen(x):
    """A float as it is, an int16 as the upper half of a float32: bfloat16 is that. The body is for plain Python."""
    return x


@overload(widen)
def _widen(x):
    if x == types.int16:
        return lambda x: np.int32(np.int32(x) << np.int32(16)).view(np.float32)
    return lambda x: x


@njit(nogil=True)
def narrow(x):
    """Inverse of `widen` for float32: the int16, rounded to nearest, halves to even; NaN stays NaN."""
    bits = np.float32(x).view(np.uint32)
    even = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(bits + np.uint32(0x7FFF) + even) >> np.uint32(16)
    return np.int16(rounded if x == x else np.uint32(0x7FC0))  # noqa: PLR0124  (NaN)


def _to_ordered(x):
    """Integer whose order is that of the floats: of a NumPy scalar here, of any float in njit code."""
    bits = x.view(f"i{x.itemsize}")
    return bits ^ ((bits >> (8 * x.itemsize - 1)) & np.iinfo(bits.dtype).max)


def _from_ordered(bits):
    """Inverse of `_to_ordered`."""
    flipped = bits ^ ((bits >> (8 * bits.itemsize - 1)) & np.iinfo(bits.dtype).max)
    return flipped.view(f"f{bits.itemsize}")


@njit(nogil=True)
def _flip(bits, shift, low_bits):
    """Turn a negative float's bits (sign, magnitude) into an integer that falls with it; its own inverse.

    Numba widens every integer sum to 64 bits, so callers narrow the result themselves.
    """
    return bits ^ ((bits >> shift) & low_bits)


@overload(_to_ordered)
def _to_ordered_impl(x):
    if x == types.float32:
        return lambda x: np.int32(_flip(np.float32(x).view(np.int32), 31, 0x7FFFFFFF))
    return lambda x: _flip(np.float64(x).view(np.int64), 63, 0x7FFFFFFFFFFFFFFF)


@overload(_from_ordered)
def _from_ordered_impl(bits):
    if bits == types.int32:
        return lambda bits: np.int32(_flip(bits, 31, 0x7FFFFFFF)).view(np.float32)
    return lambda bits: np.int64(_flip(bits, 63, 0x7FFFFFFFFFFFFFFF)).view(np.float64)


@njit(nogil=True)
def maximum(x):
    """Largest entry of a float array of at least one entry; of no meaning where an entry is NaN.

    Compares bits as integers: LLVM vectorises a maximum of floats only under the promise that there is no
    NaN.
    """
    most = _to_ordered(x[0])
    for i in range(1, x.size):
        bits = _to_ordered(x[i])
        most = bits if bits > most else most
    return _from_ordered(most)
