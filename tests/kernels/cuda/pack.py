"""Pack numba-cuda and what it needs into one archive, for a GPU machine that has torch but reaches no package index.

``python -m tests.kernels.cuda.pack --python 3.12 bundle.tar.xz`` where there is an index; then, on the GPU machine,
``mkdir site && tar -C site -xf bundle.tar.xz``, and ``PYTHONPATH=site:$PWD make gpu-check``. NVRTC and NVVM are taken
from that machine's CUDA toolkit or from torch's wheels. Versions are those of the environment that packs, in which the
kernels were tested. Tests are left out and libraries stripped: some 50 MB instead of 80.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGES = (
    "llvmlite",
    "numba",
    "numba-cuda",
    "cuda-bindings",
    "cuda-core",
    "cuda-pathfinder",
)
MOST_BYTES = 64 << 20
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_24_x86_64",
    "manylinux2014_x86_64",
)
# A folder on PYTHONPATH has no .pth files run, which is how numba-cuda takes the place of numba's old CUDA target.
SITE = """import numpy

if not hasattr(numpy, "row_stack"):
    numpy.row_stack = numpy.vstack
import _numba_cuda_redirector
"""


def download(python: str, folder: Path) -> list[Path]:
    """The wheels of `PACKAGES`, in the versions installed here, for a Python version on Linux x86-64."""
    # Without dependencies pip takes the newest of each, and numba takes one llvmlite only.
    wanted = [f"{name}=={importlib.metadata.version(name)}" for name in PACKAGES]
    where = [f"--platform={platform}" for platform in PLATFORMS]
    options = [
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        f"--python-version={python}",
        f"--dest={folder}",
    ]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, *where, *wanted], check=True)
    return sorted(folder.glob("*.whl"))


def unpack(wheels: list[Path], folder: Path) -> None:
    """Their content without tests, libraries stripped where there is a `strip`."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if "/tests/" not in name]
            archive.extractall(folder, names)  # noqa: S202  (a wheel that pip has checked)
    strip = shutil.which("strip")
    for library in folder.rglob("*.so"):
        if strip is not None:
            subprocess.run([strip, "--strip-unneeded", str(library)], check=False)
    (folder / "sitecustomize.py").write_text(SITE)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and write the archive; 1 where it is larger than `MOST_BYTES`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=Path, help="the .tar.xz to write")
    parser.add_argument("--python", default="3.12", help="version of the GPU machine's Python")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder, "site")
        unpack(download(options.python, Path(folder, "wheels")), site)
        with tarfile.open(options.archive, "w:xz", preset=3) as archive:
            for path in sorted(site.iterdir()):
                archive.add(path, path.name)
    size = options.archive.stat().st_size
    print(f"{options.archive}: {size / 1e6:.1f} MB")
    if size > MOST_BYTES:
        print(f"That is more than the {MOST_BYTES / 1e6:.1f} MB that it may have.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
