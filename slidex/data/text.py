"""Raw text with labels, as JSON lines or CSV, to a prepared data set: two streaming passes.

The first pass fits the vectoriser and counts labels on the training rows alone; what the test rows contain
can influence neither features nor classes. The second pass transforms and writes. Every row goes to its split
by its number alone, so both passes agree without remembering anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from slidex.data._text_rows import csv_rows, decoded, labels_in, parse_object, split_labels, text_in
from slidex.data.csr import CsrArrays
from slidex.data.sources import SourceFile
from slidex.data.splitting import SPLIT_NAMES, Progress, check_fractions, split_of_rows
from slidex.data.vectorizers import (
    HashingTextVectorizer,
    TfidfFitter,
    TfidfTextVectorizer,
    Vectorizer,
    check_ngram_range,
)
from slidex.data.writer import DatasetWriter
from slidex.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from slidex.data.dataset import Dataset

_BLOCK = 4096  # rows vectorised at a time
_DEFAULT_HASHED_WIDTH = 2**18


@dataclass(frozen=True, kw_only=True, slots=True)
class TextOptions:
    """How rows of text become a data set, whatever file they come from.

    Args:
        vectorizer: ``"tfidf"`` (fitted on the training rows) or ``"hashing"`` (nothing to fit).
        max_features: tf-idf: keep this many words, None for all; hashing: the width, None for 2**18.
        min_df: tf-idf: drop words in fewer training rows than this.
        ngram_range: Shortest and longest n-gram of words.
        min_label_count: Labels on fewer training rows than this are no classes.
        test: Files with the test rows; None draws them at random from the sources.
        test_fraction: Expected share of rows drawn for testing; not used where `test` is given.
        valid_fraction: Expected share of rows drawn for validation.
        seed: Seed of the draw.
        overwrite: Replace an existing data set.
        progress: Called with the work done so far, over both passes.

    Raises:
        ConfigError: A value is out of range.
    """

    vectorizer: str = "tfidf"
    max_features: int | None = None
    min_df: int = 2
    ngram_range: tuple[int, int] = (1, 1)
    min_label_count: int = 1
    test: Sequence[str | Path] | None = None
    test_fraction: float = 0.2
    valid_fraction: float = 0.0
    seed: int = 0
    overwrite: bool = False
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.vectorizer not in {"tfidf", "hashing"}:
            raise _bad("vectorizer", "'tfidf' or 'hashing'", self.vectorizer)
        if self.min_label_count < 1:
            raise _bad("min_label_count", "1 or more", self.min_label_count)
        if self.test is not None and not self.test:
            raise _bad("test", "None or at least one file", self.test)
        check_ngram_range(self.ngram_range, "TextOptions")
        check_fractions(*self.fractions)

    @property
    def fractions(self) -> tuple[float, float]:
        """Shares of the source's rows drawn for validation and for testing."""
        return self.valid_fraction, 0.0 if self.test is not None else self.test_fraction

    def as_json(self) -> dict[str, Any]:
        """What belongs in ``meta.json``."""
        options = {k: v for k, v in asdict(self).items() if k not in {"test", "overwrite", "progress"}}
        return options | {"ngram_range": list(self.ngram_range)}


class _Row(NamedTuple):
    text: str
    labels: list[str]


_Reader = Callable[[Path, Iterator[str]], Iterator[_Row]]


def prepare_jsonl(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    text_field: str = "text",
    label_field: str = "labels",
    label_separator: str = ";",
    **options: Any,
) -> Dataset:
    """Prepare JSON lines: one object a line, with text in some fields and labels in another.

    Args:
        sources: UTF-8 files, also compressed as ``.gz``, ``.bz2`` or ``.xz``; read in this order.
        out: Directory to create.
        text_field: Name of the field with the text; several, joined by commas, are read one after the other.
        label_field: Name of the field with the labels: a list of strings or integers, or one string.
        label_separator: Separates labels where the field is one string; spaces around labels are dropped.
        **options: Fields of `TextOptions`.

    Returns:
        The data set. Its ``meta["extra"]`` counts labels that are no classes and the rows they stood in.

    Raises:
        ConfigError: A setting is out of range, or `out` cannot be used.
        DataError: A file is empty, is not UTF-8, or a line is not such an object; names file and line.
    """
    fields = _names_of("text_field", text_field.split(","))
    _check_separator(label_separator)

    def read(path: Path, lines: Iterator[str]) -> Iterator[_Row]:
        for number, line in enumerate(lines, start=1):
            record = parse_object(path, number, line)
            text = "\n".join(text_in(record, field, path, number) for field in fields)
            yield _Row(text, labels_in(record, label_field, label_separator, path, number))

    reader_options = {
        "text_field": text_field,
        "label_field": label_field,
        "label_separator": label_separator,
    }
    return _prepare("jsonl", read, reader_options, sources, out, TextOptions(**options))


def prepare_csv(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    text_columns: Sequence[str] = ("text",),
    label_column: str = "labels",
    label_separator: str = ";",
    delimiter: str = ",",
    **options: Any,
) -> Dataset:
    r"""Prepare delimited text; the first row of every file names its columns.

    Args:
        sources: UTF-8 files, also compressed as ``.gz``, ``.bz2`` or ``.xz``; read in this order.
        out: Directory to create.
        text_columns: Names of the columns with text, read one after the other.
        label_column: Name of the column with the labels.
        label_separator: Separates labels; spaces around labels are dropped.
        delimiter: Separates columns, one character: ``","``, ``"\t"``.
        **options: Fields of `TextOptions`.

    Returns:
        The data set. Its ``meta["extra"]`` counts labels that are no classes and the rows they stood in.

    Raises:
        ConfigError: A setting is out of range, or `out` cannot be used.
        DataError: A file is empty, is not UTF-8, lacks a column, or a row has another number of columns than
            the first; names file and line.
    """
    columns = _names_of("text_columns", text_columns)
    _check_separator(label_separator)
    if len(delimiter) != 1 or delimiter in '\r\n"':
        raise _bad("delimiter", "one character, no quote and no line end", delimiter)

    def read(path: Path, lines: Iterator[str]) -> Iterator[_Row]:
        table = csv_rows(path, lines, delimiter)
        _, header = next(table, (1, []))
        missing = [name for name in (*columns, label_column) if name not in header]
        if header and missing:
            raise DataError(f"expected a column {missing[0]!r}, found {', '.join(header)}", path=path, line=1)
        for number, row in table:
            if len(row) != len(header):
                raise DataError(f"expected {len(header)} columns, found {len(row)}", path=path, line=number)
            record = dict(zip(header, row, strict=True))
            text = "\n".join(record[name] for name in columns)
            yield _Row(text, split_labels(record[label_column], label_separator))

    reader_options = {
        "text_columns": list(columns),
        "label_column": label_column,
        "label_separator": label_separator,
        "delimiter": delimiter,
    }
    return _prepare("csv", read, reader_options, sources, out, TextOptions(**options))


def read_jsonl_texts(path: str | Path, fields: Sequence[str]) -> Iterator[str]:
    """The texts of a file of JSON lines, for prediction: its fields joined as `prepare_jsonl` joins them.

    Raises:
        DataError: The file is missing or damaged, or a line is no object with these fields as text.
    """
    with SourceFile(path) as source:
        for number, line in enumerate(decoded(source.path, source.lines()), start=1):
            record = parse_object(source.path, number, line)
            yield "\n".join(text_in(record, field, source.path, number) for field in fields)


def _prepare(
    kind: str,
    read: _Reader,
    reader_options: Mapping[str, Any],
    sources: Sequence[str | Path],
    out: str | Path,
    options: TextOptions,
) -> Dataset:
    if not sources:
        raise _bad("sources", "at least one file", sources)
    sources, test = [Path(path) for path in sources], [Path(path) for path in options.test or ()]
    stream = _Stream(read, sources, test, options)
    with DatasetWriter(out, overwrite=options.overwrite) as writer:
        vectorizer, counts = _fit(stream, options)
        classes = sorted(label for label, count in counts.items() if count >= options.min_label_count)
        if not classes:
            raise DataError(
                f"expected a label on {options.min_label_count} or more training rows, found none",
                path=sources[0],
            )
        extra = _write(stream, writer, vectorizer, {label: i for i, label in enumerate(classes)})
        writer.write_names("labels", classes)
        if not isinstance(vectorizer, HashingTextVectorizer):
            writer.write_names("features", vectorizer.vocabulary)
        vectorizer.save(writer.path / "vectorizer")
        return writer.finish(
            num_features=vectorizer.num_features,
            num_classes=len(classes),
            source={
                "format": kind,
                "files": [path.name for path in (*sources, *test)],
                "options": {**reader_options, **options.as_json()},
            },
            vectorizer=vectorizer.kind,
            extra=extra,
        )


class _Stream:
    """The rows of all files, in blocks with the split of every row; can be read any number of times."""

    def __init__(
        self, read: _Reader, sources: Sequence[Path], test: Sequence[Path], options: TextOptions
    ) -> None:
        self._read, self._sources, self._test, self._options = read, sources, test, options
        self._bytes_total = 2 * sum(path.stat().st_size for path in (*sources, *test) if path.is_file())
        self._rows = self._bytes = 0

    def blocks(self) -> Iterator[tuple[list[_Row], np.ndarray]]:
        """Yield rows and their splits: int8 (rows,), positions in `SPLIT_NAMES`."""
        first = 0
        for path in self._sources:
            for rows in self._blocks_of(path):
                yield rows, split_of_rows(first, len(rows), self._options.seed, self._options.fractions)
                first += len(rows)
        for path in self._test:
            for rows in self._blocks_of(path):
                yield rows, np.full(len(rows), SPLIT_NAMES.index("test"), dtype=np.int8)

    def _blocks_of(self, path: Path) -> Iterator[list[_Row]]:
        with SourceFile(path) as source:
            rows = self._read(path, decoded(path, source.lines()))
            empty = True
            while block := list(islice(rows, _BLOCK)):
                empty = False
                yield block
                self._rows += len(block)
                if self._options.progress is not None:
                    self._options.progress(
                        rows=self._rows,
                        bytes_done=self._bytes + source.bytes_done,
                        bytes_total=self._bytes_total,
                    )
            if empty:
                raise DataError("expected at least one row, found none", path=path)
            self._bytes += source.size


def _fit(
    stream: _Stream, options: TextOptions
) -> tuple[TfidfTextVectorizer | HashingTextVectorizer, Counter[str]]:
    """Fit the vectoriser and count the rows of every label, on training rows alone."""
    tfidf = None
    if options.vectorizer == "tfidf":
        tfidf = TfidfFitter(options.ngram_range, options.min_df, options.max_features)
    counts: Counter[str] = Counter()
    for rows, splits in stream.blocks():
        training = [row for row, split in zip(rows, splits, strict=True) if split == 0]
        if tfidf is not None:
            tfidf.add(row.text for row in training)
        for row in training:
            counts.update(set(row.labels))
    if tfidf is not None:
        return tfidf.finish(), counts
    width = _DEFAULT_HASHED_WIDTH if options.max_features is None else options.max_features
    return HashingTextVectorizer(width, options.ngram_range), counts


def _write(
    stream: _Stream, writer: DatasetWriter, vectorizer: Vectorizer, classes: Mapping[str, int]
) -> dict[str, dict[str, int]]:
    """Transform and append every row; count the labels that are no classes, by split."""
    outside = dict.fromkeys(SPLIT_NAMES, 0)
    for rows, splits in stream.blocks():
        x = vectorizer.transform([row.text for row in rows])
        known = [sorted({classes[label] for label in row.labels if label in classes}) for row in rows]
        y = _label_rows(known, len(classes))
        for i, name in enumerate(SPLIT_NAMES):
            chosen = np.flatnonzero(splits == i)
            if len(chosen):
                writer.append(name, x.take(chosen), y.take(chosen))
                outside[name] += sum(len(set(rows[j].labels)) - len(known[j]) for j in chosen)
    return {"labels_outside_classes": outside}


def _label_rows(rows: Sequence[Sequence[int]], num_classes: int) -> CsrArrays:
    indptr = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=indptr[1:])
    indices = np.fromiter((label for row in rows for label in row), dtype=np.int32, count=int(indptr[-1]))
    return CsrArrays(indptr, indices, None, num_classes)


def _names_of(parameter: str, names: Sequence[str]) -> tuple[str, ...]:
    if not names or not all(names):
        raise _bad(parameter, "at least one name, none of them empty", names)
    return tuple(names)


def _check_separator(value: str) -> None:
    if not value:
        raise _bad("label_separator", "at least one character", value)


def _bad(name: str, constraint: str, value: object) -> ConfigError:
    return ConfigError(f"The {name!r} parameter of prepare must be {constraint}. Got {value!r} instead.")
