"""Preparing a pair of scipy sparse matrices saved with `scipy.sparse.save_npz`.

A CSR file is read as a stream: the three arrays are members of a zip archive that are decompressed side by
side, so only the row offsets (8 bytes a row) are held whole. Other sparse formats have no rows to stream and are
converted by scipy in memory. Nothing is unpickled.
"""

from __future__ import annotations

import zipfile
import zlib
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from scipy.sparse import load_npz

from slidex.data._rows import sort_rows
from slidex.data.blocks import MAX_COLUMNS
from slidex.data.csr import CsrArrays
from slidex.data.sources import file_size, write_names
from slidex.data.splitting import SplitRule
from slidex.data.writer import DatasetWriter
from slidex.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from slidex.data.dataset import Dataset
    from slidex.data.splitting import Progress

_BLOCK_ENTRIES = 1 << 20


def prepare_npz(
    x: str | Path,
    y: str | Path,
    out: str | Path,
    *,
    test_x: str | Path | None = None,
    test_y: str | Path | None = None,
    test_fraction: float = 0.0,
    valid_fraction: float = 0.0,
    seed: int = 0,
    label_names: str | Path | None = None,
    feature_names: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Dataset:
    """Prepare matrices written by `scipy.sparse.save_npz`.

    Rows may be unsorted; a repeated feature in a CSR row is refused, a repeated label counts once. In `y` every
    stored positive value is a label, and a stored zero is none.

    Args:
        x: Inputs (N, F), real values.
        y: Labels (N, C).
        out: Directory to create.
        test_x: Test inputs (any rows, F).
        test_y: Test labels (as many rows, C).
        test_fraction: Share of the rows to set apart as test.
        valid_fraction: Share of the rows to set apart as valid.
        seed: Decides which rows the two fractions take.
        label_names: File with one name a line, line i for class i.
        feature_names: Likewise for features.
        overwrite: Replace an existing data set at `out`.
        progress: Called after every block; bytes are estimated from the share of rows.

    Returns:
        The prepared data set.

    Raises:
        DataError: A file is no such matrix, shapes do not fit, or a value or id is not allowed; nothing is left
            at `out`.
        ConfigError: Settings contradict each other, or `out` cannot be used.
    """
    if (test_x is None) != (test_y is None):
        raise ConfigError(
            "The 'test_x' and 'test_y' parameters of prepare_npz must be given together. "
            f"Got {test_x!r} and {test_y!r} instead."
        )
    if test_x is not None and test_fraction:
        raise ConfigError(
            "The 'test_fraction' parameter of prepare_npz must be 0 where test matrices are given. "
            f"Got {test_fraction!r} instead."
        )
    rule = SplitRule(seed, valid_fraction, test_fraction)
    pairs = [(Path(x), Path(y))]
    if test_x is not None and test_y is not None:
        pairs.append((Path(test_x), Path(test_y)))
    sizes = [sum(map(file_size, pair)) for pair in pairs]
    with DatasetWriter(out, overwrite=overwrite) as writer, ExitStack() as stack:
        matrices = [_Pair(_NpzRows(px, stack), _NpzRows(py, stack)) for px, py in pairs]
        num_features, num_classes = matrices[0].columns
        rows_before = 0
        for number, pair in enumerate(matrices):
            pair.check_columns(num_features, num_classes)
            for first, x_rows, y_rows in pair.blocks():
                if number == 0:
                    rule.append(writer, first, x_rows, y_rows)
                else:
                    writer.append("test", x_rows, y_rows)
                if progress is not None:
                    stop = first + x_rows.num_rows
                    done = sum(sizes[:number]) + sizes[number] * stop // pair.num_rows
                    progress(rows=rows_before + stop, bytes_done=done, bytes_total=sum(sizes))
            rows_before += pair.num_rows
        write_names(writer, label_names, feature_names)
        return writer.finish(
            num_features=num_features,
            num_classes=num_classes,
            source={
                "format": "npz",
                "files": [str(path) for pair in pairs for path in pair],
                "options": {"test_fraction": test_fraction, "valid_fraction": valid_fraction, "seed": seed},
            },
        )


class _Pair:
    """Inputs and labels of the same rows, read in step."""

    def __init__(self, x: _NpzRows, y: _NpzRows) -> None:
        if y.num_rows != x.num_rows:
            raise DataError(f"expected {x.num_rows} rows as in {x.path}, found {y.num_rows}", path=y.path)
        if not x.num_rows:
            raise DataError("expected rows, found none", path=x.path)
        self._x, self._y, self.num_rows = x, y, x.num_rows

    @property
    def columns(self) -> tuple[int, int]:
        return self._x.num_columns, self._y.num_columns

    def check_columns(self, num_features: int, num_classes: int) -> None:
        for side, columns in ((self._x, num_features), (self._y, num_classes)):
            if side.num_columns != columns:
                raise DataError(
                    f"expected {columns} columns as in training, found {side.num_columns}", path=side.path
                )

    def blocks(self) -> Iterator[tuple[int, CsrArrays, CsrArrays]]:
        """Number of the first row, inputs, labels."""
        first = 0
        while first < self.num_rows:
            stop = min(side.rows_within(first, _BLOCK_ENTRIES) for side in (self._x, self._y))
            yield first, self._x.read_inputs(first, stop), self._y.read_labels(first, stop)
            first = stop


class _NpzRows:
    """Rows of one matrix, read in order.

    Args:
        path: The ``.npz`` file.
        stack: Closes the file.
    """

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path = path
        with _as_data_error(path):
            # np.load leaves a file of its own open when the archive is damaged
            with path.open("rb") as file, np.load(file, allow_pickle=False) as loaded:
                streamed = loaded["format"].item() in {b"csr", "csr"}
                shape = tuple(loaded["shape"].tolist())
                indptr = loaded["indptr"] if streamed else None
            if indptr is not None:
                archive = stack.enter_context(zipfile.ZipFile(path))
                self._read_ids = _stream(stack.enter_context(archive.open("indices.npy")), indptr[-1], "iu")
                self._read_values = _stream(stack.enter_context(archive.open("data.npy")), indptr[-1], "iufb")
            else:
                matrix = load_npz(path).tocsr()
                indptr, shape = matrix.indptr, matrix.shape
                self._read_ids, self._read_values = _in_memory(matrix.indices), _in_memory(matrix.data)
        self._indptr = indptr.astype(np.int64)
        self.num_rows, self.num_columns = shape
        if len(indptr) != self.num_rows + 1 or indptr[0] != 0 or (np.diff(self._indptr) < 0).any():
            raise DataError(f"expected row offsets of {self.num_rows} rows, found others", path=path)
        if not 0 < self.num_columns <= MAX_COLUMNS:
            raise DataError(f"expected 1 to {MAX_COLUMNS} columns, found {self.num_columns}", path=path)

    def rows_within(self, first: int, entries: int) -> int:
        """The end of the longest run of rows from `first` with at most that many entries; one row at least."""
        stop = int(np.searchsorted(self._indptr, self._indptr[first] + entries, side="right")) - 1
        return min(max(stop, first + 1), self.num_rows)

    def read_inputs(self, first: int, stop: int) -> CsrArrays:
        """The next rows, values and all."""
        indptr, indices, values = self._read(first, stop)
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
        self._refuse(first, indptr, values, ~np.isfinite(values), "values that are finite as float32")
        row, feature = sort_rows(indptr, indices, values, False)
        if row >= 0:
            raise DataError(
                f"expected each column once in a row, found {feature} again in row {first + row} (from 0)",
                path=self.path,
            )
        return CsrArrays(indptr, indices, values, self.num_columns)

    def read_labels(self, first: int, stop: int) -> CsrArrays:
        """The next rows, those ids whose value is positive."""
        indptr, indices, values = self._read(first, stop)
        self._refuse(first, indptr, values, ~(values >= 0), "label values of 0 or more")
        kept = values > 0
        indptr = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(kept)])[indptr]
        indices = indices[kept]
        sort_rows(indptr, indices, None, True)
        return CsrArrays(indptr, indices[: indptr[-1]], None, self.num_columns)

    def _read(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        indptr = self._indptr[first : stop + 1] - self._indptr[first]
        with _as_data_error(self.path):
            ids, values = self._read_ids(indptr[-1]), self._read_values(indptr[-1])
        outside = (ids < 0) | (ids >= self.num_columns)
        self._refuse(first, indptr, ids, outside, f"column ids from 0 to {self.num_columns - 1}")
        return indptr, ids.astype(np.int32), values

    def _refuse(
        self, first: int, indptr: np.ndarray, found: np.ndarray, bad: np.ndarray, expected: str
    ) -> None:
        if bad.any():
            at = int(np.argmax(bad))
            row = first + int(np.searchsorted(indptr, at, side="right")) - 1
            raise DataError(f"expected {expected}, found {found[at]} in row {row} (from 0)", path=self.path)


def _stream(file: IO[bytes], length: int, kinds: str) -> Callable[[int], np.ndarray]:
    """A function that reads the next so many elements of a ``.npy`` member with one of these dtype kinds."""
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"a .npy member has version {version}")
    shape, _, dtype = read_header[version](file)
    if shape != (length,) or dtype.kind not in kinds:
        raise ValueError(f"expected {length} numbers of kind {kinds}, found {dtype} {shape}")

    def read(count: int) -> np.ndarray:
        content = file.read(int(count) * dtype.itemsize)
        if len(content) != count * dtype.itemsize:
            raise EOFError("an array ends early")
        return np.frombuffer(content, dtype=dtype)

    return read


def _in_memory(array: np.ndarray) -> Callable[[int], np.ndarray]:
    """The same for an array at hand."""
    if array.dtype.kind not in "iufb":
        raise ValueError(f"expected real numbers, found {array.dtype}")
    position = 0

    def read(count: int) -> np.ndarray:
        nonlocal position
        position += int(count)
        return array[position - int(count) : position]

    return read


@contextmanager
def _as_data_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"expected a matrix saved by scipy.sparse.save_npz: {error}", path=path) from error
