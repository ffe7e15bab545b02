"""A byte parser for svmlight and XMC text, compiled by Numba and run without the interpreter lock.

scikit-learn's reader goes through Python objects for every token; this one reads digits straight from a
buffer, so threads parse blocks side by side. Numbers come out bit for bit as ``numpy.float32(float(token))``:

* a mantissa up to 2^53 and a power of ten up to 10^22 are exact doubles, so one division or product rounds
  once (Clinger, "How to read floating point numbers accurately", 1990);
* otherwise the double is off by a few units in its last place, which nearly always leaves the float32
  unchanged: that is checked by rounding both ends of the interval;
* what remains is left to Python's ``float``.
"""

from __future__ import annotations

import numba
import numpy as np

OK, BAD_LABEL, LABEL_RANGE, BAD_FEATURE, FEATURE_RANGE, BAD_VALUE, NOT_FINITE = range(7)

_NEWLINE, _HASH, _COMMA, _COLON, _POINT = (ord(c) for c in "\n#,:.")
_PLUS, _MINUS, _ZERO, _SPACE, _TAB, _RETURN = (ord(c) for c in "+-0 \t\r")
_EXPONENT_SMALL, _EXPONENT_LARGE = ord("e"), ord("E")
_READ, _LEFT_TO_PYTHON, _NO_NUMBER = range(3)
_POWERS = np.array([float(f"1e{k}") for k in range(301)])
_EXACT_POWER, _EXACT_MANTISSA = 22, 1 << 53
_MANTISSA_ROOM = 10**17  # one more digit fits an int64 below this; later ones are cut off, above 2^53
_SLACK = 2.0**-50  # over twice the relative error of the inexact path
_ID_CEILING = 1 << 40  # digits beyond are read but not added up


@numba.njit(cache=True, nogil=True, inline="always")
def _is_blank(byte):
    return byte in (_SPACE, _TAB, _RETURN)


@numba.njit(cache=True, nogil=True, inline="always")
def _ends_token(byte):
    return byte in (_SPACE, _TAB, _RETURN, _NEWLINE, _HASH)


@numba.njit(cache=True, nogil=True)
def _read_id(data, at):
    """An unsigned integer, -1 if there is no digit, and the position after it."""
    first = at
    number = 0
    while True:
        digit = np.int64(data[at]) - _ZERO
        if digit < 0 or digit > 9:
            break
        if number < _ID_CEILING:
            number = number * 10 + digit
        at += 1
    return (number if at > first else -1), at


@numba.njit(cache=True, nogil=True)
def _read_value(data, at):
    """A decimal number as float32, how it went, and the position after it."""
    negative = data[at] == _MINUS
    if negative or data[at] == _PLUS:
        at += 1
    mantissa, power, digits = 0, 0, 0
    after_point = False
    while True:
        digit = np.int64(data[at]) - _ZERO
        if 0 <= digit <= 9:
            digits += 1
            if mantissa < _MANTISSA_ROOM:
                mantissa = mantissa * 10 + digit
                power -= after_point
            else:
                power += not after_point
        elif data[at] == _POINT and not after_point:
            after_point = True
        else:
            break
        at += 1
    if digits == 0:
        return np.float32(0), _NO_NUMBER, at
    if data[at] in (_EXPONENT_SMALL, _EXPONENT_LARGE):
        at += 1
        down = data[at] == _MINUS
        if down or data[at] == _PLUS:
            at += 1
        exponent, at = _read_id(data, at)
        if exponent < 0:
            return np.float32(0), _NO_NUMBER, at
        power += -exponent if down else exponent
    value, settled = _scale(mantissa, power)
    return -value if negative else value, _READ if settled else _LEFT_TO_PYTHON, at


@numba.njit(cache=True, nogil=True)
def _scale(mantissa, power):
    """``float32(mantissa * 10**power)`` and whether that is surely what Python would give."""
    if abs(power) >= len(_POWERS):
        return np.float32(0), False
    value = np.float64(mantissa)
    value = value / _POWERS[-power] if power < 0 else value * _POWERS[power]
    if mantissa <= _EXACT_MANTISSA and abs(power) <= _EXACT_POWER:
        return np.float32(value), True
    low = np.float32(value * (1.0 - _SLACK))
    return low, low == np.float32(value * (1.0 + _SLACK))


@numba.njit(cache=True, nogil=True)
def count_tokens(data: np.ndarray) -> tuple[int, int, int]:
    """Newlines, colons and commas in a block: upper bounds for rows, features and further labels."""
    newlines, colons, commas = 0, 0, 0
    for byte in data:
        newlines += byte == _NEWLINE
        colons += byte == _COLON
        commas += byte == _COMMA
    return newlines, colons, commas


@numba.njit(cache=True, nogil=True)
def has_feature_zero(data: np.ndarray) -> bool:
    """Whether any ``0:`` feature token occurs in a block that ends with a newline."""
    at_start, zeros, comment = True, False, False
    for byte in data:
        if byte == _NEWLINE:
            at_start, zeros, comment = True, False, False
        elif comment:
            continue
        elif byte == _HASH:
            comment = True
        elif _is_blank(byte):
            at_start, zeros = True, False
        elif byte == _COLON and zeros:
            return True
        else:
            zeros = byte == _ZERO and (at_start or zeros)
            at_start = False
    return False


@numba.njit(cache=True, nogil=True)
def parse_rows(
    data: np.ndarray,
    base: int,
    num_features: int,
    num_classes: int,
    skip_blank: bool,
    row_at: np.ndarray,
    x_indptr: np.ndarray,
    x_indices: np.ndarray,
    x_values: np.ndarray,
    y_indptr: np.ndarray,
    y_indices: np.ndarray,
    slow_at: np.ndarray,
    slow_index: np.ndarray,
):
    """Parse a block of whole lines into caller-allocated arrays, sized by `count_tokens`.

    Args:
        data: uint8 (n,), ends with a newline, which is what stops every scan.
        base: The first feature id, 0 or 1.
        num_features: Feature ids, after `base` is taken off, are below it.
        num_classes: Class ids are below it.
        skip_blank: Pass over lines that hold nothing but blanks and a comment; otherwise they are empty rows.
        row_at: int64 (rows,), out: where each row's line begins.
        x_indptr: int64 (rows + 1,), out, as are the following.
        x_indices: int32 (features,), in the order of the text.
        x_values: float32 (features,).
        y_indptr: int64 (rows + 1,).
        y_indices: int32 (labels,), in the order of the text.
        slow_at: int64 (features,), positions of values left to Python's ``float``.
        slow_index: int64 (features,), where those belong in `x_values`.

    Returns:
        A code, the position of the offending token, rows parsed, and the number of values left to Python.
    """
    at, row, num_x, num_y, slow = 0, 0, 0, 0, 0
    x_indptr[0] = y_indptr[0] = 0
    while at < len(data):
        line = at
        while _is_blank(data[at]):
            at += 1
        if skip_blank and (data[at] in (_NEWLINE, _HASH)):
            at = _next_line(data, at)
            continue
        row_at[row] = line
        first, after = _read_id(data, at)
        if first >= 0 and data[after] != _COLON:
            code, at, num_y = _read_labels(data, at, num_classes, y_indices, num_y)
            if code != OK:
                return code, at, row, slow
        while True:
            while _is_blank(data[at]):
                at += 1
            if data[at] in (_NEWLINE, _HASH):
                break
            feature, after = _read_id(data, at)
            if feature < 0 or data[after] != _COLON:
                return BAD_FEATURE, at, row, slow
            if feature < base or feature - base >= num_features:
                return FEATURE_RANGE, at, row, slow
            value, status, end = _read_value(data, after + 1)
            if status == _NO_NUMBER or not _ends_token(data[end]):
                return BAD_VALUE, at, row, slow
            if status == _LEFT_TO_PYTHON:
                slow_at[slow] = after + 1
                slow_index[slow] = num_x
                slow += 1
            elif not np.isfinite(value):
                return NOT_FINITE, at, row, slow
            x_indices[num_x] = feature - base
            x_values[num_x] = value
            num_x += 1
            at = end
        at = _next_line(data, at)
        row += 1
        x_indptr[row] = num_x
        y_indptr[row] = num_y
    return OK, at, row, slow


@numba.njit(cache=True, nogil=True)
def _read_labels(data, at, num_classes, y_indices, num_y):
    while True:
        label, after = _read_id(data, at)
        if label < 0:
            return BAD_LABEL, at, num_y
        if label >= num_classes:
            return LABEL_RANGE, at, num_y
        y_indices[num_y] = label
        num_y += 1
        if data[after] != _COMMA:
            break
        at = after + 1
    if not _ends_token(data[after]):
        return BAD_LABEL, at, num_y
    return OK, after, num_y


@numba.njit(cache=True, nogil=True)
def _next_line(data, at):
    while data[at] != _NEWLINE:
        at += 1
    return at + 1
