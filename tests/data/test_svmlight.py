"""Text formats: equal to scikit-learn where that is right, an exact complaint where the text is wrong."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_svmlight_file

from slidex.data import Dataset, prepare_svmlight, prepare_xmc
from slidex.data.blocks import BadRow, Dialect, parse_block
from slidex.data.sources import SourceFile
from slidex.errors import ConfigError, DataError

EURLEX = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "eurlex-4k"
XMC = b"4 5 3\n2,0 0:1 4:.25\n 1:-2e-3\n\n1 3:7 # tail\n"

blanks = st.sampled_from([b" ", b"  ", b"\t", b" \t"])
numbers = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False).map(repr),
    st.floats(-1e38, 1e38).map(lambda value: f"{value:.16g}"),
    st.decimals(-1000, 1000, places=6).map(str),
    st.from_regex(r"[+-]?([0-9]{1,25}(\.[0-9]{0,25})?|\.[0-9]{1,25})([eE][+-]?[0-9]{1,2})?", fullmatch=True),
).map(str.encode)


@st.composite
def svmlight_rows(draw):
    lines = []
    for _ in range(draw(st.integers(1, 6))):
        labels = draw(st.lists(st.integers(0, 40), min_size=1, max_size=3))
        ids = sorted(draw(st.sets(st.integers(1, 50), max_size=6)))
        features = [b"%d:%s" % (i, draw(numbers)) for i in ids]
        line = draw(blanks).join([b",".join(b"%d" % label for label in labels), *features])
        lines.append(line + draw(st.sampled_from([b"", b" ", b" # 0:1 qid:2 \xff", b"\r"])))
        lines += draw(st.sampled_from([[], [b""], [b"# only a comment"]]))
    return b"\n".join(lines) + draw(st.sampled_from([b"", b"\n"]))


def finite_in_float32(text):
    with np.errstate(over="ignore"):
        return bool(np.isfinite(np.float32(float(text))))


@given(svmlight_rows())
@settings(max_examples=50, deadline=None, derandomize=True)
def test_rows_equal_scikit_learns_bit_for_bit(text):
    values = [token.split(b":")[1] for line in text.split(b"\n") for token in line.split(b"#")[0].split()[1:]]
    if not all(finite_in_float32(value) for value in values):
        with pytest.raises(BadRow, match="finite as float32"):
            parse_block(text + b"\n", Dialect(first_feature=1, skip_blank=True))
        return
    block = parse_block(text + b"\n", Dialect(first_feature=1, skip_blank=True))
    want, labels = load_svmlight_file(io.BytesIO(text), multilabel=True, zero_based=False, dtype=np.float32)
    np.testing.assert_array_equal(block.x.indptr, want.indptr)
    np.testing.assert_array_equal(block.x.indices, want.indices)
    np.testing.assert_array_equal(block.x.values.view(np.int32), want.data.view(np.int32))
    got = [block.y.indices[a:b].tolist() for a, b in zip(block.y.indptr, block.y.indptr[1:], strict=False)]
    assert got == [sorted({int(label) for label in row}) for row in labels]


@given(st.lists(numbers, min_size=1, max_size=200))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_numbers_equal_pythons(tokens):
    tokens = [token for token in tokens if finite_in_float32(token)]
    text = b" ".join(b"%d:%s" % item for item in enumerate(tokens)) + b"\n"
    want = np.array([float(token) for token in tokens]).astype(np.float32)
    got = parse_block(text, Dialect()).x.values
    np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32))


@pytest.mark.parametrize("digits", [15, 16, 18, 25])
def test_values_next_to_the_midpoint_of_two_floats_round_as_pythons_do(digits):
    rng = np.random.default_rng(digits)
    below = np.ldexp(rng.integers(2**23, 2**24, 3000) + 0.5, rng.integers(-120, 100, 3000))
    near = np.concatenate([below, np.nextafter(below, 0), np.nextafter(below, np.inf)])
    tokens = [f"{value:.{digits}e}" for value in near] + [
        f"{value:.{digits}f}" for value in near if value < 1e9
    ]
    text = " ".join(f"{i}:{token}" for i, token in enumerate(tokens)) + "\n"
    want = np.array([float(token) for token in tokens]).astype(np.float32)
    np.testing.assert_array_equal(parse_block(text.encode(), Dialect()).x.values, want)


def test_xmc_rows_headers_blanks_and_names(tmp_path):
    (tmp_path / "a.txt").write_bytes(XMC + b"\n\r\n")
    (tmp_path / "labels").write_bytes("x\r\ny z\né".encode())
    data = prepare_xmc(tmp_path / "a.txt", tmp_path / "d", label_names=tmp_path / "labels")
    data.verify()
    split = data.split("train")
    assert (data.num_features, data.num_classes) == (5, 3)
    assert (
        split.x.to_scipy().toarray().tolist()
        == np.float32([[1, 0, 0, 0, 0.25], [0, -0.002, 0, 0, 0], [0] * 5, [0, 0, 0, 7, 0]]).tolist()
    )
    assert split.y.to_scipy().toarray().tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 0], [0, 1, 0]]
    assert data.meta["splits"]["train"]["rows_without_labels"] == 2
    assert data.meta["source"]["format"] == "xmc"
    assert list(data.label_names()) == ["x", "y z", "é"]


def big_xmc(num_rows):
    rng = np.random.default_rng(0)
    lines = [b"%d 1000 50" % num_rows]
    for _ in range(num_rows):
        ids = np.sort(rng.choice(1000, rng.integers(0, 30), replace=False))
        labels = b",".join(b"%d" % label for label in rng.integers(0, 50, rng.integers(0, 4)))
        lines.append(labels + b"".join(b" %d:%.5f" % (i, rng.normal()) for i in ids))
    return b"\n".join(lines) + b"\n"


def same_split(one, other):
    for a, b in ((one.x, other.x), (one.y, other.y)):
        np.testing.assert_array_equal(a.indptr, b.indptr)
        np.testing.assert_array_equal(a.indices, b.indices)
    np.testing.assert_array_equal(one.x.values, other.x.values)


@pytest.mark.parametrize("block_bytes", [1, 100, 5000])
def test_any_block_size_compression_and_threads_give_the_same(tmp_path, monkeypatch, block_bytes):
    text = big_xmc(200)
    (tmp_path / "a.txt").write_bytes(text)
    whole = prepare_xmc(tmp_path / "a.txt", tmp_path / "whole").split("train")
    blocks = SourceFile.blocks
    monkeypatch.setattr(SourceFile, "blocks", lambda self: blocks(self, block_bytes))
    (tmp_path / "a.xz").write_bytes(lzma.compress(text))
    (tmp_path / "a.gz").write_bytes(gzip.compress(text))
    (tmp_path / "a.bz2").write_bytes(bz2.compress(text[:-1]))
    for name, threads in (("a.txt", 1), ("a.xz", 2), ("a.gz", 3), ("a.bz2", None)):
        same_split(
            prepare_xmc(tmp_path / name, tmp_path / f"{name}.d", threads=threads).split("train"), whole
        )


def test_splits_by_file_by_list_and_by_fraction(tmp_path):
    text = big_xmc(300)
    (tmp_path / "a.txt").write_bytes(text)
    whole = prepare_xmc(tmp_path / "a.txt", tmp_path / "whole").split("train")
    (tmp_path / "tst").write_bytes(b"7 9\n300 1\n1 2\n")
    data = prepare_xmc(
        tmp_path / "a.txt", tmp_path / "listed", split_file=tmp_path / "tst", valid_fraction=0.2
    )
    assert data.splits == ("train", "valid", "test")
    test = data.split("test")
    np.testing.assert_array_equal(test.x.indices, whole.x.take(np.array([0, 6, 299])).indices)
    assert sum(counts["rows"] for counts in data.meta["splits"].values()) == 300
    assert 30 < data.split("valid").num_rows < 90
    both = prepare_xmc(tmp_path / "a.txt", tmp_path / "both", test=tmp_path / "a.txt")
    same_split(both.split("test"), whole)
    parts = [prepare_xmc(tmp_path / "a.txt", tmp_path / f"f{s}", test_fraction=0.5, seed=s) for s in (1, 2)]
    assert not np.array_equal(parts[0].split("test").y.indices, parts[1].split("test").y.indices)


def test_svmlight_bases_and_widths(tmp_path):
    (tmp_path / "one").write_bytes(b"1 1:5 # 0:1\n\n# note\n0,2 3:6\n")
    (tmp_path / "zero").write_bytes(b"1 2:5\n1 00:1\n")

    def prepare(name, out, **options):
        return prepare_svmlight(tmp_path / name, tmp_path / out, **options)

    data = prepare("one", "a")
    assert (data.num_features, data.num_classes, data.split("train").num_rows) == (3, 3, 2)
    assert data.split("train").x.indices.tolist() == [0, 2]
    assert prepare("zero", "b").split("train").x.indices.tolist() == [2, 0]
    assert prepare("one", "c", test=tmp_path / "zero").split("train").x.indices.tolist() == [1, 3]
    assert prepare("one", "d", zero_based=True).num_features == 4
    wide = prepare("one", "e", num_features=10, num_classes=20)
    assert (wide.num_features, wide.num_classes) == (10, 20)
    with pytest.raises(DataError, match="zero:2:3: expected a feature id from 1 to 2147483647, found '00:1'"):
        prepare("zero", "f", zero_based=False)
    with pytest.raises(DataError, match="one:4:5: expected a feature id from 1 to 2, found '3:6'"):
        prepare("one", "g", num_features=2)
    with pytest.raises(ConfigError, match="'num_classes'"):
        prepare("one", "h", num_classes=0)


def test_skipped_lines_count_where_a_defect_is_placed(tmp_path, monkeypatch):
    blocks = SourceFile.blocks
    monkeypatch.setattr(SourceFile, "blocks", lambda self: blocks(self, 8))
    (tmp_path / "a").write_bytes(b"# one\n\n1 1:1\n# two\n\n1 2:x\n")
    with pytest.raises(DataError, match="a:6:3: expected feature:value"):
        prepare_svmlight(tmp_path / "a", tmp_path / "d")


def test_unsorted_rows_are_sorted_and_duplicates_merged_if_asked(tmp_path):
    (tmp_path / "a").write_bytes(b"1 5 4\n3,1,3,0 4:1 0:2 4:3.5 2:1 0:1\n")
    data = prepare_xmc(tmp_path / "a", tmp_path / "d", merge_duplicates=True)
    split = data.split("train")
    assert split.x.indices.tolist() == [0, 2, 4]
    assert split.x.values.tolist() == [3.0, 1.0, 4.5]
    assert split.y.indices.tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", r"a:1: expected a header 'rows features labels', found ''"),
        (b"\n", r"a:1: expected a header"),
        (b"2 3\n", r"a:1: expected a header 'rows features labels', found '2 3'"),
        (b"1,2 3:4\n", "a:1: expected a header"),
        (b"0 3 3\n", "a:1: expected at least one row"),
        (b"1 0 3\n1\n", "a:1: expected at least one row"),
        (b"1 3 99999999999\n1\n", "a:1: expected at least one row"),
        (b"3 3 3\n0 1:1\n1 1:1\n", "a:1: expected 3 rows as the header says, found 2"),
        (b"1 3 3\n", "a:1: expected 1 rows as the header says, found 0"),
        (b"1 3 3\n0 1:1\n\n1 1:1\n", "a:3: expected no more rows"),
        (b"1 3 3\n0 1:1\n\n1\n", "a:3: expected no more rows"),
        (b"1 3 3\n0 3:1\n", "a:2:3: expected a feature id from 0 to 2, found '3:1'"),
        (b"1 3 3\n0,3 1:1\n", "a:2:3: expected a class id below 3, found '3'"),
        (b"1 3 3\n0,99999999999999999999 1:1\n", "a:2:3: expected a class id below 3, found '9999"),
        (b"1 3 3\n-1 1:1\n", "a:2:1: expected class ids from 0 with commas between them, found '-1'"),
        (b"1 3 3\n1.5 1:1\n", "a:2:1: expected class ids from 0 with commas between them, found '1.5'"),
        (b"1 3 3\n1, 2 1:1\n", "a:2:3: expected class ids from 0 with commas between them, found ''"),
        (b"1 3 3\nabc 1:1\n", "a:2:1: expected class ids from 0 with commas between them, found 'abc'"),
        (b"1 3 3\n1 -1:1\n", "a:2:3: expected feature:value with a feature id from 0, found '-1:1'"),
        (b"1 3 3\n1 1.0:1\n", "a:2:3: expected feature:value with a feature id from 0, found '1.0:1'"),
        (b"1 3 3\n1 1:1 2\n", "a:2:7: expected feature:value with a feature id from 0, found '2'"),
        (b"1 3 3\n1 1: 2:1\n", "a:2:3: expected feature:value with a finite decimal value, found '1:'"),
        (b"1 3 3\n1 1:1:1\n", "a:2:3: expected feature:value with a finite decimal value, found '1:1:1'"),
        (b"1 3 3\n1 1:1_0\n", "a:2:3: expected feature:value with a finite decimal value, found '1:1_0'"),
        (b"1 3 3\n1 1:1e\n", "a:2:3: expected feature:value with a finite decimal value"),
        (b"1 3 3\n1 1:nan\n", "a:2:3: expected feature:value with a finite decimal value, found '1:nan'"),
        (b"1 3 3\n1 1:-inf\n", "a:2:3: expected feature:value with a finite decimal value, found '1:-inf'"),
        (b"1 3 3\n1 1:1e39\n", "a:2:3: expected a value that is finite as float32, found '1:1e39'"),
        (b"1 3 3\n1 1:1e999\n", "a:2:5: expected a value that is finite as float32, found '1e999'"),
        (b"1 3 3\n1 1:\xff\x00\n", r"a:2:3: expected feature:value with a finite decimal value, found '1:"),
        (b"1 3 3\n1 qid:3 1:1\n", "a:2:3: ranking data cannot be prepared: .* found 'qid:3'"),
        (b"2 3 3\n1\n\t1 01:1  2:4 1:3\n", r"a:3:14: expected each feature once .* found 1 again"),
        (b"1 3 3\n1 1:3e38 1:3e38\n", "expected each feature once"),
    ],
)
@pytest.mark.parametrize("block_bytes", [8, 1 << 20])
def test_every_defect_is_placed_and_leaves_nothing(tmp_path, monkeypatch, text, message, block_bytes):
    blocks = SourceFile.blocks
    monkeypatch.setattr(SourceFile, "blocks", lambda self: blocks(self, block_bytes))
    (tmp_path / "a").write_bytes(text)
    with pytest.raises(DataError, match=message):
        prepare_xmc(tmp_path / "a", tmp_path / "d", threads=2)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_merged_value_that_overflows_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"1 3 3\n1 1:3e38 1:3e38\n")
    with pytest.raises(DataError, match="finite values, found inf in row 0"):
        prepare_xmc(tmp_path / "a", tmp_path / "d", merge_duplicates=True)


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, {}, "a: expected a file, found none"),
        ({"a": XMC}, {"test": "b"}, "b: expected a file, found none"),
        ({"a": XMC, "b": b"1 6 3\n\n"}, {"test": "b"}, "b:1: expected 5 features as in training, found 6"),
        ({"a": XMC, "b": b"1 5 2\n\n"}, {"test": "b"}, "b:1: expected 3 labels as in training, found 2"),
        ({"a": XMC, "b": b"1\n5\n"}, {"split_file": "b"}, "b: expected row numbers up to 4, found 5"),
        (
            {"a": XMC, "b": b"1\n0\n"},
            {"split_file": "b"},
            "b:2: expected a row number of at least 1, found '0'",
        ),
        ({"a": XMC, "b": b"2\n2\n"}, {"split_file": "b"}, "b: expected each row number once, found 2 again"),
        ({"a": XMC, "b": b"\n"}, {"split_file": "b"}, "b: expected row numbers, found none"),
        ({"a": XMC, "b": b"1\n2\n3\n4\n"}, {"split_file": "b"}, "at least one training row"),
        ({"a": XMC, "b": b"x\ny\n"}, {"label_names": "b"}, "expected 3 names of labels, found 2"),
        ({"a": XMC, "b": b"x\n\xff\nz"}, {"label_names": "b"}, "b:2:1: expected UTF-8"),
    ],
)
def test_other_files_that_do_not_fit_are_refused(tmp_path, files, options, message):
    for name, text in files.items():
        (tmp_path / name).write_bytes(text)
    options = {key: tmp_path / name for key, name in options.items()}
    with pytest.raises(DataError, match=message):
        prepare_xmc(tmp_path / "a", tmp_path / "d", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".xz", lzma.compress), (".gz", gzip.compress), (".bz2", bz2.compress)]
)
def test_a_damaged_archive_is_refused(tmp_path, suffix, pack):
    packed = pack(big_xmc(100))
    file = tmp_path / f"a{suffix}"
    for damaged in (packed[:-20], packed[:40] + bytes(8) + packed[48:], b"", b"plain text"):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=f"a{suffix}"):
            prepare_xmc(file, tmp_path / "d")
        assert list(tmp_path.iterdir()) == [file]


def test_settings_that_contradict_are_refused(tmp_path):
    (tmp_path / "a").write_bytes(XMC)
    for options in (
        {"test": tmp_path / "a", "test_fraction": 0.5},
        {"valid_fraction": 1.0},
        {"seed": -1},
        {"threads": 0},
    ):
        with pytest.raises(ConfigError, match="parameter"):
            prepare_xmc(tmp_path / "a", tmp_path / "d", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_progress_reaches_the_end(tmp_path):
    (tmp_path / "a").write_bytes(b"1 1:1\n2 2:1\n")
    seen = []
    prepare_svmlight(tmp_path / "a", tmp_path / "d", progress=lambda **done: seen.append(done))
    assert seen[-1] == {"rows": 2, "bytes_done": 24, "bytes_total": 24}


@given(st.binary(max_size=60) | st.text(alphabet="0123 :,.-e#\n\r\tq", max_size=60).map(str.encode))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_bytes_are_rows_or_a_bad_row(text):
    data = text + b"\n"
    try:
        block = parse_block(data, Dialect(num_features=4, num_classes=4))
    except BadRow as bad:
        found = bad
    else:
        assert block.x.num_rows == block.y.num_rows == block.num_lines == data.count(b"\n")
        return
    assert 1 <= found.line <= data.count(b"\n")
    assert 1 <= found.column <= len(data.split(b"\n")[found.line - 1]) + 1


@pytest.mark.skipif(not EURLEX.is_dir(), reason="needs the shared EURLex-4K files")
def test_eurlex_equals_scikit_learns_reading(tmp_path):
    data = prepare_xmc(EURLEX / "train.txt.xz", tmp_path / "d", test=EURLEX / "test.txt.xz")
    assert (data.num_features, data.num_classes) == (5000, 3993)
    assert [data.split(name).num_rows for name in ("train", "test")] == [15539, 3809]
    text = lzma.decompress((EURLEX / "test.txt.xz").read_bytes())
    body = io.BytesIO(text[text.index(b"\n") + 1 :])
    want, labels = load_svmlight_file(
        body, multilabel=True, zero_based=True, n_features=5000, dtype=np.float32
    )
    split = Dataset.open(tmp_path / "d").split("test")
    assert (split.x.to_scipy() != want).nnz == 0
    np.testing.assert_array_equal(split.y.indices, np.concatenate([np.unique(row) for row in labels]))
