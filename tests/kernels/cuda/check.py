"""`make gpu-check`: the CUDA kernels, the head and a run on a real GPU, under compute-sanitizer where it is installed,
and then a part of the benchmark.

Needs a torch built for CUDA, ``pip install 'slidex[cuda]'`` and pytest. Ends with 1 and a message where there is no
GPU to check.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from slidex.errors import SlidexError
from slidex.kernels.cuda import environment

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SUITES = sorted(ROOT.glob("tests/**/on_device*.py"))
MINUTES = "3"
"""The benchmark begins no further size after so long, so that all of it takes ten."""
SMALL = "(as_exact and float32 or rounded and bfloat16) and (plain or one-row or width-130)"


def main() -> int:
    """Run the suites; the exit status of the first that fails."""
    if environment.simulated():
        return _refuse("NUMBA_ENABLE_CUDASIM is set: unset it.")
    try:
        environment.require_device("cuda")
    except SlidexError as error:
        return _refuse(str(error))
    print(f"GPU: {environment.gpus()}, driver {environment.driver()}", flush=True)
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, SUITES)]
    status = subprocess.run(pytest, cwd=ROOT, check=False).returncode
    if status:
        return status
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not installed: memory accesses were not checked.")
    else:
        words = [sanitizer, "--tool", "memcheck", "--error-exitcode", "99", *pytest, "-k", SMALL]
        status = subprocess.run(words, cwd=ROOT, check=False).returncode
        if status:
            return status
    benchmark = [sys.executable, "-m", "benchmarks.gpu", "--minutes", MINUTES]
    return subprocess.run(benchmark, cwd=ROOT, check=False).returncode


def _refuse(reason: str) -> int:
    print(f"No GPU was checked. {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
