"""The data sets that benchmarks train on, prepared once and kept: 4 thousand to 3.4 million classes.

The sets in the text format of the Extreme Classification Repository are looked for in ``--data`` (a directory with a
folder for each, holding ``train.txt.xz`` and ``test.txt.xz``); ``stdlib`` and ``site-packages`` are Python source and
need no file.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import click

from slidex.data import Dataset, prepare_python_source, prepare_xmc, standard_library_directory

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".benchmark-cache"
SHARED = ROOT.parent / "shared" / "data"
XMC = ("eurlex-4k", "npm-deps-2017", "deb-files-283k", "deb-files-3m")
PYTHON = ("stdlib", "site-packages")


def load(name: str, data: Path = SHARED) -> Dataset:
    """The prepared set `name`, one of `XMC` or `PYTHON`.

    Raises:
        click.UsageError: if the name is unknown or the files are not there.
    """
    out = CACHE / "sets" / name
    if not (out / "meta.json").exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        if name in XMC:
            train, test = data / name / "train.txt.xz", data / name / "test.txt.xz"
            if not train.exists():
                raise click.UsageError(f"{train}: no such file; give --data the directory that has {name}/.")
            prepare_xmc(train, out, test=test)
        elif name in PYTHON:
            source = standard_library_directory() if name == "stdlib" else Path(sysconfig.get_path("purelib"))
            prepare_python_source([source], out)
        else:
            raise click.UsageError(f"{name}: the sets are {', '.join((*XMC, *PYTHON))}.")
    return Dataset.open(out)
