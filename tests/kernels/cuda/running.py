"""Run CUDA tests without a GPU: in the simulator, which needs a process of its own, or up to the text of the PTX.

Files named ``simulated_*.py`` are for the simulator; pytest does not collect them by itself. A test runs each with
`run_simulated`. To compile what a function would launch, call it within `recorded_launches` on CPU tensors, then
`compile_ptx` each launch.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from slidex.kernels.cuda.launch import Kernel

ROOT = Path(__file__).parents[3]
CAPABILITIES = ((8, 0), (9, 0))


def run_simulated(path: Path, *options: str) -> None:
    """Run one file of tests with Numba's CUDA simulator; fails with their output if one fails or none runs."""
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        *["-p", "no:cacheprovider", "-p", "tests.kernels.cuda.simulator"],
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*words, *options, str(path)],
        cwd=ROOT,
        env=environment | {"NUMBA_ENABLE_CUDASIM": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"[1-9]\d* passed", done.stdout), done.stdout


@dataclass(frozen=True)
class Launch:
    """What one launch would compile."""

    kernel: Kernel
    signature: Any

    def __str__(self) -> str:
        return f"{self.kernel.name}{self.signature.args}"


@contextlib.contextmanager
def recorded_launches(device_type: str = "cpu") -> Iterator[list[Launch]]:
    """Within, kernels take other tensors and compute nothing; the list gets what they would have compiled."""
    from slidex.kernels.cuda import environment  # numba-cuda is not everywhere
    from slidex.kernels.cuda.launch import Kernel

    launches: list[Launch] = []

    def record(kernel: Kernel, blocks: object, threads: int, *arguments: Any, shared: int = 0) -> None:
        launches.append(Launch(kernel, kernel.signature(arguments)))

    with (
        mock.patch.object(Kernel, "launch", record),
        mock.patch.object(environment, "device_type", return_value=device_type),
    ):
        yield launches


def compile_ptx(launch: Launch, capability: tuple[int, int]) -> str:
    """The PTX of a launch's kernel for a compute capability; needs NVVM and NVRTC, no driver and no GPU."""
    from numba import cuda
    from numba.cuda import dispatcher

    device = SimpleNamespace(compute_capability=capability)  # device functions ask for the current one
    with mock.patch.object(dispatcher, "get_current_device", return_value=device):
        return cuda.compile_ptx(launch.kernel.function, launch.signature.args, cc=capability)[0]


def entry_points(ptx: str) -> list[str]:
    """The mangled names of the kernels in some PTX; each contains the name of its Python function."""
    return re.findall(r"^\.visible \.entry (\w+)\(", ptx, re.MULTILINE)


def assembled(ptx: str, capability: tuple[int, int], folder: Path) -> str | None:
    """What ptxas says of registers and spills, or None where there is no ptxas."""
    ptxas = shutil.which("ptxas")
    if ptxas is None:
        return None
    source = folder / "kernel.ptx"
    source.write_text(re.sub(r"^\.version .*$", ".version 8.0", ptx, flags=re.MULTILINE))
    arch = f"-arch=sm_{capability[0]}{capability[1]}"
    done = subprocess.run(
        [ptxas, arch, "-v", "-o", os.devnull, str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr
