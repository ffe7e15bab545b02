"""CUDA kernels as one compiled thread on the CPU: the types that the simulator does not have, at sizes it cannot do.

Their source is translated: a grid of one block of one thread, a warp of one lane, atomics that are plain reads and
writes, shared memory that is an array.
"""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numba

import slidex.lsh

_ONE_THREAD = {
    "cuda.jit(device=True)(_cpu_mix.py_func)": "_cpu_mix",
    "@cuda.jit(device=True)": "@numba.njit",
    "@kernel": "@numba.njit",
    "cuda.threadIdx.x": "0",
    "cuda.blockIdx.x": "0",
    "cuda.blockDim.x": "1",
    "cuda.gridDim.x": "1",
    "cuda.grid(1)": "0",
    "cuda.gridsize(1)": "1",
    "cuda.syncthreads()": "pass",
    "cuda.atomic.": "_atomic_",
}


@numba.njit
def _atomic_add(array, i, value):
    old = array[i]
    array[i] += value
    return old


@numba.njit
def _atomic_cas(array, i, expected, value):
    old = array[i]
    if old == expected:
        array[i] = value
    return old


@functools.cache
def compiled(*names: str) -> Any:
    """One module with the kernels and device functions of ``slidex/lsh/cuda/<name>.py``, compiled when called."""
    module = ModuleType(f"compiled_{'_'.join(names)}")
    sys.modules[module.__name__] = module  # where Numba looks for globals
    module.__dict__.update(numba=numba, _atomic_add=_atomic_add, _atomic_cas=_atomic_cas, WARP=1)
    for name in names:
        source = (Path(slidex.lsh.__file__).parent / "cuda" / f"{name}.py").read_text()
        for cuda, cpu in _ONE_THREAD.items():
            source = source.replace(cuda, cpu)
        source = re.sub(r"cuda\.shared\.array\((\w+), types\.(\w+)\)", r"np.empty(\1, np.\2)", source)
        source = re.sub(r"^from slidex\.(kernels|lsh)\.cuda\..*$", "", source, flags=re.MULTILINE)
        source = source.partition("\nclass ")[0]
        assert "cuda." not in re.sub(r'"""(.|\n)*?"""', "", source), "a CUDA function without a translation"
        exec(compile(source, f"{name}.py", "exec"), module.__dict__)  # noqa: S102
    return module
