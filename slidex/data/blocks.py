"""Blocks of svmlight text to CSR rows: allocation, the rare slow numbers, and errors in words.

The kernels in `_parse` return a code and a byte position; only then, for the one offending token, does Python
look at the text again to say what was expected there and what was found.
"""

from __future__ import annotations

import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from slidex.data import _parse
from slidex.data._rows import sort_rows
from slidex.data.csr import CsrArrays

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

MAX_COLUMNS = 2**31 - 1  # ids are int32


@dataclass(frozen=True, slots=True)
class Dialect:
    """What may stand in a row.

    Args:
        num_features: Feature ids, counted from 0, are below it.
        num_classes: Class ids are below it.
        first_feature: How the text counts features: from 0 or from 1.
        skip_blank: Lines without tokens are passed over rather than taken as rows.
        merge_duplicates: A feature that occurs twice in a row is summed rather than refused.
    """

    num_features: int = MAX_COLUMNS
    num_classes: int = MAX_COLUMNS
    first_feature: int = 0
    skip_blank: bool = False
    merge_duplicates: bool = False


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one block of text, and how many lines it had."""

    x: CsrArrays
    y: CsrArrays
    num_lines: int


class BadRow(Exception):  # noqa: N818  (the reader turns it into a DataError once it knows the line's number)
    """A row breaks the format; `line` and `column` count from 1 within the block."""

    def __init__(self, message: str, line: int, column: int) -> None:
        super().__init__(message)
        self.message, self.line, self.column = message, line, column


def parse_blocks(blocks: Iterable[bytes], dialect: Dialect, threads: int) -> Generator[Block, None, None]:
    """Parse blocks side by side, in order, with at most ``threads + 1`` of them in memory.

    Args:
        blocks: Whole lines, each block ending with a newline.
        dialect: What may stand in a row.
        threads: Parsing threads, at least 1.

    Raises:
        BadRow: After all blocks before the bad one were yielded.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="slidex-parse")
    waiting = deque()
    try:
        for block in blocks:
            waiting.append(pool.submit(parse_block, block, dialect))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def parse_block(text: bytes, dialect: Dialect) -> Block:
    """Parse whole lines of ``label,label feature:value feature:value # comment``.

    Features are sorted and repeated labels of a row merged.

    Args:
        text: Ends with a newline.
        dialect: What may stand in a row.

    Raises:
        BadRow: A token breaks the format.
    """
    data = np.frombuffer(text, dtype=np.uint8)
    num_lines, num_colons, num_commas = _parse.count_tokens(data)
    row_at = np.empty(num_lines, dtype=np.int64)
    x_indptr, y_indptr = np.empty((2, num_lines + 1), dtype=np.int64)
    x_indices = np.empty(num_colons, dtype=np.int32)
    x_values = np.empty(num_colons, dtype=np.float32)
    y_indices = np.empty(num_commas + num_lines, dtype=np.int32)
    slow_at, slow_index = np.empty((2, num_colons), dtype=np.int64)  # pages of it exist only once written
    code, at, num_rows, num_slow = _parse.parse_rows(
        data,
        dialect.first_feature,
        dialect.num_features,
        dialect.num_classes,
        dialect.skip_blank,
        row_at,
        x_indptr,
        x_indices,
        x_values,
        y_indptr,
        y_indices,
        slow_at,
        slow_index,
    )
    for at_value, index in zip(slow_at[:num_slow], slow_index[:num_slow], strict=True):
        x_values[index] = _read_slow_value(text, int(at_value))
    if code != _parse.OK:
        raise _explain(text, at, code, dialect)
    x_indptr, y_indptr = x_indptr[: num_rows + 1], y_indptr[: num_rows + 1]
    row, feature = sort_rows(x_indptr, x_indices, x_values, dialect.merge_duplicates)
    if row >= 0:
        raise _explain_duplicate(text, row_at[row], feature + dialect.first_feature)
    sort_rows(y_indptr, y_indices, None, True)
    x = CsrArrays(x_indptr, x_indices[: x_indptr[-1]], x_values[: x_indptr[-1]], dialect.num_features)
    y = CsrArrays(y_indptr, y_indices[: y_indptr[-1]], None, dialect.num_classes)
    return Block(x, y, num_lines)


def _read_slow_value(text: bytes, at: int) -> np.float32:
    with np.errstate(over="ignore"):
        value = np.float32(float(_token(text, at)))
    if not np.isfinite(value):
        raise _at(text, at, f"expected a value that is finite as float32, found {_quote(_token(text, at))}")
    return value


def _token(text: bytes, at: int, ends: bytes = rb"\s#") -> bytes:
    return re.split(rb"[" + ends + rb"]", text[at : text.index(b"\n", at)], maxsplit=1)[0]


def _quote(token: bytes) -> str:
    shown = token[:40].decode("utf-8", "backslashreplace")
    return repr(shown + "..." if len(token) > 40 else shown)


def _at(text: bytes, at: int, message: str) -> BadRow:
    return BadRow(message, text.count(b"\n", 0, at) + 1, at - text.rfind(b"\n", 0, at))


def _explain(text: bytes, at: int, code: int, dialect: Dialect) -> BadRow:
    token = _token(text, at)
    leads = not text[text.rfind(b"\n", 0, at) + 1 : at].strip()
    if code == _parse.BAD_FEATURE and leads and b":" not in token:
        code = _parse.BAD_LABEL
    if code in {_parse.BAD_LABEL, _parse.LABEL_RANGE}:
        token = _token(text, at, rb"\s#,")
    first, last = dialect.first_feature, dialect.first_feature + dialect.num_features - 1
    expected = {
        _parse.BAD_LABEL: "expected class ids from 0 with commas between them",
        _parse.LABEL_RANGE: f"expected a class id below {dialect.num_classes}",
        _parse.BAD_FEATURE: f"expected feature:value with a feature id from {first}",
        _parse.FEATURE_RANGE: f"expected a feature id from {first} to {last}",
        _parse.BAD_VALUE: "expected feature:value with a finite decimal value",
        _parse.NOT_FINITE: "expected a value that is finite as float32",
    }[code]
    if token.startswith(b"qid:"):
        expected = "ranking data cannot be prepared: expected feature:value"
    return _at(text, at, f"{expected}, found {_quote(token)}")


def _explain_duplicate(text: bytes, line_at: int, feature: int) -> BadRow:
    line = _token(text, line_at, rb"\n#")
    second = list(re.finditer(rb"(?<!\S)0*%d:" % feature, line))[1]
    message = f"expected each feature once in a row (unless duplicates are merged), found {feature} again"
    return _at(text, line_at + second.start(), message)
