"""`slidex prepare`: every format from file to data set, and bad input as one clear line with nothing left behind."""

from __future__ import annotations

import json

import numpy as np
import pytest

from slidex.data import Dataset


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


GOOD = {
    "xmc with a test file": ("xmc train.txt --test test.txt", (300, 60)),
    "xmc with a split file": ("xmc all.txt.xz --split-file tst_split.txt", (240, 60)),
    "svmlight": ("svmlight train.svm --test test.svm --one-based --num-features 320", (300, 60)),
    "npz": ("npz x.npz y.npz --test-x tx.npz --test-y ty.npz", (300, 60)),
    "jsonl": ("jsonl train.jsonl --test test.jsonl --text-field title,text", (120, 30)),
    "jsonl, hashed": (
        "jsonl train.jsonl --test test.jsonl --vectorizer hashing --max-features 64",
        (120, 30),
    ),
    "csv": ("csv train.csv --test test.csv --label-separator |", (120, 30)),
}


@pytest.mark.parametrize("name", GOOD)
def test_every_format(invoke, files, easy_data, name):
    command, (train_rows, test_rows) = GOOD[name]
    result = invoke("prepare", *command.split(), "--out", "data")
    assert result.stdout == ""
    assert f"{train_rows} train, {test_rows} test rows" in result.stderr
    data = Dataset.open("data")
    data.verify()
    train, test = data.split("train"), data.split("test")
    assert (train.num_rows, test.num_rows) == (train_rows, test_rows)
    if name.startswith(("xmc with a test", "svmlight", "npz")):
        for made, split in ((train, "train"), (test, "test")):
            np.testing.assert_array_equal(
                made.x.indices, easy_data.split(split).x.slice(0, made.num_rows).indices
            )
            np.testing.assert_array_equal(
                made.y.indices, easy_data.split(split).y.slice(0, made.num_rows).indices
            )
    elif name.startswith(("jsonl", "csv")):
        assert list(data.label_names()) == ["even", "fruit", "metal", "odd", "sky"]
        assert "vectorizer/" in "".join(data.meta["files"])


def test_python_source(invoke, files):
    invoke("prepare", "python-source", "src", "--out", "data", "--test-fraction", "0.3", "--max-files", "8")
    data = Dataset.open("data")
    assert {"function_1", "value", "os"} <= set(data.label_names())
    assert sum(data.meta["extra"]["files"].values()) == 8
    assert data.split("test").num_rows > 0


def test_python_source_defaults_to_the_standard_library(invoke, files, monkeypatch):
    monkeypatch.setattr("slidex.data.standard_library_directory", lambda: files / "src")
    monkeypatch.setenv("SLIDEX_PREPARE_PYTHON_SOURCE_MAX_FILES", "5")
    invoke("prepare", "python-source", "--out", "data")
    meta = Dataset.open("data").meta
    assert sum(meta["extra"]["files"].values()) == 5
    assert meta["source"]["files"] == [str(files / "src")]


def test_names_fractions_and_a_tab(invoke, files):
    (files / "labels").write_text("".join(f"name {i}\n" for i in range(300)))
    options = ("--label-names", "labels", "--test-fraction", "0.2", "--valid-fraction", "0.1", "--seed", "3")
    invoke("prepare", "xmc", "train.txt", "--out", "data", *options)
    data = Dataset.open("data")
    assert data.splits == ("train", "valid", "test")
    assert data.label_names()[7] == "name 7"
    (files / "tabs.csv").write_text("text\tlabels\n" + "red car\tx;y\n" * 9)
    invoke("prepare", "csv", "tabs.csv", "--delimiter", r"\t", "--out", "tabs")
    assert list(Dataset.open("tabs").label_names()) == ["x", "y"]


def test_overwrite_replaces_only_when_the_new_data_set_is_complete(invoke, files):
    invoke("prepare", "xmc", "train.txt", "--out", "data")
    before = (files / "data/meta.json").read_bytes()
    result = invoke("prepare", "xmc", "test.txt", "--out", "data", code=2)
    assert "must be an empty or new directory unless overwriting is asked for" in result.stderr
    (files / "bad.txt").write_text("2 5 5\n1 0:1\n")
    invoke("prepare", "xmc", "bad.txt", "--out", "data", "--overwrite", code=3)
    assert (files / "data/meta.json").read_bytes() == before
    invoke("prepare", "xmc", "test.txt", "--out", "data", "--overwrite")
    assert Dataset.open("data").split("train").num_rows == 60


HEADER = "2 10 10\n"
BAD = {
    "a malformed row": ("xmc", HEADER + "1 0:1\n2 oops\n", 3, "bad:3:3: expected feature:value"),
    "a feature out of range": (
        "xmc",
        HEADER + "1 0:1\n2 10:1\n",
        3,
        "bad:3:3: expected a feature id from 0 to 9",
    ),
    "a label out of range": ("xmc", HEADER + "1 0:1\n10 3:1\n", 3, "bad:3:1: expected a class id below 10"),
    "a negative id": ("xmc", HEADER + "-1 0:1\n1 3:1\n", 3, "bad:2:1: expected class ids from 0"),
    "NaN": ("xmc", HEADER + "1 0:nan\n1 3:1\n", 3, "bad:2:3: expected"),
    "infinity": ("xmc", HEADER + "1 0:1\n1 3:1e99\n", 3, "bad:3:3: expected a value that is finite"),
    "a feature twice": ("xmc", HEADER + "1 0:1 0:2\n1 3:1\n", 3, "bad:2:7: expected each feature once"),
    "too few rows": ("xmc", HEADER + "1 0:1\n", 3, "bad:1: expected 2 rows as the header says, found 1"),
    "too many rows": ("xmc", HEADER + "1 0:1\n" * 3, 3, "bad:4: expected no more rows"),
    "no header": ("xmc", "1 0:1\n", 3, "bad:1: expected a header 'rows features labels'"),
    "nothing": ("xmc", "", 3, "bad:1: expected a header"),
    "an empty svmlight file": ("svmlight", "", 3, "bad: expected rows, found none"),
    "no JSON": (
        "jsonl",
        '{"text": "a", "labels": ["b"]}\n{"text": \n',
        3,
        "bad:2:10: expected a JSON object",
    ),
    "a missing field": ("jsonl", '{"words": "a", "labels": []}\n', 3, "bad:1: expected a field 'text'"),
    "an empty jsonl file": ("jsonl", "", 3, "bad: "),
    "not UTF-8": ("jsonl", b'{"text": "\xff"}\n', 3, "bad:1:11: expected UTF-8"),
    "a missing column": ("csv", "words,labels\na,b\n", 3, "bad:1: expected a column 'text'"),
    "another number of columns": ("csv", "text,labels\na,b\nc\n", 3, "bad:3: expected 2 columns, found 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(invoke, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    kind, content, code, message = BAD[name]
    (tmp_path / "bad").write_bytes(content if isinstance(content, bytes) else content.encode())
    result = invoke("prepare", kind, "bad", "--out", "data", code=code)
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert listing(tmp_path) == ["bad"]


WRONG = {
    "no such file": ("xmc nowhere.txt --out data", 3, "nowhere.txt: expected a file, found none"),
    "a folder for a file": ("xmc src --out data", 3, "src: expected a file, found none"),
    "a file for a folder": ("python-source train.txt --out data", 3, "train.txt: expected a directory"),
    "a folder without Python": ("python-source empty --out data", 3, "expected at least one .py file"),
    "no matrix": ("npz train.txt y.npz --out data", 3, "train.txt: expected"),
    "matrices of other sizes": ("npz x.npz ty.npz --out data", 3, "ty.npz: expected 300 rows as in x.npz"),
    "two ways to split": ("xmc train.txt --test test.txt --test-fraction .1 --out data", 2, "at most"),
    "a row number too high": (
        "xmc test.txt --split-file tst_split.txt --out data",
        3,
        "expected row numbers up to 60",
    ),
    "a bad fraction": ("xmc train.txt --valid-fraction 1.5 --out data", 2, "must be in [0, 1)"),
    "no fraction": ("xmc train.txt --valid-fraction nan --out data", 2, "must be in [0, 1)"),
    "nowhere to write": ("xmc train.txt --out no/such/folder", 2, "must be in a directory that exists"),
    "a file in the way": ("xmc train.txt --out test.txt", 2, "must be a directory or not exist"),
    "another folder in the way": ("xmc train.txt --overwrite --out src", 2, "must be a slidex data set"),
    "no --out": ("xmc train.txt", 2, "Missing option '--out'"),
    "an unknown format": ("parquet train.txt --out data", 2, "No such command 'parquet'"),
    "no classes left": ("jsonl items.jsonl --min-label-count 999 --out data", 3, "expected a label on 999"),
    "names too few": ("xmc train.txt --label-names test.txt --out data", 3, "expected 300 names of labels"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use(invoke, files, name):
    (files / "empty").mkdir()
    before = listing(files)
    command, code, message = WRONG[name]
    result = invoke("prepare", *command.split(), code=code)
    assert message in result.stderr
    assert "Error: " in result.stderr
    assert listing(files) == before


def test_a_cut_archive_is_bad_data(invoke, files):
    archive = files / "all.txt.xz"
    archive.write_bytes(archive.read_bytes()[:-200])
    result = invoke("prepare", "xmc", archive, "--out", "data", code=3)
    assert "all.txt.xz: expected a complete .xz file" in result.stderr
    assert not (files / "data").exists()


def test_meta_says_where_the_data_came_from(invoke, files):
    invoke("prepare", "xmc", "train.txt", "--test", "test.txt", "--out", "data")
    source = json.loads((files / "data/meta.json").read_text())["source"]
    assert source["format"] == "xmc"
    assert source["files"] == ["train.txt", "test.txt"]
