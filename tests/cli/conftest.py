"""Inputs of every format, two prepared data sets and two trained runs for the tests of the command line."""

from __future__ import annotations

import contextlib
import csv
import json
import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from scipy.sparse import csr_matrix, save_npz

from slidex.cli import main

if TYPE_CHECKING:
    from pathlib import Path

    from slidex.data import CsrArrays, Dataset

TOPICS = {"fruit": "apple pear plum cherry", "metal": "iron zinc tin lead", "sky": "moon star sun comet"}
TRAIN_SMALL = (
    *("--hidden-width", "32", "--batch-size", "64", "--learning-rate", "0.02", "--precision", "float32"),
    *("--epochs", "30", "--checkpoint-every", "1000", "--valid-every", "100", "--report-every", "50"),
    *("--threads", "1"),
)
SMALL_INDEX = (
    *("--mode", "shared", "--pool-size", "100"),
    *("--index-option", "bits=3", "--index-option", "tables=8"),
)

Invoke = Callable[..., Result]
Start = Callable[..., subprocess.Popen[str]]


def invoke_in_process(*words: object, code: int = 0, **options: Any) -> Result:
    """Runs slidex in this process. An exception that is no exit code goes through; so no test sees a traceback."""
    result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False, **options)
    assert result.exit_code == code, f"exit code {result.exit_code}: {result.stderr}"
    if code not in {0, 2}:
        assert len(result.stderr.strip().splitlines()[-1]) > 20
    return result


@pytest.fixture(scope="session")
def invoke() -> Invoke:
    return invoke_in_process


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts slidex as a process of its own, or the Python text given as `script`."""
    processes = []

    def begin(*words: object, script: str | None = None, **options: Any) -> subprocess.Popen[str]:
        program = ["-m", "slidex"] if script is None else ["-c", script]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(
            [sys.executable, *program, *map(str, words)], text=True, **(pipes | options)
        )
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLIDEX_")]:
        monkeypatch.delenv(name)


def svmlight_lines(x: CsrArrays, y: CsrArrays, first_feature: int) -> list[str]:
    return [
        ",".join(map(str, y.indices[y.indptr[row] : y.indptr[row + 1]]))
        + "".join(f" {i + first_feature}:1" for i in x.indices[x.indptr[row] : x.indptr[row + 1]])
        for row in range(x.num_rows)
    ]


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def write_number_formats(folder: Path, data: Dataset) -> None:
    """train/test.txt, all.txt.xz with tst_split.txt, train/test/all.svm (from 1), x/y/tx/ty.npz: 300 and 60 rows."""
    for split, rows, x_name, y_name in (("train", 300, "x", "y"), ("test", 60, "tx", "ty")):
        x, y = data.split(split).x.slice(0, rows), data.split(split).y.slice(0, rows)
        header = f"{rows} {data.num_features} {data.num_classes}"
        write_lines(folder / f"{split}.txt", [header, *svmlight_lines(x, y, 0)])
        write_lines(folder / f"{split}.svm", svmlight_lines(x, y, 1))
        for name, side in ((x_name, x), (y_name, y)):
            ones = np.ones(side.nnz, dtype=np.float32)
            shape = (side.num_rows, side.num_columns)
            save_npz(folder / f"{name}.npz", csr_matrix((ones, side.indices, side.indptr), shape=shape))
    shutil.copy(folder / "train.svm", folder / "all.svm")
    (folder / "all.txt.xz").write_bytes(lzma.compress((folder / "train.txt").read_bytes()))
    write_lines(folder / "tst_split.txt", [str(row) for row in range(1, 300, 5)])


def write_text_formats(folder: Path) -> None:
    """items/train/test as .jsonl and .csv: 120 and 30 rows whose words tell their topic; labels parted by ``|``."""
    rng = np.random.default_rng(5)
    for name, rows in (("items", 120), ("train", 120), ("test", 30)):
        records = []
        for row in range(rows):
            topic = list(TOPICS)[row % 3]
            words = " ".join(rng.choice(TOPICS[topic].split(), 3))
            records.append(
                {"title": topic, "text": words, "labels": [topic, "even" if row % 2 == 0 else "odd"]}
            )
        write_lines(folder / f"{name}.jsonl", [json.dumps(record) for record in records])
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
            table = csv.writer(stream)
            table.writerow(["title", "text", "labels"])
            table.writerows([r["title"], r["text"], "|".join(r["labels"])] for r in records)


def write_python_files(folder: Path) -> None:
    """src/ and venv/lib/python3.11/site-packages/: twelve modules whose identifiers follow a pattern."""
    for place in (folder / "src", folder / "venv/lib/python3.11/site-packages"):
        place.mkdir(parents=True)
        for i in range(12):
            lines = ["import os"]
            for j in range(30):
                lines += [
                    f"def function_{j}(value, other):",
                    f"    return os.path_{(i + j) % 7}(value) + other",
                ]
            write_lines(place / f"module_{i}.py", lines)


@pytest.fixture(scope="session")
def inputs(easy_data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small files of every format, under the names that the help texts use. Not to be written to."""
    folder = tmp_path_factory.mktemp("inputs")
    write_number_formats(folder, easy_data)
    write_text_formats(folder)
    write_python_files(folder)
    return folder


@pytest.fixture
def files(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `inputs` of the test's own, and the working directory."""
    shutil.copytree(inputs, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    return tmp_path / "files"


@pytest.fixture(scope="session")
def trained(easy_data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an index over `easy_data`'s 300 classes. Not to be written to."""
    out = tmp_path_factory.mktemp("trained") / "run"
    invoke_in_process("train", easy_data.path, "--out", out, *TRAIN_SMALL, *SMALL_INDEX)
    return out


@pytest.fixture(scope="session")
def text_run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over a data set made from text; the data set lies beside it, as ``data``. Not to be written to."""
    folder = tmp_path_factory.mktemp("text")
    invoke_in_process("prepare", "jsonl", inputs / "items.jsonl", "--out", folder / "data")
    invoke_in_process("train", folder / "data", "--out", folder / "run", *TRAIN_SMALL, "--mode", "exact")
    return folder / "run"
