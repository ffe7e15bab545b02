"""What is read of a bucket on the device: the same classes as `slidex.lsh.reading` reads on the CPU.

Every random choice hashes the same explicit key with the same function, so windows and reservoirs agree with
the CPU's to the bit. Device functions only; the kernels that call them are in `slidex.lsh.cuda.voting`. All
numbers that enter 64-bit hashes are uint64, as a signed one beside them would make floats of both.
"""

from __future__ import annotations

import numpy as np

from slidex.kernels.cuda.launch import cuda
from slidex.lsh.reading import OVERFLOWS
from slidex.lsh.reading import mix as _cpu_mix

_WINDOW, _RESERVOIR, _FIRST = (OVERFLOWS.index(name) for name in ("window", "reservoir", "first"))
_HALF = np.uint64(32)
_LOW_HALF = np.uint64(0xFFFFFFFF)
_MIX_1, _MIX_2 = np.uint64(0x85EBCA6B), np.uint64(0xC2B2AE35)
_S13, _S16 = np.uint64(13), np.uint64(16)

mix = cuda.jit(device=True)(_cpu_mix.py_func)  # pyrefly: ignore[missing-attribute]  (a dispatcher's)
"""The splitmix64 finaliser, made from the very source of the CPU's."""


@cuda.jit(device=True)
def uniform_below(key, count):
    """An integer in ``[0, count)`` from a uint64 key."""
    return np.int64(((mix(key) >> _HALF) * np.uint64(count)) >> _HALF)


@cuda.jit(device=True)
def bucket_key(key, table, bucket):
    """A uint64 key of one bucket."""
    return mix(key ^ mix(np.uint64(table) << _HALF | np.uint64(bucket)))


@cuda.jit(device=True)
def query_key(codes_LV, key):
    """A uint64 key of one query: `key`, which stands for seed and step, with the query's own codes."""
    for t in range(codes_LV.shape[0]):
        key = mix(key ^ np.uint64(codes_LV[t, 0]))
    return key


@cuda.jit(device=True)
def turn(table, bucket, size, limit, overflow, seed, key):
    """Where reading an overfull bucket begins: at random for a window by `key`, for a reservoir by `seed`."""
    if size <= limit or overflow == _FIRST:
        return np.int64(0)
    if overflow == _WINDOW:
        return uniform_below(key, size)
    return uniform_below(bucket_key(seed, table, bucket), size)


@cuda.jit(device=True)
def place(table, bucket, size, limit, overflow, seed, begin, i):
    """Place in its bucket of the i-th class read, ``i < min(size, limit)``; `begin` as `turn` gave it.

    A reservoir has one class from each of `limit` stretches of near equal length, as in
    `slidex.lsh.reading.draw_reservoir`; here each is found by itself.
    """
    at = np.int64(i)
    if size > limit and overflow == _RESERVOIR:
        first = at * size // limit
        length = (at + 1) * size // limit - first
        at = first + uniform_below(bucket_key(seed, table, bucket) + np.uint64(at + 1), length)
    at += begin
    return at if at < size else at - size


@cuda.jit(device=True)
def scatter(c, key):
    """A bijection of 32-bit integers for each 64-bit key: two rounds of MurmurHash3's finaliser, as uint64.

    As no two classes have the same value, it orders classes of equal votes and there is always a first.
    """
    h = (np.uint64(c) ^ key) & _LOW_HALF
    h ^= h >> _S16
    h = (h * _MIX_1) & _LOW_HALF
    h ^= h >> _S13
    h = (h * _MIX_2) & _LOW_HALF
    h ^= (h >> _S16) ^ (key >> _HALF)
    h ^= h >> _S16
    h = (h * _MIX_1) & _LOW_HALF
    h ^= h >> _S13
    h = (h * _MIX_2) & _LOW_HALF
    return h ^ (h >> _S16)
