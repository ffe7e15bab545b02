"""Preparing text data: the Extreme Classification Repository's format and multilabel svmlight.

Both are rows of ``label,label feature:value feature:value``; XMC adds a header ``rows features labels`` and
counts from 0. Files are read in blocks, parsed by several threads and appended in order, so that memory use
depends on the block size and the number of threads only.

Rules for both: labels and features may come in any order within a row (stored sorted); a label that is
repeated in a row counts once; a repeated feature is an error unless duplicates are merged; everything after
``#`` is a comment; rows without labels, rows without features and classes without rows are legal.
"""

from __future__ import annotations

import os
import re
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from slidex.data._parse import has_feature_zero
from slidex.data.blocks import MAX_COLUMNS, BadRow, Block, Dialect, parse_blocks
from slidex.data.sources import SourceFile, file_size, read_row_numbers, write_names
from slidex.data.splitting import Progress, SplitRule
from slidex.data.writer import DatasetWriter
from slidex.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from slidex.data.csr import CsrArrays
    from slidex.data.dataset import Dataset

_HEADER = re.compile(rb"\s*(\d{1,18})[ \t]+(\d{1,18})[ \t]+(\d{1,18})\s*")


def prepare_xmc(
    source: str | Path,
    out: str | Path,
    *,
    test: str | Path | None = None,
    split_file: str | Path | None = None,
    test_fraction: float = 0.0,
    valid_fraction: float = 0.0,
    seed: int = 0,
    merge_duplicates: bool = False,
    label_names: str | Path | None = None,
    feature_names: str | Path | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Prepare data in the text format of the Extreme Classification Repository.

    Args:
        source: Training rows, or all rows; plain, ``.gz``, ``.bz2`` or ``.xz``, as every file here.
        out: Directory to create.
        test: Test rows, with the same numbers of features and labels in the header.
        split_file: Row numbers of the test rows within `source`: 1-based, in the first column.
        test_fraction: Share of the rows of `source` to set apart as test.
        valid_fraction: Share of the rows of `source` to set apart as valid (of those not in `split_file`).
        seed: Decides which rows the two fractions take.
        merge_duplicates: Add up the values of a feature that is repeated in a row.
        label_names: One name a line, line i for class i.
        feature_names: Likewise for features.
        overwrite: Replace an existing data set at `out`.
        threads: Parsing threads; None takes one for each CPU.
        progress: Called after every block.

    Returns:
        The prepared data set.

    Raises:
        DataError: The data break the format, with file, line and column; nothing is left at `out`.
        ConfigError: Settings contradict each other, or `out` cannot be used.
    """
    rule = _split_rule(test, split_file, seed, valid_fraction, test_fraction)
    files = [source] if test is None else [source, test]
    options = {
        "test_fraction": test_fraction,
        "valid_fraction": valid_fraction,
        "seed": seed,
        "merge_duplicates": merge_duplicates,
    }
    with DatasetWriter(out, overwrite=overwrite) as writer:
        reader = _Reader(writer, num_threads(threads), _Tally(progress, files))
        header = reader.read_xmc(source, rule, merge_duplicates)
        _check_listed_rows(rule, split_file, header.num_rows)
        if test is not None:
            test_header = reader.read_xmc(test, None, merge_duplicates)
            _check_same_columns(test_header, header, test)
        write_names(writer, label_names, feature_names)
        return writer.finish(
            num_features=header.num_features,
            num_classes=header.num_classes,
            source=_describe("xmc", [*files, split_file], options),
        )


def prepare_svmlight(
    source: str | Path,
    out: str | Path,
    *,
    test: str | Path | None = None,
    split_file: str | Path | None = None,
    test_fraction: float = 0.0,
    valid_fraction: float = 0.0,
    seed: int = 0,
    zero_based: bool | Literal["auto"] = "auto",
    num_features: int | None = None,
    num_classes: int | None = None,
    merge_duplicates: bool = False,
    label_names: str | Path | None = None,
    feature_names: str | Path | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Prepare multilabel svmlight (libsvm) data. Lines without any token are skipped.

    Args:
        source: Training rows, or all rows; plain, ``.gz``, ``.bz2`` or ``.xz``, as every file here.
        out: Directory to create.
        test: Test rows.
        split_file: Row numbers of the test rows within `source`: 1-based, in the first column.
        test_fraction: Share of the rows of `source` to set apart as test.
        valid_fraction: Share of the rows of `source` to set apart as valid (of those not in `split_file`).
        seed: Decides which rows the two fractions take.
        zero_based: Whether feature ids start at 0; "auto" reads the files once more beforehand and takes them
            to start at 1 unless an id 0 occurs, as scikit-learn does. Labels always start at 0.
        num_features: Width of the input; None takes what the data need.
        num_classes: Number of classes; None takes what the data need.
        merge_duplicates: Add up the values of a feature that is repeated in a row.
        label_names: One name a line, line i for class i.
        feature_names: Likewise for features.
        overwrite: Replace an existing data set at `out`.
        threads: Parsing threads; None takes one for each CPU.
        progress: Called after every block.

    Returns:
        The prepared data set.

    Raises:
        DataError: The data break the format, with file, line and column; nothing is left at `out`.
        ConfigError: Settings contradict each other or are out of range, or `out` cannot be used.
    """
    rule = _split_rule(test, split_file, seed, valid_fraction, test_fraction)
    for name, value in (("num_features", num_features), ("num_classes", num_classes)):
        if value is not None and not 0 < value <= MAX_COLUMNS:
            raise ConfigError(
                f"The '{name}' parameter of prepare_svmlight must be in [1, {MAX_COLUMNS}]. "
                f"Got {value!r} instead."
            )
    options = {
        "test_fraction": test_fraction,
        "valid_fraction": valid_fraction,
        "seed": seed,
        "zero_based": zero_based,
        "merge_duplicates": merge_duplicates,
    }
    files = [source] if test is None else [source, test]
    with DatasetWriter(out, overwrite=overwrite) as writer:
        tally = _Tally(progress, files * 2 if zero_based == "auto" else files)
        if zero_based == "auto":
            zero_based = any(_has_feature_zero(file, tally) for file in files)
        dialect = Dialect(
            num_features or MAX_COLUMNS,
            num_classes or MAX_COLUMNS,
            first_feature=0 if zero_based else 1,
            skip_blank=True,
            merge_duplicates=merge_duplicates,
        )
        reader = _Reader(writer, num_threads(threads), tally)
        _check_listed_rows(rule, split_file, reader.read_svmlight(source, rule, dialect))
        if test is not None:
            reader.read_svmlight(test, None, dialect)
        write_names(writer, label_names, feature_names)
        largest_feature, largest_class = writer.largest_ids
        return writer.finish(
            num_features=num_features or largest_feature + 1,
            num_classes=num_classes or largest_class + 1,
            source=_describe("svmlight", [*files, split_file], options),
        )


def read_xmc_rows(path: str | Path, num_features: int, *, threads: int | None = None) -> Iterator[CsrArrays]:
    """The inputs of a file in the Extreme Classification Repository's format, some rows at a time, for prediction.

    Args:
        path: Plain, ``.gz``, ``.bz2`` or ``.xz``. Its labels are read over: they may be of any number, or none.
        num_features: What the header must say.
        threads: Parsing threads; None takes one for each CPU.

    Raises:
        DataError: The file breaks the format, or has another number of features.
    """
    with SourceFile(path) as source:
        blocks = source.blocks()
        line, _, rest = next(blocks, b"").partition(b"\n")
        header = _read_header(line, path)
        if header.num_features != num_features:
            raise DataError(
                f"expected {num_features} features as the model has, found {header.num_features}",
                path=path,
                line=1,
            )
        unread = header.num_rows
        dialect = Dialect(header.num_features, header.num_classes)
        for block in _parsed(source, chain([rest] if rest else [], blocks), dialect, num_threads(threads), 1):
            yield block.x.slice(0, min(unread, block.x.num_rows))
            unread -= min(unread, block.x.num_rows)
    if unread:
        raise DataError(
            f"expected {header.num_rows} rows as the header says, {unread} are missing", path=path, line=1
        )


@dataclass(frozen=True, slots=True)
class _Header:
    num_rows: int
    num_features: int
    num_classes: int


class _Reader:
    """Reads text files into a writer."""

    def __init__(self, writer: DatasetWriter, threads: int, tally: _Tally) -> None:
        self._writer, self._threads, self._tally = writer, threads, tally

    def read_xmc(self, path: str | Path, rule: SplitRule | None, merge_duplicates: bool) -> _Header:
        """Append a file with a header; `rule` None appends to test."""
        with SourceFile(path) as source:
            blocks = source.blocks()
            first = next(blocks, b"")
            line, _, rest = first.partition(b"\n")
            header = _read_header(line, path)
            dialect = Dialect(header.num_features, header.num_classes, merge_duplicates=merge_duplicates)
            found = self._append(
                source, chain([rest] if rest else [], blocks), rule, dialect, header.num_rows
            )
        if found < header.num_rows:
            raise DataError(
                f"expected {header.num_rows} rows as the header says, found {found}", path=path, line=1
            )
        return header

    def read_svmlight(self, path: str | Path, rule: SplitRule | None, dialect: Dialect) -> int:
        """Append a file without a header; `rule` None appends to test. Returns the number of rows."""
        with SourceFile(path) as source:
            found = self._append(source, source.blocks(), rule, dialect, None)
        if not found:
            raise DataError("expected rows, found none", path=path)
        return found

    def _append(
        self,
        source: SourceFile,
        blocks: Iterator[bytes],
        rule: SplitRule | None,
        dialect: Dialect,
        declared: int | None,
    ) -> int:
        rows, line = 0, 0 if declared is None else 1  # the header is a line, too
        for block in _parsed(source, blocks, dialect, self._threads, line):
            x, y = block.x, block.y
            if declared is not None and rows + x.num_rows > declared:
                x, y = _without_trailing_blanks(block, declared - rows, source.path, line)
            if rule is None:
                self._writer.append("test", x, y)
            else:
                rule.append(self._writer, rows, x, y)
            rows += x.num_rows
            line += block.num_lines
            self._tally.report(source, x.num_rows)
        self._tally.finish(source)
        return rows


def _parsed(
    source: SourceFile, blocks: Iterator[bytes], dialect: Dialect, threads: int, line: int
) -> Iterator[Block]:
    """Parsed blocks in order; what breaks the format becomes a DataError. `line` lines stand before the blocks."""
    with closing(parse_blocks(blocks, dialect, threads)) as parsed:
        try:
            for block in parsed:
                line += block.num_lines
                yield block
        except BadRow as error:
            raise DataError(
                error.message, path=source.path, line=line + error.line, column=error.column
            ) from None


def _read_header(line: bytes, path: str | Path) -> _Header:
    match = _HEADER.fullmatch(line)
    if match is None:
        found = line[:60].decode("utf-8", "backslashreplace")
        raise DataError(f"expected a header 'rows features labels', found {found!r}", path=path, line=1)
    header = _Header(*map(int, match.groups()))
    if header.num_rows == 0 or not 0 < header.num_features <= MAX_COLUMNS >= header.num_classes > 0:
        raise DataError(
            f"expected at least one row, and 1 to {MAX_COLUMNS} features and labels, found {header}",
            path=path,
            line=1,
        )
    return header


def _without_trailing_blanks(block: Block, room: int, path: Path, line: int) -> tuple[CsrArrays, CsrArrays]:
    """The block's first `room` rows, if the rest are only empty lines, as many editors leave them."""
    for rows in (block.x, block.y):
        if rows.indptr[room] != rows.nnz:
            raise DataError(
                "expected no more rows, as many as the header says were read", path=path, line=line + room + 1
            )
    return block.x.slice(0, room), block.y.slice(0, room)


def _check_same_columns(test: _Header, train: _Header, path: str | Path) -> None:
    for what, found, expected in (
        ("features", test.num_features, train.num_features),
        ("labels", test.num_classes, train.num_classes),
    ):
        if found != expected:
            raise DataError(f"expected {expected} {what} as in training, found {found}", path=path, line=1)


def _check_listed_rows(rule: SplitRule, split_file: str | Path | None, num_rows: int) -> None:
    if rule.test_rows is not None and rule.test_rows[-1] >= num_rows:
        raise DataError(
            f"expected row numbers up to {num_rows}, found {rule.test_rows[-1] + 1}", path=split_file
        )


def _has_feature_zero(path: str | Path, tally: _Tally) -> bool:
    with SourceFile(path) as source:
        found = False
        for block in source.blocks():
            found = has_feature_zero(np.frombuffer(block, dtype=np.uint8))
            tally.report(source, 0)
            if found:
                break
        tally.finish(source)
        return found


def _split_rule(
    test: str | Path | None,
    split_file: str | Path | None,
    seed: int,
    valid_fraction: float,
    test_fraction: float,
) -> SplitRule:
    if sum([test is not None, split_file is not None, test_fraction != 0.0]) > 1:
        raise ConfigError(
            "Of the 'test', 'split_file' and 'test_fraction' parameters of a data set one must be given at most. "
            f"Got {test!r}, {split_file!r} and {test_fraction!r} instead."
        )
    test_rows = None if split_file is None else read_row_numbers(split_file)
    return SplitRule(seed, valid_fraction, test_fraction, test_rows)


def num_threads(threads: int | None) -> int:
    """The number of threads to use: as asked for, or one for each CPU."""
    if threads is not None and threads < 1:
        raise ConfigError(
            f"The 'threads' parameter of a data set must be at least 1. Got {threads!r} instead."
        )
    return threads or os.cpu_count() or 1


def _describe(kind: str, files: list[str | Path | None], options: dict[str, Any]) -> dict[str, Any]:
    return {"format": kind, "files": [str(file) for file in files if file is not None], "options": options}


class _Tally:
    """Progress over several files."""

    def __init__(self, progress: Progress | None, files: list[str | Path]) -> None:
        self._progress = progress
        self._total = sum(file_size(file) for file in files)
        self._finished = self._rows = 0

    def report(self, source: SourceFile, rows: int) -> None:
        """Count `rows` more rows of a file that is being read."""
        self._rows += rows
        if self._progress is not None:
            done = self._finished + source.bytes_done
            self._progress(rows=self._rows, bytes_done=done, bytes_total=self._total)

    def finish(self, source: SourceFile) -> None:
        """Count the whole file as read."""
        self._finished += source.size
