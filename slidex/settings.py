"""Records of settings: fields that say what they mean and between what limits, checked where a record is made.

This module imports neither torch nor numpy: ``slidex --help`` reads it.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import field, fields
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

from slidex.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


DEVICE = {"pattern": r"cpu|cuda(:\d+)?", "form": "cpu, cuda or cuda:N"}
"""Limits of the name of a device."""


def setting(default: Any, text: str, **limits: Any) -> Any:
    """A dataclass field with its help text and its limits: `low`, `high` (inclusive), `below`, `choices`, or `pattern`.

    A `pattern` is a regular expression, with `form` in words.
    """
    return field(default=default, metadata={"help": text, **limits})


def check_settings(record: Any) -> None:
    """Raises ConfigError, naming the setting, unless every field of a dataclass of settings has its type and range."""
    hints = get_type_hints(type(record))
    for item in fields(record):
        if "help" in item.metadata:
            _check(item.name, getattr(record, item.name), hints[item.name], item.metadata)


def check_device(name: str) -> None:
    """Raises ConfigError, naming the setting 'device', unless it is the name of a device."""
    _check("device", name, str, DEVICE)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest of the known names as a question with a space before it, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _check(name: str, value: Any, hint: Any, limits: Mapping[str, Any]) -> None:
    optional = value is None and type(None) in getattr(hint, "__args__", ())
    if optional:
        return
    if get_origin(hint) is dict:
        check_table(name, value)
        return
    items = value if hint == tuple[int, ...] and isinstance(value, tuple) else (value,)
    kind = next(
        kind for kind in (bool, int, float, str) if kind is hint or kind in getattr(hint, "__args__", ())
    )
    for item in items:
        right_type = isinstance(item, int | float if kind is float else kind)
        if not right_type or (isinstance(item, bool) and kind is not bool):
            raise ConfigError(
                f"The {name!r} setting must be {_in_words(kind, limits)}. Got {value!r} instead."
            )
        in_range = (
            item in limits.get("choices", (item,))
            and ("low" not in limits or item >= limits["low"])
            and ("high" not in limits or item <= limits["high"])
            and ("below" not in limits or item < limits["below"])
            and ("pattern" not in limits or re.fullmatch(limits["pattern"], str(item)) is not None)
        )
        if not in_range:
            raise ConfigError(
                f"The {name!r} setting must be {_in_words(kind, limits)}. Got {value!r} instead."
            )


def check_table(name: str, value: Any) -> None:
    """Raises ConfigError, naming the setting, unless the value is a table of names and plain values."""
    plain = isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(item, bool | int | float | str) for key, item in value.items()
    )
    if not plain:
        raise ConfigError(
            f"The {name!r} setting must be a table of names and plain values. Got {value!r} instead."
        )


def _in_words(kind: type, limits: Mapping[str, Any]) -> str:
    if "choices" in limits:
        return "one of " + ", ".join(limits["choices"])
    if "form" in limits:
        return limits["form"]
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
    bounds = [
        f"{sign} {limits[key]}"
        for key, sign in (("low", "at least"), ("high", "at most"), ("below", "below"))
        if key in limits
    ]
    return f"{words} {' and '.join(bounds)}".strip()
