"""The npz format: equal to scipy's reading, streamed in any block size, every defect named."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import scipy.sparse as sp

from slidex.data import matrices, prepare_npz
from slidex.errors import ConfigError, DataError

X = sp.random(40, 30, 0.2, format="csr", random_state=0)
Y = sp.random(40, 12, 0.15, format="csr", random_state=1)


def save(folder, x=X, y=Y, prefix="", **options):
    sp.save_npz(folder / f"{prefix}x.npz", x, **options)
    sp.save_npz(folder / f"{prefix}y.npz", y, **options)
    return folder / f"{prefix}x.npz", folder / f"{prefix}y.npz"


def csr(data, indices, indptr, shape, dtype=float):
    matrix = sp.csr_matrix(shape)
    matrix.data = np.array(data, dtype=dtype)
    matrix.indices, matrix.indptr = np.array(indices, dtype=np.int64), np.array(indptr)
    return matrix


@pytest.mark.parametrize("kind", ["csr", "csc", "coo"])
@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("entries", [1, 20, 1 << 20])
def test_matrices_come_out_as_they_went_in(tmp_path, monkeypatch, kind, compressed, entries):
    monkeypatch.setattr(matrices, "_BLOCK_ENTRIES", entries)
    paths = save(tmp_path, X.asformat(kind), Y.asformat(kind), compressed=compressed)
    data = prepare_npz(*paths, tmp_path / "d", test_x=paths[0], test_y=paths[1])
    data.verify()
    assert (data.num_features, data.num_classes) == (30, 12)
    for name in ("train", "test"):
        split = data.split(name)
        assert (split.x.to_scipy() != X.astype(np.float32)).nnz == 0
        assert (split.y.to_scipy() != (Y > 0)).nnz == 0


def test_fractions_names_and_progress(tmp_path):
    (tmp_path / "names").write_text("\n".join(map(str, range(12))))
    seen = []
    data = prepare_npz(
        *save(tmp_path),
        tmp_path / "d",
        test_fraction=0.3,
        valid_fraction=0.3,
        label_names=tmp_path / "names",
        progress=lambda **done: seen.append(done),
    )
    assert data.splits == ("train", "valid", "test")
    assert sum(counts["rows"] for counts in data.meta["splits"].values()) == 40
    assert data.label_names()[11] == "11"
    assert seen[-1]["rows"] == 40
    assert seen[-1]["bytes_done"] == seen[-1]["bytes_total"]


def test_order_repeats_and_zeros(tmp_path):
    x = csr([1, 2, 3], [2, 0, 1], [0, 2, 3], (2, 3))
    y = csr([1, 0, 1, 5, 1], [3, 1, 0, 3, 2], [0, 4, 5], (2, 4))
    split = prepare_npz(*save(tmp_path, x, y), tmp_path / "d").split("train")
    assert split.x.indices.tolist() == [0, 2, 1]
    assert split.x.values.tolist() == [2, 1, 3]
    assert split.y.indices.tolist() == [0, 3, 2]
    assert split.y.indptr.tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[:39]}, "y.npz: expected 39 rows as in .*x.npz, found 2"),
        ({"x": X[:0], "y": Y[:0]}, "x.npz: expected rows, found none"),
        ({"x": csr([1, np.nan], [0, 1], [0, 1, 2], (2, 3))}, "finite as float32, found nan in row 1"),
        ({"x": csr([1, 1e39], [0, 1], [0, 0, 2], (2, 3))}, "finite as float32, found inf in row 1"),
        ({"x": csr([1, 1], [0, 3], [0, 1, 2], (2, 3))}, "ids from 0 to 2, found 3 in row 1"),
        ({"x": csr([1, 1], [0, 2**32], [0, 1, 2], (2, 3))}, "ids from 0 to 2, found 4294967296"),
        ({"x": csr([1, 1], [-1, 2], [0, 1, 2], (2, 3))}, "ids from 0 to 2, found -1 in row 0"),
        ({"x": csr([1, 1], [2, 2], [0, 0, 2], (2, 3))}, "column once in a row, found 2 again in row 1"),
        ({"x": csr([1, 1], [0, 2], [0, 2, 1], (2, 3))}, "x.npz: expected"),
        ({"x": csr([1, 1], [0, 2], [0, 3, 2], (2, 3))}, "x.npz: expected row offsets of 2 rows"),
        ({"x": csr([1j, 1], [0, 2], [0, 1, 2], (2, 3), complex)}, "x.npz: expected a matrix"),
        ({"y": csr([1, -1], [0, 1], [0, 1, 2], (2, 3))}, "label values of 0 or more, found -1.0 in row 1"),
        ({"y": csr([1, np.nan], [0, 1], [0, 1, 2], (2, 3))}, "label values of 0 or more, found nan in row 1"),
        ({"y": csr([1, 1], [0, 9], [0, 1, 2], (2, 3))}, "y.npz: expected column ids from 0 to 2, found 9"),
        ({"y": csr([], [], [0, 0, 0], (2, 0))}, "y.npz: expected 1 to 2147483647 columns, found 0"),
    ],
)
def test_every_defect_is_named_and_leaves_nothing(tmp_path, change, message):
    good = csr([1, 1], [0, 1], [0, 1, 2], (2, 3))
    paths = save(tmp_path, **({"x": good, "y": good} | change))
    with pytest.raises(DataError, match=message):
        prepare_npz(*paths, tmp_path / "d")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npz", "y.npz"]


def test_other_files_are_refused(tmp_path):
    x, y = save(tmp_path)
    content = x.read_bytes()
    damaged = [content[:-30], content[:200] + bytes(8) + content[208:], b"", b"text"]
    for bad in damaged:
        x.write_bytes(bad)
        with pytest.raises(DataError, match=r"x\.npz: expected"):
            prepare_npz(x, y, tmp_path / "d")
    np.savez(x, a=np.zeros(2))
    with pytest.raises(DataError, match="saved by scipy"):
        prepare_npz(x, y, tmp_path / "d")
    np.savez(x, format=np.array(["csr", object()], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="saved by scipy"):
        prepare_npz(x, y, tmp_path / "d")
    with pytest.raises(DataError, match="none: expected a file"):
        prepare_npz(tmp_path / "none", y, tmp_path / "d")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npz", "y.npz"]


def test_a_member_of_the_wrong_length_is_refused(tmp_path):
    x, y = save(tmp_path)
    with zipfile.ZipFile(x) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["data.npy"] = parts["data.npy"][:-8]
    with zipfile.ZipFile(x, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    with pytest.raises(DataError, match="an array ends early"):
        prepare_npz(x, y, tmp_path / "d")


def test_the_test_pair_must_fit(tmp_path):
    x, y = save(tmp_path)
    narrow_x, narrow_y = save(tmp_path, X[:, :29], Y[:, :11], prefix="narrow-")
    with pytest.raises(DataError, match=r"narrow-x\.npz: expected 30 columns as in training, found 29"):
        prepare_npz(x, y, tmp_path / "d", test_x=narrow_x, test_y=y)
    with pytest.raises(DataError, match=r"narrow-y\.npz: expected 12 columns as in training, found 11"):
        prepare_npz(x, y, tmp_path / "d", test_x=x, test_y=narrow_y)
    with pytest.raises(ConfigError, match="'test_x' and 'test_y'"):
        prepare_npz(x, y, tmp_path / "d", test_x=x)
    with pytest.raises(ConfigError, match="'test_fraction'"):
        prepare_npz(x, y, tmp_path / "d", test_x=x, test_y=y, test_fraction=0.5)
    assert not (tmp_path / "d").exists()
