"""Writing a prepared data set: streamed, checksummed, and either complete or invisible.

Rows go straight to disk into a hidden sibling directory; memory use does not depend on the number of rows.
Only when every file is flushed, checksummed and synced is that directory renamed to its final name, so a
crash at any moment leaves the old state. The length in the header of a ``.npy`` file is filled in last: numpy
pads the header so that a longer first axis always fits.
"""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import numpy as np

from slidex.data._rows import DEFECTS, ROWS_OK, check_rows
from slidex.data.dataset import FORMAT, META_FILE, VERSION, Dataset, checksum
from slidex.data.splitting import SPLIT_NAMES
from slidex.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import TracebackType

    from slidex.data.csr import CsrArrays

_MAX_COLUMNS = 2**31 - 1  # ids are int32


class DatasetWriter:
    """Write one data set; a context manager.

    Leaving the ``with`` block without `finish`, by an exception or not, removes everything written.

    Args:
        out: Directory to create; its parent must exist. It must be absent or empty, unless `overwrite`.
        overwrite: Replace an existing data set, only after the new one is complete. A directory that holds
            anything else is never replaced.

    Attributes:
        path: The temporary directory. Files put here before `finish` (a ``vectorizer`` folder) become part of
            the data set, checksums included.

    Raises:
        ConfigError: `out` cannot be used.
    """

    def __init__(self, out: str | Path, *, overwrite: bool = False) -> None:
        self._out = Path(os.path.abspath(out))  # noqa: PTH100  (resolve() would follow a link at out)
        self._overwrite = overwrite
        _check_target(self._out, overwrite=overwrite)
        self.path = self._out.parent / f".{self._out.name}.tmp-{os.getpid()}"
        self._splits: dict[str, _SplitWriter] = {}
        self._names: dict[str, int] = {}

    def __enter__(self) -> Self:
        if self.path.exists():  # left by a dead process that had our number
            shutil.rmtree(self.path)
        self.path.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for split in self._splits.values():
                split.close()
        finally:
            if self.path.exists():  # gone once finished
                shutil.rmtree(self.path)

    def append(self, split: str, x: CsrArrays, y: CsrArrays) -> None:
        """Append rows to a split.

        Args:
            split: ``"train"``, ``"valid"`` or ``"test"``. Appending no rows creates an empty split.
            x: Inputs, (n, anything); ids strictly increasing within a row, finite values.
            y: Labels, (n, anything); ids strictly increasing within a row. Values are not stored.

        Raises:
            DataError: An id is negative or out of order, a value is not finite, or `x` and `y` differ in
                their number of rows.
            ConfigError: The name of the split is not one of the three.
        """
        if split not in SPLIT_NAMES:
            raise ConfigError(
                f"The 'split' parameter of DatasetWriter.append must be one of {', '.join(SPLIT_NAMES)}. "
                f"Got {split!r} instead."
            )
        if x.num_rows != y.num_rows:
            raise DataError(
                f"expected as many rows of labels as of inputs ({x.num_rows}), found {y.num_rows}"
            )
        if split not in self._splits:
            self._splits[split] = _SplitWriter(self.path / split)
        self._splits[split].append(x, y)

    def write_names(self, kind: str, names: Iterable[str]) -> None:
        """Write the names of classes or features, in the order of their ids.

        Args:
            kind: ``"labels"`` or ``"features"``.
            names: One for every id; counted against `finish`'s numbers.

        Raises:
            ConfigError: `kind` is neither.
        """
        if kind not in {"labels", "features"}:
            raise ConfigError(
                "The 'kind' parameter of DatasetWriter.write_names must be 'labels' or 'features'. "
                f"Got {kind!r} instead."
            )
        count = 0
        with (self.path / f"{kind}.jsonl").open("w", encoding="ascii", newline="\n") as file:
            for name in names:
                file.write(json.dumps(name) + "\n")
                count += 1
        self._names[kind] = count

    @property
    def largest_ids(self) -> tuple[int, int]:
        """Largest feature id and largest class id appended so far, -1 where there is none."""
        splits = self._splits.values()
        return (
            max((split.largest_feature for split in splits), default=-1),
            max((split.largest_class for split in splits), default=-1),
        )

    def finish(
        self,
        *,
        num_features: int,
        num_classes: int,
        source: Mapping[str, Any],
        vectorizer: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Dataset:
        """Check the totals, sync everything, and give the directory its final name.

        Args:
            num_features: Width F; every feature id must be below it.
            num_classes: C; every class id must be below it.
            source: Where the data came from: ``{"format": ..., "files": [...], "options": {...}}``.
            vectorizer: Kind of vectoriser kept in ``vectorizer/``.
            extra: Anything else, as JSON.

        Returns:
            The finished data set, opened.

        Raises:
            DataError: There are no training rows, an id is out of range, or the number of names is wrong.
        """
        self._check_totals(num_features, num_classes)
        splits = {name: self._splits[name].finish() for name in SPLIT_NAMES if name in self._splits}
        files = sorted(path for path in self.path.rglob("*") if path.is_file())
        with ThreadPoolExecutor(thread_name_prefix="slidex-seal") as pool:
            sealed = list(pool.map(_seal, files))
        meta = {
            "format": FORMAT,
            "version": VERSION,
            "source": dict(source),
            "num_features": num_features,
            "num_classes": num_classes,
            "splits": splits,
            "vectorizer": vectorizer,
            "extra": dict(extra or {}),
            "files": {
                file.relative_to(self.path).as_posix(): entry
                for file, entry in zip(files, sealed, strict=True)
            },
        }
        (self.path / META_FILE).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        _sync(self.path / META_FILE)
        for folder in (*(path for path in self.path.rglob("*") if path.is_dir()), self.path):
            _sync(folder)
        self._publish()
        return Dataset.open(self._out)

    def _check_totals(self, num_features: int, num_classes: int) -> None:
        if "train" not in self._splits or self._splits["train"].rows == 0:
            raise DataError("expected at least one training row, found none", path=self._out)
        for what, count in (("features", num_features), ("labels", num_classes)):
            if not 0 < count <= _MAX_COLUMNS:
                raise DataError(
                    f"expected between 1 and {_MAX_COLUMNS} {what}, found {count}", path=self._out
                )
            if what in self._names and self._names[what] != count:
                raise DataError(
                    f"expected {count} names of {what}, found {self._names[what]}", path=self._out
                )
        for name, split in self._splits.items():
            for what, largest, count in (
                ("feature", split.largest_feature, num_features),
                ("class", split.largest_class, num_classes),
            ):
                if largest >= count:
                    raise DataError(
                        f"expected {what} ids below {count} in split {name!r}, found {largest}",
                        path=self._out,
                    )

    def _publish(self) -> None:
        _check_target(self._out, overwrite=self._overwrite)
        old = self._out.parent / f".{self._out.name}.old-{os.getpid()}"
        if self._out.exists():
            self._out.rename(old)
        try:
            self.path.rename(self._out)
        except BaseException:
            if old.exists():
                old.rename(self._out)
            raise
        _sync(self._out.parent)
        if old.exists():
            shutil.rmtree(old)


class _SplitWriter:
    """The five arrays of one split, appended to in step."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._x_indptr = _ArrayFile(folder / "x_indptr.npy", np.int64)
        self._x_indices = _ArrayFile(folder / "x_indices.npy", np.int32)
        self._x_values = _ArrayFile(folder / "x_values.npy", np.float32)
        self._y_indptr = _ArrayFile(folder / "y_indptr.npy", np.int64)
        self._y_indices = _ArrayFile(folder / "y_indices.npy", np.int32)
        self._x_indptr.append(np.zeros(1))
        self._y_indptr.append(np.zeros(1))
        self._all_ones = True
        self.rows = self._x_nnz = self._y_nnz = self._rows_without_labels = 0
        self.largest_feature = self.largest_class = -1

    def append(self, x: CsrArrays, y: CsrArrays) -> None:
        self.largest_feature = max(self.largest_feature, self._check("feature", x))
        self.largest_class = max(self.largest_class, self._check("class", y))
        values = np.ones(x.nnz, dtype=np.float32) if x.values is None else x.values
        finite = np.isfinite(values)
        if not finite.all():
            at = int(np.argmin(finite))
            row = self.rows + int(np.searchsorted(x.indptr, at, side="right")) - 1
            raise DataError(
                f"expected finite values, found {values[at]} in row {row} (from 0) "
                f"of split {self._folder.name!r}"
            )
        self._all_ones = self._all_ones and bool((values == 1.0).all())
        self._x_indptr.append(x.indptr[1:] + self._x_nnz)
        self._x_indices.append(x.indices)
        self._x_values.append(values)
        self._y_indptr.append(y.indptr[1:] + self._y_nnz)
        self._y_indices.append(y.indices)
        self.rows += x.num_rows
        self._x_nnz += x.nnz
        self._y_nnz += y.nnz
        self._rows_without_labels += int(np.count_nonzero(np.diff(y.indptr) == 0))

    def _check(self, what: str, rows: CsrArrays) -> int:
        largest, defect, row = check_rows(rows.indptr, rows.indices)
        if defect != ROWS_OK:
            raise DataError(
                f"{what} {DEFECTS[defect]}: row {self.rows + row} (from 0) of split {self._folder.name!r} "
                "breaks this"
            )
        return largest

    def finish(self) -> dict[str, int]:
        self.close()
        if self._all_ones:
            (self._folder / "x_values.npy").unlink()
        return {
            "rows": self.rows,
            "x_nnz": self._x_nnz,
            "y_nnz": self._y_nnz,
            "rows_without_labels": self._rows_without_labels,
        }

    def close(self) -> None:
        for file in (self._x_indptr, self._x_indices, self._x_values, self._y_indptr, self._y_indices):
            file.close()


class _ArrayFile:
    """A one-dimensional ``.npy`` file that grows."""

    def __init__(self, path: Path, dtype: type) -> None:
        self._dtype = np.dtype(dtype)
        self._length = 0
        self._file: BinaryIO = path.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array, dtype=self._dtype)
        self._file.write(array.data)
        self._length += len(array)

    def close(self) -> None:
        if self._file.closed:
            return
        with self._file:
            self._file.seek(0)
            self._write_header()


def _check_target(out: Path, *, overwrite: bool) -> None:
    def refuse(constraint: str) -> ConfigError:
        return ConfigError(
            f"The 'out' parameter of DatasetWriter must be {constraint}. Got {str(out)!r} instead."
        )

    if not out.parent.is_dir():
        raise refuse("in a directory that exists")
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise refuse("a directory or not exist")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise refuse("an empty or new directory unless overwriting is asked for")
    try:
        known = json.loads((out / META_FILE).read_bytes()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        known = False
    if not known:
        raise refuse("a slidex data set where it is to be overwritten")


def _seal(path: Path) -> dict[str, int | str]:
    """Flush a file to the disk and describe it for ``meta.json``."""
    _sync(path)
    return {"bytes": path.stat().st_size, "blake2b": checksum(path)}


def _sync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
