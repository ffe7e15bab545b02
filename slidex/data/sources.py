"""Source files as a stream of blocks cut at line ends, plain or compressed, so that memory stays bounded.

Every failure that is the file's fault, a truncated archive included, is a `DataError` naming the file.
"""

from __future__ import annotations

import array
import bz2
import gzip
import lzma
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from slidex.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from slidex.data.writer import DatasetWriter

BLOCK_BYTES = 2 << 20
MAX_LINE_BYTES = 1 << 28
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


class SourceFile:
    """One file read from front to back; a context manager.

    Args:
        path: A plain file, or one compressed as its ending ``.gz``, ``.bz2`` or ``.xz`` says.

    Attributes:
        size: Bytes on disk.

    Raises:
        DataError: There is no such file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.size = file_size(self.path)
        self._raw = self.path.open("rb")
        opener = _OPENERS.get(self.path.suffix)
        self._file: IO[bytes] | gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile = (
            self._raw if opener is None else opener(self._raw)
        )

    def __enter__(self) -> SourceFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._raw.close()

    @property
    def bytes_done(self) -> int:
        """How far the file has been read, in bytes on disk."""
        return self._raw.tell()

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
        """The content in pieces of about `block_bytes` that end with a newline; the last is given one.

        Raises:
            DataError: The compressed stream is damaged or cut short, or a line exceeds `MAX_LINE_BYTES`.
        """
        while block := self._read(block_bytes):
            if not block.endswith(b"\n"):
                block += self._read_line()
            if not block.endswith(b"\n"):
                if len(block) > MAX_LINE_BYTES:
                    raise DataError(f"expected lines of at most {MAX_LINE_BYTES} bytes", path=self.path)
                block += b"\n"
            yield block

    def _read(self, size: int) -> bytes:
        with _as_data_error(self.path):
            return self._file.read(size)

    def _read_line(self) -> bytes:
        with _as_data_error(self.path):
            return self._file.readline(MAX_LINE_BYTES)

    def lines(self) -> Iterator[bytes]:
        """The lines without their ends, line feed or carriage return and line feed."""
        for block in self.blocks():
            for line in block[:-1].split(b"\n"):
                yield line.removesuffix(b"\r")


def file_size(path: str | Path) -> int:
    """Bytes on disk.

    Raises:
        DataError: There is no such file.
    """
    if not Path(path).is_file():
        raise DataError("expected a file, found none", path=path)
    return Path(path).stat().st_size


@contextmanager
def _as_data_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"expected a complete {path.suffix} file: {error}", path=path) from error
    except OSError as error:
        if error.errno is not None:  # the system's failure, not the file's
            raise
        raise DataError(f"expected a complete {path.suffix} file: {error}", path=path) from error


def read_names(path: str | Path) -> Iterator[str]:
    """Names, one a line, in the order of their ids.

    Raises:
        DataError: A line is not UTF-8.
    """
    with SourceFile(path) as source:
        for number, line in enumerate(source.lines(), start=1):
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"expected UTF-8: {error.reason}", path=path, line=number, column=error.start + 1
                ) from error


def write_names(
    writer: DatasetWriter, label_names: str | Path | None, feature_names: str | Path | None
) -> None:
    """Copy files of names, one a line, into a data set; None where there is none."""
    for kind, path in (("labels", label_names), ("features", feature_names)):
        if path is not None:
            writer.write_names(kind, read_names(path))


def read_row_numbers(path: str | Path) -> np.ndarray:
    """Row numbers in the first column of a split file of the Extreme Classification Repository.

    Args:
        path: Each line holds one 1-based row number for each published split; the first is taken.

    Returns:
        int64 (n,), 0-based and increasing.

    Raises:
        DataError: A line does not start with a number of at least 1, a number occurs twice, or there is none.
    """
    numbers = array.array("q")
    with SourceFile(path) as source:
        for line_number, line in enumerate(source.lines(), start=1):
            first = line.split(maxsplit=1)[:1]
            if not first:
                continue
            if not (first[0].isdigit() and 0 < len(first[0]) < 19 and int(first[0]) > 0):
                found = first[0][:40].decode("utf-8", "backslashreplace")
                raise DataError(
                    f"expected a row number of at least 1, found {found!r}", path=path, line=line_number
                )
            numbers.append(int(first[0]) - 1)
    rows = np.sort(np.frombuffer(numbers, dtype=np.int64)) if numbers else np.zeros(0, dtype=np.int64)
    if not len(rows):
        raise DataError("expected row numbers, found none", path=path)
    if len(repeats := rows[1:][rows[1:] == rows[:-1]]):
        raise DataError(f"expected each row number once, found {repeats[0] + 1} again", path=path)
    return rows
