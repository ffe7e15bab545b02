"""The data sets that benchmarks train on, prepared once and kept: 4 thousand to 3.4 million classes.

The sets in the text format of the Extreme Classification Repository are looked for in ``--data`` (a directory with a
folder for each, holding ``train.txt.xz`` and ``test.txt.xz``), and so is ``deb-deps-trixie``: JSON lines, whose title
and text become features by the default settings of ``slidex prepare jsonl``. ``stdlib`` and ``site-packages`` are
Python source and need no file; ``synthetic-C`` is made up, with C classes.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import click
import numpy as np

from slidex.data import (
    CsrArrays,
    Dataset,
    DatasetWriter,
    prepare_jsonl,
    prepare_python_source,
    prepare_xmc,
    standard_library_directory,
)

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".benchmark-cache"
SHARED = ROOT.parent / "shared" / "data"
XMC = ("eurlex-4k", "npm-deps-2017", "deb-files-283k", "deb-files-3m")
TEXT = ("deb-deps-trixie",)
PYTHON = ("stdlib", "site-packages")


class MissingDataError(click.UsageError):
    """A data set's file is not where it is looked for."""


def load(name: str, data: Path = SHARED) -> Dataset:
    """The prepared set `name`, one of `XMC`, `TEXT` or `PYTHON`, or ``synthetic-C``.

    Raises:
        MissingDataError: if the files are not there.
        click.UsageError: if the name is unknown.
    """
    out = CACHE / "sets" / name
    if not (out / "meta.json").exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        if name in XMC:
            train, test = data / name / "train.txt.xz", data / name / "test.txt.xz"
            if not train.exists():
                raise MissingDataError(f"{train}: no such file; give --data the directory that has {name}/.")
            prepare_xmc(train, out, test=test)
        elif name in TEXT:
            train, test = data / name / "train.jsonl.xz", data / name / "test.jsonl.xz"
            if not train.exists():
                raise MissingDataError(f"{train}: no such file; give --data the directory that has {name}/.")
            prepare_jsonl([train], out, text_field="title,text", test=[test])
        elif name in PYTHON:
            source = standard_library_directory() if name == "stdlib" else Path(sysconfig.get_path("purelib"))
            prepare_python_source([source], out)
        elif name.startswith("synthetic-"):
            make_synthetic(out, int(name.removeprefix("synthetic-")))
        else:
            raise click.UsageError(
                f"{name}: the sets are {', '.join((*XMC, *TEXT, *PYTHON))}, synthetic-NUMBER."
            )
    return Dataset.open(out)


def make_synthetic(out: Path, num_classes: int, rows: int = 200_000) -> None:
    """A learnable set that is the same but for the number of classes: what a step costs at a size.

    A row has 5 classes, the rank of each log-uniform (Zipf's law), and of each class 6 features that are a hash of the
    class: 30 of 131,072 in all, less what coincides.
    """
    rng = np.random.Generator(np.random.Philox(key=[0, 7]))
    ranks = np.exp(rng.random((rows, 5)) * np.log(num_classes)).astype(np.int64) - 1
    classes = np.sort(ranks * 2_654_435_761 % num_classes, axis=1)
    mixed = (classes[:, :, None] * 6 + np.arange(6)).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    features = np.sort((mixed >> np.uint64(47)).reshape(rows, -1), axis=1).astype(np.int32)
    with DatasetWriter(out) as writer:
        writer.append("train", _distinct(features, 1 << 17), _distinct(classes.astype(np.int32), num_classes))
        writer.finish(
            num_features=1 << 17,
            num_classes=num_classes,
            source={"format": "synthetic", "files": [], "options": {"rows": rows}},
        )


def _distinct(ids: np.ndarray, num_columns: int) -> CsrArrays:
    """Sorted rows of ids, each id once in a row."""
    first = np.ones(ids.shape, dtype=bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    indptr = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(first.sum(1))])
    return CsrArrays(indptr, ids[first], None, num_columns)
