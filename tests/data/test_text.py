"""JSON lines and CSV to data sets: what is fitted on what, and every kind of bad input."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from slidex.data import SPLIT_NAMES, split_of_rows
from slidex.data.text import prepare_csv, prepare_jsonl
from slidex.data.vectorizers import load_vectorizer
from slidex.errors import ConfigError, DataError

DEB = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "deb-deps-trixie"


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def labels_of(data, split):
    names, y = data.label_names(), data.split(split).y
    return [[names[c] for c in y.indices[y.indptr[i] : y.indptr[i + 1]]] for i in range(y.num_rows)]


RECORDS = [
    {"text": f"common word{i % 7} item{i}", "labels": [f"c{i % 5}", "all", f"c{i % 5}"]} for i in range(60)
]


def test_train_and_test_files(tmp_path):
    train = jsonl(
        tmp_path / "train.jsonl",
        [
            {"title": "red", "text": "apple pie", "labels": ["fruit", "fruit", 7]},
            {"title": "red", "text": "car", "labels": "machine; fruit ;"},
            {"title": "old", "text": "", "labels": []},
        ],
    )
    test = jsonl(tmp_path / "test.jsonl", [{"title": "red", "text": "train", "labels": ["fruit", "rail"]}])
    data = prepare_jsonl([train], tmp_path / "d", text_field="title,text", min_df=1, test=[test])
    data.verify()
    assert data.splits == ("train", "test")
    assert list(data.label_names()) == ["7", "fruit", "machine"]
    assert labels_of(data, "train") == [["7", "fruit"], ["fruit", "machine"], []]
    assert labels_of(data, "test") == [["fruit"]]
    assert data.meta["extra"] == {"labels_outside_classes": {"train": 0, "valid": 0, "test": 1}}
    assert list(data.feature_names()) == ["apple", "car", "old", "pie", "red"]
    vectorizer = load_vectorizer(data.path / "vectorizer")
    row, stored = vectorizer.transform(["red\napple pie"]), data.split("train").x.slice(0, 1)
    np.testing.assert_array_equal(row.indices, stored.indices)
    np.testing.assert_array_equal(row.values, stored.values)
    assert data.split("test").x.indices.tolist() == [4]  # "train" was in no training text


def test_random_split_is_the_rows_own_and_fits_on_training_rows_only(tmp_path):
    source = jsonl(tmp_path / "all.jsonl", RECORDS)
    data = prepare_jsonl(
        [source], tmp_path / "d", min_df=1, test_fraction=0.3, valid_fraction=0.2, seed=3, vectorizer="tfidf"
    )
    splits = split_of_rows(0, 60, 3, (0.2, 0.3))
    training_items = {f"item{i}" for i in np.flatnonzero(splits == 0)}
    assert {name for name in data.feature_names() if name.startswith("item")} == training_items
    for i, name in enumerate(SPLIT_NAMES):
        rows = np.flatnonzero(splits == i)
        assert labels_of(data, name) == [["all", f"c{row % 5}"] for row in rows]


@pytest.mark.parametrize("block", [1, 7, 60])
def test_block_size_changes_nothing(tmp_path, monkeypatch, block):
    source = jsonl(tmp_path / "all.jsonl", RECORDS)
    files = prepare_jsonl([source], tmp_path / "a").meta["files"]
    monkeypatch.setattr("slidex.data.text._BLOCK", block)
    assert prepare_jsonl([source], tmp_path / "b").meta["files"] == files


def test_rare_labels_are_no_classes(tmp_path):
    records = [{"text": "aa bb", "labels": ["often", f"once{i}"]} for i in range(4)]
    records[0]["labels"] += ["twice", "once0", "once0"]
    records[1]["labels"].append("twice")
    data = prepare_jsonl(
        [jsonl(tmp_path / "x.jsonl", records)], tmp_path / "d", min_label_count=2, test_fraction=0.0
    )
    assert list(data.label_names()) == ["often", "twice"]
    assert data.meta["extra"]["labels_outside_classes"]["train"] == 4
    assert data.splits == ("train",)


def test_rows_of_many_labels_are_in_order(tmp_path):
    records = [
        {"text": "aa bb", "labels": [f"c{(i * 37) % 300}" for i in range(j, j + 30)]} for j in range(270)
    ]
    data = prepare_jsonl([jsonl(tmp_path / "x.jsonl", records)], tmp_path / "d", test_fraction=0.0)
    assert labels_of(data, "train") == [sorted(record["labels"]) for record in records]


def test_hashing_needs_no_words(tmp_path):
    source = jsonl(tmp_path / "x.jsonl", RECORDS)
    data = prepare_jsonl([source], tmp_path / "d", vectorizer="hashing", max_features=64)
    assert (data.num_features, data.meta["vectorizer"], data.feature_names()) == (64, "hashing", None)


@pytest.mark.parametrize(("ending", "opener"), [(".gz", gzip.open), (".bz2", bz2.open), (".xz", lzma.open)])
def test_compressed_files(tmp_path, ending, opener):
    plain = jsonl(tmp_path / "x.jsonl", RECORDS)
    packed = tmp_path / f"y.jsonl{ending}"
    with opener(packed, "wb") as file:
        file.write(plain.read_bytes())
    a, b = (
        prepare_jsonl([path], tmp_path / name).meta["files"] for path, name in ((plain, "a"), (packed, "b"))
    )
    assert a == b
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(DataError, match=str(packed)):
        prepare_jsonl([packed], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_csv_equals_jsonl(tmp_path):
    table = tmp_path / "x.csv"
    table.write_bytes(
        b'\xef\xbb\xbftext|id|labels|title\r\n"two\nlines ""quoted"""|1|a; b|x\r\nlines|2|b|two\r\n'
    )
    source = jsonl(
        tmp_path / "x.jsonl",
        [
            {"title": "x", "text": 'two\nlines "quoted"', "labels": ["a", "b"]},
            {"title": "two", "text": "lines", "labels": ["b"]},
        ],
    )
    a = prepare_csv(
        [table], tmp_path / "a", delimiter="|", text_columns=["title", "text"], min_df=1, test_fraction=0.0
    )
    b = prepare_jsonl([source], tmp_path / "b", text_field="title,text", min_df=1, test_fraction=0.0)
    assert a.meta["files"] == b.meta["files"]
    assert list(a.feature_names()) == ["lines", "quoted", "two"]


GOOD = b'{"text": "aa bb", "labels": ["x"]}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x: expected at least one row"),
        (GOOD + b'{"text": \n', "x:2:10: expected a JSON object"),
        (GOOD + b"\n" + GOOD, "x:2:1: expected a JSON object"),
        (GOOD + b"[1]\n", "x:2:1: expected a JSON object, found list"),
        (GOOD + b'{"text": "aa"}\n', "x:2: expected a field 'labels', found text"),
        (GOOD + b'{"labels": "aa"}\n', "x:2: expected a field 'text', found labels"),
        (GOOD + b'{"text": 3, "labels": []}\n', "x:2: expected a string in field 'text', found 3"),
        (GOOD + b'{"text": null, "labels": []}\n', "x:2: expected a string in field 'text', found None"),
        (GOOD + b'{"text": "a", "labels": [1.5]}\n', r"x:2: .* in field 'labels', found \[1.5\]"),
        (GOOD + b'{"text": "a", "labels": [true]}\n', r"x:2: .* in field 'labels', found \[True\]"),
        (GOOD + b'{"text": "a", "labels": [""]}\n', r"x:2: .* in field 'labels', found \[''\]"),
        (GOOD + b'{"text": "a", "labels": {"b": 1}}\n', "x:2: .* in field 'labels', found"),
        (GOOD + b'{"text": "a\xff", "labels": []}\n', "x:2:12: expected UTF-8"),
        (b'{"text": "aa bb", "labels": []}\n', "x: expected a label on 1 or more training rows"),
    ],
)
def test_bad_jsonl(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare_jsonl([tmp_path / "x"], tmp_path / "d", min_df=1, test_fraction=0.0)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x: expected at least one row"),
        (b"text,labels\n", "x: expected at least one row"),
        (b"text,label\na,b\n", "x:1: expected a column 'labels', found text, label"),
        (b"text,labels\na,b\na,b,c\n", "x:3: expected 2 columns, found 3"),
        (b'text,labels\n"a\nb",c\nd\n', "x:4: expected 2 columns, found 1"),
        (b'text,labels\na,"b\n', "x:2: expected CSV"),
        (b"text,labels\naa,b\xe9\n", "x:2:5: expected UTF-8"),
    ],
)
def test_bad_csv(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare_csv([tmp_path / "x"], tmp_path / "d", min_df=1, test_fraction=0.0)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_csv_field_may_be_long(tmp_path):
    (tmp_path / "x").write_text("text,labels\n" + "long " * 100_000 + ",a\n")
    data = prepare_csv([tmp_path / "x"], tmp_path / "d", min_df=1, test_fraction=0.0)
    assert data.split("train").x.nnz == 1


@pytest.mark.parametrize(
    "options",
    [
        {"vectorizer": "word2vec"},
        {"min_label_count": 0},
        {"test": []},
        {"ngram_range": (2, 1)},
        {"test_fraction": 1.0},
        {"test_fraction": 0.6, "valid_fraction": 0.4},
        {"min_df": 0},
        {"text_field": "a,,b"},
        {"label_separator": ""},
    ],
)
def test_bad_settings(tmp_path, options):
    with pytest.raises(ConfigError, match="must"):
        prepare_jsonl([jsonl(tmp_path / "x", RECORDS)], tmp_path / "d", **options)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("delimiter", ["", ",,", '"', "\n"])
def test_bad_delimiter(tmp_path, delimiter):
    with pytest.raises(ConfigError, match="delimiter"):
        prepare_csv([tmp_path / "x"], tmp_path / "d", delimiter=delimiter)


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="expected a file, found none"):
        prepare_jsonl([tmp_path / "x"], tmp_path / "d")


def test_progress_reaches_the_end_of_both_passes(tmp_path):
    seen = []
    prepare_jsonl([jsonl(tmp_path / "x", RECORDS)], tmp_path / "d", progress=lambda **now: seen.append(now))
    size = (tmp_path / "x").stat().st_size
    assert seen[-1] == {"rows": 120, "bytes_done": 2 * size, "bytes_total": 2 * size}


@pytest.mark.skipif(not DEB.is_dir(), reason="no shared/data/deb-deps-trixie")
def test_debian_dependencies(tmp_path):
    with lzma.open(DEB / "test.jsonl.xz", "rb") as file:
        (tmp_path / "head.jsonl").write_bytes(b"".join(file.readline() for _ in range(2000)))
    data = prepare_jsonl([tmp_path / "head.jsonl"], tmp_path / "d", text_field="title,text")
    data.verify()
    rows = sum(counts["rows"] for counts in data.meta["splits"].values())
    assert rows == 2000
    assert data.num_classes > 1000
    assert data.split("train").y.nnz > 2 * data.split("train").num_rows
