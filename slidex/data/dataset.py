"""Reading a prepared data set: one directory of memory-mapped CSR arrays described by ``meta.json``.

Opening is cheap whatever the size: sizes of files are compared, contents are not read. `Dataset.verify` reads
everything. Nothing here can execute code from a file: arrays are loaded with ``allow_pickle=False``.

The directory (``*`` is ``train``, ``test`` or ``valid``)::

    meta.json            format, version, counts, source, vectoriser, size and blake2b of every other file
    */x_indptr.npy       int64 (rows + 1,)
    */x_indices.npy      int32 (x_nnz,), strictly increasing within a row
    */x_values.npy       float32 (x_nnz,); absent where every value is 1
    */y_indptr.npy       int64 (rows + 1,)
    */y_indices.npy      int32 (y_nnz,), strictly increasing within a row
    labels.jsonl         optional: one JSON string a line, line i names class i
    features.jsonl       optional: likewise for features
    vectorizer/          optional: what is needed to vectorise new text the same way
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from slidex.data._rows import DEFECTS, ROWS_OK, check_rows
from slidex.data.csr import CsrArrays
from slidex.errors import DataError

FORMAT, VERSION = "slidex-dataset", 1
META_FILE = "meta.json"
_CHUNK = 1 << 24  # elements or bytes handled at a time where a whole array would be copied
_META_FIELDS = {
    "source": dict,
    "num_features": int,
    "num_classes": int,
    "splits": dict,
    "vectorizer": (str, type(None)),
    "extra": dict,
    "files": dict,
}
_SPLIT_FIELDS = ("rows", "x_nnz", "y_nnz", "rows_without_labels")


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """One part of a data set.

    Args:
        name: ``"train"``, ``"valid"`` or ``"test"``.
        x: Inputs, rows x num_features, memory-mapped.
        y: Labels, rows x num_classes, memory-mapped; no values.
    """

    name: str
    x: CsrArrays
    y: CsrArrays

    @property
    def num_rows(self) -> int:
        """Number of samples."""
        return self.x.num_rows


class NameList(Sequence[str]):
    """Names in a JSON-lines file, decoded one at a time: 8 bytes of memory a name, and the file mapped.

    Args:
        path: UTF-8 file with one JSON string a line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            size = path.stat().st_size
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        data = np.frombuffer(self._bytes, dtype=np.uint8)
        ends = [np.flatnonzero(data[i : i + _CHUNK] == ord("\n")) + (i + 1) for i in range(0, size, _CHUNK)]
        self._starts = np.concatenate([np.zeros(1, dtype=np.int64), *ends])

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        try:
            name = json.loads(self._bytes[self._starts[at] : self._starts[at + 1]])
        except ValueError as error:
            raise DataError(f"expected a JSON string: {error}", path=self._path, line=at + 1) from error
        if not isinstance(name, str):
            raise DataError(f"expected a JSON string, found {name!r}", path=self._path, line=at + 1)
        return name


class Dataset:
    """A prepared data set. Use `Dataset.open`.

    Attributes:
        path: The directory.
        meta: The contents of ``meta.json``.
        num_features: Width F of the inputs.
        num_classes: Number C of classes.
        splits: Names of the splits that are there; ``"train"`` always is.
    """

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path, self.meta = path, meta
        self.num_features: int = meta["num_features"]
        self.num_classes: int = meta["num_classes"]
        self.splits: tuple[str, ...] = tuple(meta["splits"])

    @staticmethod
    def open(path: str | Path) -> Dataset:
        """Open a prepared data set after comparing names and sizes of its files with ``meta.json``.

        Raises:
            DataError: ``meta.json`` is missing, malformed or of another format or version, or a file is
                missing or has another size.
        """
        path = Path(path)
        meta = _read_meta(path / META_FILE)
        for name, expected in meta["files"].items():
            file = path / name
            if not file.is_file():
                raise DataError("expected a file named in meta.json, found none", path=file)
            if (found := file.stat().st_size) != expected["bytes"]:
                raise DataError(f"expected {expected['bytes']} bytes, found {found}", path=file)
        return Dataset(path, meta)

    def verify(self) -> None:
        """Read everything: checksums, ids in range, rows in order, finite values.

        Raises:
            DataError: A file differs from its checksum or breaks the layout; names the file.
        """
        for name, expected in self.meta["files"].items():
            if (found := checksum(self.path / name)) != expected["blake2b"]:
                raise DataError(
                    f"expected blake2b {expected['blake2b']}, found {found}", path=self.path / name
                )
        for name in self.splits:
            split = self.split(name)
            self._verify_rows(split.x, self.path / name / "x_indices.npy")
            self._verify_rows(split.y, self.path / name / "y_indices.npy")
            if split.x.values is not None:
                for i in range(0, split.x.nnz, _CHUNK):
                    if not np.isfinite(split.x.values[i : i + _CHUNK]).all():
                        raise DataError(
                            "expected finite values, found NaN or infinity",
                            path=self.path / name / "x_values.npy",
                        )

    def _verify_rows(self, rows: CsrArrays, file: Path) -> None:
        largest, defect, row = check_rows(rows.indptr, rows.indices)
        if defect != ROWS_OK:
            raise DataError(f"{DEFECTS[defect]}: row {row} (from 0) breaks this", path=file)
        if largest >= rows.num_columns:
            raise DataError(f"expected ids below {rows.num_columns}, found {largest}", path=file)

    def split(self, name: str) -> Split:
        """One split, memory-mapped.

        Args:
            name: One of `splits`.

        Raises:
            DataError: There is no such split, or an array has another type or shape than ``meta.json`` says.
        """
        if name not in self.splits:
            raise DataError(
                f"expected a split named {name!r}, found {', '.join(self.splits)}", path=self.path
            )
        counts = self.meta["splits"][name]
        x = self._rows(name, "x", counts["rows"], counts["x_nnz"], self.num_features)
        y = self._rows(name, "y", counts["rows"], counts["y_nnz"], self.num_classes)
        return Split(name, x, y)

    def _rows(self, split: str, side: str, rows: int, nnz: int, columns: int) -> CsrArrays:
        values_name = f"{split}/{side}_values.npy"
        values = None
        if values_name in self.meta["files"]:
            values = _load(self.path / values_name, np.float32, nnz)
        indptr = _load(self.path / split / f"{side}_indptr.npy", np.int64, rows + 1)
        indices = _load(self.path / split / f"{side}_indices.npy", np.int32, nnz)
        if indptr[0] != 0 or indptr[-1] != nnz:
            raise DataError(
                f"expected offsets from 0 to {nnz}, found {indptr[0]} to {indptr[-1]}",
                path=self.path / split / f"{side}_indptr.npy",
            )
        if (indptr[1:] < indptr[:-1]).any():
            raise DataError("expected offsets that never fall", path=self.path / split / f"{side}_indptr.npy")
        return CsrArrays(indptr, indices, values, columns)

    def label_names(self) -> NameList | None:
        """Names of the classes, read on demand, or None where the source gave none."""
        return self._names("labels.jsonl", self.num_classes)

    def feature_names(self) -> NameList | None:
        """Names of the input features, read on demand, or None where the source gave none."""
        return self._names("features.jsonl", self.num_features)

    def _names(self, file: str, count: int) -> NameList | None:
        if file not in self.meta["files"]:
            return None
        names = NameList(self.path / file)
        if len(names) != count:
            raise DataError(f"expected {count} names, found {len(names)}", path=self.path / file)
        return names

    def class_counts(self) -> np.ndarray:
        """How many training samples carry each class: int64 (C,).

        Raises:
            DataError: A class id is out of range: the file was altered.
        """
        labels = self.split("train").y.indices
        counts = np.zeros(self.num_classes, dtype=np.int64)
        for i in range(0, len(labels), _CHUNK):
            block = labels[i : i + _CHUNK]
            if block.min() < 0 or block.max() >= self.num_classes:
                raise DataError(
                    f"expected class ids below {self.num_classes}, found {block.min()} to {block.max()}",
                    path=self.path / "train" / "y_indices.npy",
                )
            counts += np.bincount(block, minlength=self.num_classes)
        return counts


def checksum(path: Path) -> str:
    """The blake2b digest of a file: 256 bits in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def _load(path: Path, dtype: type, length: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"expected a .npy array: {error}", path=path) from error
    if array.dtype != dtype or array.shape != (length,):
        raise DataError(
            f"expected {np.dtype(dtype)} ({length},), found {array.dtype} {array.shape}", path=path
        )
    return array.view(np.ndarray)  # slicing np.memmap itself costs microseconds a time


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError("expected a prepared data set, found no meta.json", path=path.parent) from None
    except NotADirectoryError:
        raise DataError("expected the directory of a prepared data set", path=path.parent) from None
    except ValueError as error:
        raise DataError(f"expected JSON: {error}", path=path) from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else meta
        raise DataError(f'expected "format": {FORMAT!r}, found {found!r}', path=path)
    if meta.get("version") != VERSION:
        raise DataError(f'expected "version": {VERSION}, found {meta.get("version")!r}', path=path)
    for name, kind in _META_FIELDS.items():
        if not isinstance(meta.get(name), kind):
            raise DataError(
                f"expected a field {name!r} of the right type, found {meta.get(name)!r}", path=path
            )
    _check_counts(meta, path)
    return meta


def _check_counts(meta: dict[str, Any], path: Path) -> None:
    if "train" not in meta["splits"]:
        raise DataError("expected a split named 'train', found none", path=path)
    for split, counts in meta["splits"].items():
        for field in _SPLIT_FIELDS:
            if not isinstance(counts, dict) or not isinstance(counts.get(field), int) or counts[field] < 0:
                raise DataError(f"expected a count splits.{split}.{field} of 0 or more", path=path)
    for name, entry in meta["files"].items():
        if not (isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and "blake2b" in entry):
            raise DataError(f"expected bytes and blake2b for files.{name}, found {entry!r}", path=path)
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"expected a file inside the data set, found {name!r}", path=path)
