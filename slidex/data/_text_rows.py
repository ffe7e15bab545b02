"""Rows of JSON-lines and CSV text, each fault reported with its file and line."""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING, Any

from slidex.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_LONGEST_CSV_FIELD = 2**31 - 1


def decoded(path: Path, lines: Iterable[bytes]) -> Iterator[str]:
    """Lines as text, without a byte-order mark."""
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"expected UTF-8: {error.reason}", path=path, line=number, column=error.start + 1
            ) from error
        yield text.removeprefix("\ufeff") if number == 1 else text


def csv_rows(path: Path, lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Rows of a CSV file with the number of the line each ends in."""
    limit = csv.field_size_limit(_LONGEST_CSV_FIELD)
    reader = csv.reader((line + "\n" for line in lines), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"expected CSV: {error}", path=path, line=reader.line_num) from error
    finally:
        csv.field_size_limit(limit)


def parse_object(path: Path, number: int, line: str) -> dict[str, Any]:
    """The JSON object on a line."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        column = len(line[: error.pos].encode()) + 1
        raise DataError(
            f"expected a JSON object: {error.msg}", path=path, line=number, column=column
        ) from error
    if not isinstance(record, dict):
        raise DataError(
            f"expected a JSON object, found {type(record).__name__}", path=path, line=number, column=1
        )
    return record


def _field(record: dict[str, Any], name: str, path: Path, line: int) -> Any:
    if name not in record:
        raise DataError(f"expected a field {name!r}, found {', '.join(record)}", path=path, line=line)
    return record[name]


def text_in(record: dict[str, Any], name: str, path: Path, line: int) -> str:
    """The string in a field of an object."""
    value = _field(record, name, path, line)
    if not isinstance(value, str):
        raise DataError(f"expected a string in field {name!r}, found {value!r}", path=path, line=line)
    return value


def labels_in(record: dict[str, Any], name: str, separator: str, path: Path, line: int) -> list[str]:
    """The labels in a field of an object."""
    value = _field(record, name, path, line)
    if isinstance(value, str):
        return split_labels(value, separator)
    if isinstance(value, list) and all(
        type(label) is int or (label and type(label) is str) for label in value
    ):
        return [str(label) for label in value]
    raise DataError(
        f"expected a list of integers and non-empty strings, or one string, in field {name!r}, found {value!r}",
        path=path,
        line=line,
    )


def split_labels(text: str, separator: str) -> list[str]:
    """The labels in one string; spaces around them do not count."""
    return [label for part in text.split(separator) if (label := part.strip())]
