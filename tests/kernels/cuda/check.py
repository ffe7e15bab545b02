"""`make gpu-check`: the CUDA kernels, the head and a run on a real GPU, memory accesses under compute-sanitizer, and
then a part of the benchmark.

Needs a torch built for CUDA, numba-cuda and pytest (``pip install 'slidex[cuda]' pytest``; `tests.kernels.cuda.pack`
where there is no package index). All parts are run, whatever the one before has found, within ten minutes; one that
hangs is ended. Ends with 1 unless every part ran and passed, and with a message where there is no GPU to check. The
environment variable SLIDEX_COMMIT names the commit of a copy without history.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from slidex.errors import SlidexError
from slidex.kernels.cuda import environment

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SUITES = sorted(ROOT.glob("tests/**/on_device*.py"))
SECONDS = 570
"""Of all parts together; the benchmark gets what the others leave."""
LONGEST = {"suites": 270, "memory accesses": 150}
ENDING = 20
"""Of the benchmark, between its last measurement and its end."""
SMALL = (
    "(as_exact and float32 or rounded and bfloat16) and (plain or one-row or width-130)"
    " or same_codes and float32"
)
PASSED = "passed"
# numba-cuda up to 0.30 calls what numpy from 2.5 on lacks.
ROW_STACK = """import numpy

if not hasattr(numpy, "row_stack"):
    numpy.row_stack = numpy.vstack
"""


def main() -> int:
    """Run the parts: 0 if all of them passed, else 1."""
    if environment.simulated():
        return _refuse("NUMBA_ENABLE_CUDASIM is set: unset it.")
    with tempfile.TemporaryDirectory() as folder:
        _prepare(Path(folder))
        try:
            environment.require_device("cuda")
        except SlidexError as error:
            return _refuse(str(error))
        print(f"GPU: {environment.gpus()}, driver {environment.driver()}", flush=True)
        return _parts()


def _parts() -> int:
    started = time.monotonic()
    # Of plugins and their warnings only what this project's tests are made for: others belong to the machine.
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default"]
    pytest += [str(path) for path in SUITES]
    outcomes = {"suites": _run("suites", pytest, LONGEST["suites"])}
    sanitizer = tool("compute-sanitizer")
    if sanitizer is None:
        outcomes["memory accesses"] = "not checked: there is no compute-sanitizer on the PATH or in CUDA_HOME"
    else:
        # What is asked of the driver in vain is no access to memory; numba and torch ask much, to see what there is.
        words = [sanitizer, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "99"]
        # torch's allocator gives parts of large blocks, in which a step beyond a tensor's end would go unseen.
        exact = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        outcomes["memory accesses"] = _run(
            "memory accesses", [*words, *pytest, "-k", SMALL], LONGEST["memory accesses"], exact
        )
    left = SECONDS - (time.monotonic() - started)
    minutes = f"{max(0.0, left - ENDING) / 60:.2f}"
    benchmark = [sys.executable, "-m", "benchmarks.gpu", "--minutes", minutes]
    outcomes["benchmark"] = _run("benchmark", benchmark, max(left, ENDING))
    for part, outcome in outcomes.items():
        print(f"{part}: {outcome}")
    return 0 if all(outcome == PASSED for outcome in outcomes.values()) else 1


def _run(part: str, words: list[str], seconds: float, variables: dict[str, str] | None = None) -> str:
    """How a part ended; its output goes where this one's goes."""
    print(f"--- {part}", flush=True)
    surroundings = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | (variables or {})
    try:
        status = subprocess.run(words, cwd=ROOT, env=surroundings, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"ended after {seconds:.0f} s, as it had not by itself"
    return PASSED if status == 0 else f"failed with status {status}"


def _prepare(folder: Path) -> None:
    """Lets numba-cuda find the toolkit, and what it calls in numpy, here and in the processes that follow."""
    home = toolkit()
    if home is not None:
        os.environ["CUDA_HOME"] = str(home)
    if not hasattr(np, "row_stack"):
        vars(np)["row_stack"] = np.vstack
        (folder / "sitecustomize.py").write_text(ROW_STACK)
        inherited = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), inherited]))


def toolkit() -> Path | None:
    """The folder of the CUDA toolkit: that of CUDA_HOME or CUDA_PATH, of the nvcc on the PATH, or the usual one."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return Path(os.environ[name])
    compiler = shutil.which("nvcc")
    if compiler is not None:
        return Path(compiler).resolve().parents[1]
    usual = Path("/usr/local/cuda")
    return usual if usual.is_dir() else None


def tool(name: str) -> str | None:
    """The path of a program of the CUDA toolkit."""
    home = toolkit()
    folders = [] if home is None else [home / "bin", home / name]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, folders)))


def _refuse(reason: str) -> int:
    print(f"No GPU was checked. {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
