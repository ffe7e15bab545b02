"""Assigning rows to train, valid and test by a counter, so that a split streams whatever the block size.

Row i's draw is word i of a Philox stream keyed by the seed: no state is carried between blocks, and any part
of a file gives the same answer alone as within the whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from slidex.errors import ConfigError

if TYPE_CHECKING:
    from slidex.data.csr import CsrArrays
    from slidex.data.writer import DatasetWriter

SPLIT_NAMES = ("train", "valid", "test")
_STREAM = 0x51DE_5B17  # keeps these draws apart from other uses of the same seed
_WORDS_PER_COUNTER = 4


class Progress(Protocol):
    """Called now and then with the work done so far, in totals rather than steps."""

    def __call__(self, *, rows: int, bytes_done: int, bytes_total: int | None) -> None:
        """Take note of progress.

        Args:
            rows: Rows read so far.
            bytes_done: Bytes of the source files read so far, as they lie on disk (compressed).
            bytes_total: Size of the source files in bytes, or None where it is not known.
        """


def split_of_rows(first_row: int, count: int, seed: int, fractions: tuple[float, float]) -> np.ndarray:
    """The split of each of the rows ``first_row : first_row + count``.

    Args:
        first_row: Number of the first row, from 0.
        count: How many rows.
        seed: Any integer in ``[0, 2**64)``.
        fractions: Expected share of rows in valid and in test.

    Returns:
        int8 (count,), positions in `SPLIT_NAMES`: 0 train, 1 valid, 2 test.

    Raises:
        ConfigError: A fraction is outside ``[0, 1)``, or together they leave nothing for training.
    """
    check_fractions(*fractions)
    valid, test = fractions
    if valid == test == 0.0:
        return np.zeros(count, dtype=np.int8)
    skip = first_row % _WORDS_PER_COUNTER
    stream = np.random.Philox(
        counter=first_row // _WORDS_PER_COUNTER, key=np.array([seed, _STREAM], dtype=np.uint64)
    )
    draws = (stream.random_raw(count + skip)[skip:] >> np.uint64(11)) * 2.0**-53
    return np.where(draws < test, 2, draws < test + valid).astype(np.int8)


def check_fractions(valid_fraction: float, test_fraction: float) -> None:
    """Raise ConfigError unless the two shares are in ``[0, 1)`` and leave rows to train on."""
    for name, value in (("valid_fraction", valid_fraction), ("test_fraction", test_fraction)):
        if not (math.isfinite(value) and 0.0 <= value < 1.0):
            raise ConfigError(f"The '{name}' parameter of a split must be in [0, 1). Got {value!r} instead.")
    if valid_fraction + test_fraction >= 1.0:
        raise ConfigError(
            "The 'valid_fraction' and 'test_fraction' parameters of a split must add up to less than 1. "
            f"Got {valid_fraction!r} and {test_fraction!r} instead."
        )


@dataclass(frozen=True, slots=True)
class SplitRule:
    """Where the rows of one source go.

    Args:
        seed: Any integer in ``[0, 2**64)``.
        valid_fraction: Expected share of rows in valid (of all rows, or of those not in `test_rows`).
        test_fraction: Expected share of rows in test.
        test_rows: int64, increasing: exactly these rows are the test split.

    Raises:
        ConfigError: A fraction or the seed is out of range, or both ways to choose test rows are given.
    """

    seed: int = 0
    valid_fraction: float = 0.0
    test_fraction: float = 0.0
    test_rows: np.ndarray | None = None

    def __post_init__(self) -> None:
        check_fractions(self.valid_fraction, self.test_fraction)
        if not 0 <= self.seed < 2**64:
            raise ConfigError(
                f"The 'seed' parameter of a split must be in [0, 2**64). Got {self.seed!r} instead."
            )
        if self.test_rows is not None and self.test_fraction:
            raise ConfigError(
                "The 'test_fraction' parameter of a split must be 0 where test rows are listed. "
                f"Got {self.test_fraction!r} instead."
            )

    def append(self, writer: DatasetWriter, first_row: int, x: CsrArrays, y: CsrArrays) -> None:
        """Append rows to the splits they belong to, in order.

        Args:
            writer: Takes them.
            first_row: Number of the first of these rows within the source, from 0.
            x: Inputs (n, F).
            y: Labels (n, C).
        """
        codes = split_of_rows(first_row, x.num_rows, self.seed, (self.valid_fraction, self.test_fraction))
        if self.test_rows is not None:
            first, stop = np.searchsorted(self.test_rows, [first_row, first_row + x.num_rows])
            codes[self.test_rows[first:stop] - first_row] = SPLIT_NAMES.index("test")
        for code, name in enumerate(SPLIT_NAMES):
            rows = np.flatnonzero(codes == code)
            if len(rows) == x.num_rows:
                writer.append(name, x, y)
            elif len(rows):
                writer.append(name, x.take(rows), y.take(rows))
