"""What a model has to beat: the most frequent classes, and an n-gram back-off over the tokens before.

Both answer with the k best classes of every row, so that the same metrics apply as to a model. Ties go to the
class that is more frequent overall, then to the lower id: answers are the same everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from slidex.data.python_source import CONTEXT_FILE
from slidex.errors import ConfigError, DataError

if TYPE_CHECKING:
    from slidex.data.dataset import Dataset

_BLOCK = 1 << 16  # rows answered at a time


class FrequencyBaseline:
    """Answers every row with the classes most frequent in training."""

    def fit(self, data: Dataset) -> Self:
        """Count the classes of the training split."""
        self._ranked = np.argsort(-data.class_counts(), kind="stable").astype(np.int32)
        return self

    def topk(self, data: Dataset, k: int, split: str = "test") -> np.ndarray:
        """The same k classes for every row.

        Args:
            data: A data set with the classes of the one it was fitted on.
            k: How many, 1 or more.
            split: Name of the split.

        Returns:
            int32 (rows, k), best first, -1 where there are fewer than k classes; a read-only view.
        """
        best = np.full(_check_k(k), -1, dtype=np.int32)
        best[: len(self._ranked)] = self._ranked[:k]
        return np.broadcast_to(best, (data.split(split).num_rows, k))


class BackoffBaseline:
    """Ranks classes by how often they followed the same last tokens in training.

    The classes seen after the last two tokens come first, by count, then those after the last token alone, then
    the most frequent ones: the ranking of "stupid back-off" (Brants et al., 2007) with a discount so small that
    a longer context always wins.

    Args:
        order: Tokens in an n-gram, the predicted one included: 3, 2, or 1 (the same as `FrequencyBaseline`).

    Raises:
        ConfigError: `order` is none of these.
    """

    def __init__(self, order: int = 3) -> None:
        if order not in {1, 2, 3}:
            raise ConfigError(
                f"The 'order' parameter of BackoffBaseline must be 1, 2 or 3. Got {order!r} instead."
            )
        self._order = order

    def fit(self, data: Dataset) -> Self:
        """Count n-grams of the training split.

        Args:
            data: Made by `prepare_python_source`: one label a row, and a context file.

        Raises:
            DataError: There is no context file, or rows have not one label each.
        """
        split = data.split("train")
        if not np.array_equal(split.y.indptr, np.arange(split.num_rows + 1)):
            raise DataError("expected exactly one label in every training row", path=data.path)
        self._ranked = np.argsort(-data.class_counts(), kind="stable").astype(np.int32)
        rank = np.empty_like(self._ranked)
        rank[self._ranked] = np.arange(len(rank), dtype=np.int32)
        ranks, context = rank[split.y.indices], _read_context(data, "train")
        self._tables = [
            _count(_keys(context, length), ranks, len(rank)) for length in range(self._order - 1, 0, -1)
        ]
        return self

    def topk(self, data: Dataset, k: int, split: str = "test") -> np.ndarray:
        """The k best classes of every row.

        Args:
            data: A data set with the classes of the one it was fitted on.
            k: How many, 1 or more.
            split: Name of the split.

        Returns:
            int32 (rows, k), best first, -1 where there are fewer than k classes.

        Raises:
            DataError: The split has no context file.
        """
        _check_k(k)
        context = _read_context(data, split)
        best = np.empty((len(context), k), dtype=np.int32)
        for start in range(0, len(context), _BLOCK):
            block = context[start : start + _BLOCK]
            offers = [
                _look_up(table, _keys(block, length), k)
                for table, length in zip(self._tables, range(self._order - 1, 0, -1), strict=True)
            ]
            frequent = np.full(k, -1, dtype=np.int32)
            frequent[: len(self._ranked)] = np.arange(min(k, len(self._ranked)))
            offers.append(np.broadcast_to(frequent, (len(block), k)))
            ranks = _first_different(np.concatenate(offers, axis=1), k)
            best[start : start + _BLOCK] = np.where(ranks < 0, -1, self._ranked[ranks])
        return best


class _Table(NamedTuple):
    """Class ranks after each context, most often seen first: those of ``keys[i]`` at ``starts[i:i+2]``."""

    keys: np.ndarray
    starts: np.ndarray
    ranks: np.ndarray


def _count(keys: np.ndarray, ranks: np.ndarray, num_classes: int) -> _Table:
    unique, place = np.unique(keys, return_inverse=True)
    pairs, counts = np.unique(place * num_classes + ranks, return_counts=True)
    owner, rank = np.divmod(pairs, num_classes)
    order = np.lexsort((rank, -counts, owner))  # by context, then count, then overall frequency
    starts = np.searchsorted(owner, np.arange(len(unique) + 1))
    return _Table(unique, starts, rank[order].astype(np.int32))


def _look_up(table: _Table, keys: np.ndarray, k: int) -> np.ndarray:
    """The first k ranks after each context, -1 where there are no more: int32 (rows, k)."""
    at = np.minimum(np.searchsorted(table.keys, keys), len(table.keys) - 1)
    start, stop = table.starts[at], np.where(table.keys[at] == keys, table.starts[at + 1], 0)
    places = start[:, None] + np.arange(k)
    return np.where(places < stop[:, None], table.ranks[np.minimum(places, len(table.ranks) - 1)], -1)


def _first_different(offers: np.ndarray, k: int) -> np.ndarray:
    """The first k different numbers of each row; -1 counts as nothing."""
    unwanted = offers < 0
    for column in range(1, offers.shape[1]):
        unwanted[:, column] |= (offers[:, :column] == offers[:, column, None]).any(axis=1)
    order = np.argsort(unwanted, axis=1, kind="stable")[:, :k]
    chosen = np.take_along_axis(offers, order, axis=1)
    return np.where(np.take_along_axis(unwanted, order, axis=1), -1, chosen)


def _keys(context: np.ndarray, length: int) -> np.ndarray:
    """One int64 for the last ``length`` tokens of each row."""
    if length == 1:
        return context[:, 1].astype(np.int64)
    return (context[:, 0].astype(np.int64) << 32) | context[:, 1].astype(np.int64) & 0xFFFFFFFF


def _read_context(data: Dataset, split: str) -> np.ndarray:
    path, rows = data.path / split / CONTEXT_FILE, data.split(split).num_rows
    try:
        context = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"expected the contexts of a python-source data set: {error}", path=path) from error
    if context.dtype != np.int32 or context.shape != (rows, 2):
        raise DataError(f"expected int32 ({rows}, 2), found {context.dtype} {context.shape}", path=path)
    return context


def _check_k(k: int) -> int:
    if k < 1:
        raise ConfigError(f"The 'k' parameter of topk must be 1 or more. Got {k!r} instead.")
    return k
