"""The data room's directory: round trip, every check on opening, and nothing half-written."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidex.data import CsrArrays, Dataset, DatasetWriter, split_of_rows
from slidex.errors import ConfigError, DataError

SOURCE = {"format": "test", "files": [], "options": {}}


def rows(lists, columns, values=None):
    indptr = np.cumsum([0, *map(len, lists)]).astype(np.int64)
    indices = np.array([i for row in lists for i in row], dtype=np.int32)
    return CsrArrays(indptr, indices, None if values is None else np.array(values, dtype=np.float32), columns)


X = rows([[0, 2], [], [1]], 3, [0.5, -2.0, 3.0])
Y = rows([[1], [0, 3], []], 4)


def write(out, *, x=X, y=Y, num_features=3, num_classes=4, names=None, **options):
    with DatasetWriter(out, **options) as writer:
        writer.append("train", x, y)
        writer.append("test", x.slice(0, 0), y.slice(0, 0))
        if names is not None:
            writer.write_names("labels", names)
        return writer.finish(num_features=num_features, num_classes=num_classes, source=SOURCE)


def test_round_trip_is_exact_and_mapped(tmp_path):
    names = ["a", 'quote " newline \n', "é\u2028\ud800", ""]
    data = write(tmp_path / "d", names=names)
    data.verify()
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    assert data.splits == ("train", "test")
    assert data.meta["splits"]["train"] == {"rows": 3, "x_nnz": 3, "y_nnz": 3, "rows_without_labels": 1}
    split = data.split("train")
    for got, want in ((split.x, X), (split.y, Y)):
        np.testing.assert_array_equal(got.indptr, want.indptr)
        np.testing.assert_array_equal(got.indices, want.indices)
        assert type(got.indices) is np.ndarray
        assert isinstance(got.indices.base, np.memmap)
        assert not got.indices.flags.writeable
    np.testing.assert_array_equal(split.x.values, X.values)
    assert split.y.values is None
    assert data.split("test").num_rows == 0
    assert list(data.label_names()) == names
    assert data.label_names()[-2:] == names[-2:]
    assert data.feature_names() is None
    assert data.class_counts().tolist() == [1, 1, 0, 1]


def test_values_that_are_all_one_are_not_stored(tmp_path):
    x = rows([[0], [1], [2]], 3, [1.0, 1.0, 1.0])
    assert write(tmp_path / "d", x=x).split("train").x.values is None
    x.values[1] = 2.0
    assert write(tmp_path / "e", x=x).split("train").x.values.tolist() == [1.0, 2.0, 1.0]
    with DatasetWriter(tmp_path / "f") as writer:  # the part that is all ones comes last
        for part in (slice(0, 2), slice(2, 3)):
            writer.append("train", x.slice(part.start, part.stop), Y.slice(part.start, part.stop))
        data = writer.finish(num_features=3, num_classes=4, source=SOURCE)
    assert data.split("train").x.values.tolist() == [1.0, 2.0, 1.0]


@given(
    lists=st.lists(st.sets(st.integers(0, 30), max_size=5).map(sorted), min_size=1, max_size=12),
    cut=st.integers(0, 12),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_appending_in_parts_equals_appending_whole(tmp_path_factory, lists, cut):
    x, y = rows(lists, 31), rows(lists[::-1], 31)
    cut = min(cut, len(lists))
    folder = tmp_path_factory.mktemp("parts")
    with DatasetWriter(folder / "d") as writer:
        for part in (slice(0, cut), slice(cut, len(lists))):
            writer.append("train", x.slice(part.start, part.stop), y.slice(part.start, part.stop))
        data = writer.finish(num_features=31, num_classes=31, source=SOURCE)
    split = data.split("train")
    for got, want in ((split.x, x), (split.y, y)):
        np.testing.assert_array_equal(got.indptr, want.indptr)
        np.testing.assert_array_equal(got.indices, want.indices)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": rows([[0, 2], [], [3]], 4, [1, 2, 3])}, "feature ids below 3 in split 'train', found 3"),
        ({"y": rows([[1], [0, 4], []], 5)}, "class ids below 4 in split 'train', found 4"),
        ({"x": rows([[2, 0], [], [1]], 3, [1, 2, 3])}, "strictly increasing within a row: row 0"),
        ({"x": rows([[0, 0], [], [1]], 3, [1, 2, 3])}, "strictly increasing within a row: row 0"),
        ({"y": rows([[1], [-1, 3], []], 4)}, "class ids must be 0 or more: row 1"),
        ({"x": rows([[0, 2], [], [1]], 3, [1, 2, np.nan])}, "found nan in row 2"),
        ({"x": rows([[0, 2], [], [1]], 3, [1, -np.inf, 1])}, "found -inf in row 0"),
        ({"y": rows([[1]], 4)}, r"of inputs \(3\), found 1"),
        ({"x": rows([], 3), "y": rows([], 4)}, "at least one training row"),
        ({"names": ["only", "two"]}, "expected 4 names of labels, found 2"),
        ({"num_features": 2**31}, "between 1 and 2147483647 features"),
    ],
)
def test_bad_rows_are_refused_and_leave_nothing(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        write(tmp_path / "d", **change)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, None])
def test_an_unfinished_writer_leaves_nothing(tmp_path, error):
    def leave():
        with DatasetWriter(tmp_path / "d") as writer:
            writer.append("train", X, Y)
            (writer.path / "vectorizer").mkdir()
            if error:
                raise error

    if error:
        with pytest.raises(error):
            leave()
    else:
        leave()
    assert list(tmp_path.iterdir()) == []


def test_overwriting(tmp_path):
    out = tmp_path / "d"
    out.mkdir()
    write(out)
    with pytest.raises(ConfigError, match="unless overwriting is asked for"):
        write(out)
    with pytest.raises(DataError):
        write(out, num_features=1, overwrite=True)
    Dataset.open(out).verify()
    assert write(out, num_features=9, overwrite=True).num_features == 9
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_what_is_no_data_set_is_never_overwritten(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "meta.json").write_text("[]")
    (tmp_path / "file").write_text("x")
    for name in ("precious", "file"):
        with pytest.raises(ConfigError, match="'out' parameter"):
            write(tmp_path / name, overwrite=True)
    with pytest.raises(ConfigError, match="directory that exists"):
        write(tmp_path / "no" / "such")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "precious"]


def test_extra_files_are_part_of_the_set(tmp_path):
    with DatasetWriter(tmp_path / "d") as writer:
        writer.append("train", X, Y)
        (writer.path / "vectorizer").mkdir()
        (writer.path / "vectorizer" / "state.json").write_text("{}")
        assert writer.largest_ids == (2, 3)
        data = writer.finish(num_features=3, num_classes=4, source=SOURCE, vectorizer="tfidf", extra={"a": 1})
    assert data.meta["vectorizer"] == "tfidf"
    assert data.meta["extra"] == {"a": 1}
    (data.path / "vectorizer" / "state.json").write_text("[]")
    with pytest.raises(DataError, match=r"state\.json: expected blake2b"):
        Dataset.open(data.path).verify()


def test_every_missing_cut_or_altered_file_is_named(tmp_path):
    data = write(tmp_path / "d", names=list("abcd"))
    for name in data.meta["files"]:
        file = data.path / name
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(DataError, match=f"{name}: expected a file named in meta.json"):
            Dataset.open(data.path)
        file.write_bytes(content[:-1])
        with pytest.raises(
            DataError, match=f"{name}: expected {len(content)} bytes, found {len(content) - 1}"
        ):
            Dataset.open(data.path)
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(DataError, match=f"{name}: expected blake2b"):
            Dataset.open(data.path).verify()
        file.write_bytes(content)
    Dataset.open(data.path).verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "expected \"format\": 'slidex-dataset', found 'other'"),
        ({"version": 2}, 'expected "version": 1, found 2'),
        ({"num_classes": "4"}, "'num_classes' of the right type"),
        ({"splits": {}}, "split named 'train'"),
        ({"splits": {"train": {"rows": -1}}}, r"splits\.train\.rows"),
        ({"files": {"../x": {"bytes": 1, "blake2b": ""}}}, "inside the data set"),
        ({"files": {"x": 1}}, "bytes and blake2b"),
    ],
)
def test_meta_is_checked(tmp_path, change, message):
    data = write(tmp_path / "d")
    (data.path / "meta.json").write_text(json.dumps(data.meta | change))
    with pytest.raises(DataError, match=message):
        Dataset.open(data.path)


def test_what_is_no_data_set_is_not_opened(tmp_path):
    with pytest.raises(DataError, match=r"found no meta\.json"):
        Dataset.open(tmp_path)
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(DataError, match="expected JSON"):
        Dataset.open(tmp_path)
    with pytest.raises(DataError, match="directory"):
        Dataset.open(tmp_path / "meta.json")


@pytest.mark.parametrize("array", [np.zeros(4, dtype=np.int32), np.zeros(5, dtype=np.int64), np.full(4, 7)])
def test_an_array_that_differs_from_meta_is_refused(tmp_path, array):
    data = write(tmp_path / "d")
    np.save(data.path / "train" / "x_indptr.npy", array)
    with pytest.raises(DataError, match=r"x_indptr\.npy: expected"):
        data.split("train")
    with pytest.raises(DataError, match="expected a split named 'valid', found train, test"):
        data.split("valid")


def test_verify_finds_what_checksums_cannot(tmp_path, monkeypatch):
    data = write(tmp_path / "d")
    monkeypatch.setattr(
        "slidex.data.dataset.checksum", lambda path: data.meta["files"][key(data, path)]["blake2b"]
    )
    for name, bad, message in (
        ("x_indices.npy", np.array([0, 3, 1], dtype=np.int32), "ids below 3, found 3"),
        ("x_indices.npy", np.array([0, 0, 1], dtype=np.int32), "strictly increasing"),
        ("x_values.npy", np.array([0, np.nan, 1], dtype=np.float32), "found NaN"),
    ):
        file = data.path / "train" / name
        good = np.load(file)
        np.save(file, bad)
        with pytest.raises(DataError, match=message):
            data.verify()
        np.save(file, good)
    data.verify()


def key(data, path):
    return path.relative_to(data.path).as_posix()


def test_row_split_streams_and_follows_fractions_and_seed():
    whole = split_of_rows(0, 20_000, 7, (0.1, 0.2))
    parts = [split_of_rows(first, 20_000 - first if first else 3, 7, (0.1, 0.2)) for first in (0, 3)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert np.bincount(whole) / len(whole) == pytest.approx([0.7, 0.1, 0.2], abs=0.015)
    assert (whole != split_of_rows(0, 20_000, 8, (0.1, 0.2))).any()
    assert not split_of_rows(5, 4, 7, (0.0, 0.0)).any()
    for fractions in ((-0.1, 0.0), (0.0, 1.0), (0.6, 0.5), (float("nan"), 0.0)):
        with pytest.raises(ConfigError):
            split_of_rows(0, 1, 7, fractions)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("y_indices", 2**30, "expected class ids below"),
        ("y_indices", -1, "expected class ids below"),
        ("x_indptr", 2**40, "expected offsets that never fall"),
    ],
)
def test_an_altered_array_is_found_before_a_kernel_reads_it(tmp_path, name, value, message):
    x = CsrArrays(np.array([0, 1, 2, 3]), np.array([0, 1, 2], np.int32), None, 3)
    with DatasetWriter(tmp_path / "data") as writer:
        writer.append("train", x, x)
        data = writer.finish(
            num_features=3, num_classes=3, source={"format": "t", "files": [], "options": {}}
        )
    file = data.path / "train" / f"{name}.npy"
    array = np.load(file)
    array[1] = value
    np.save(file, array)
    with pytest.raises(DataError, match=message):
        Dataset.open(data.path).class_counts()
