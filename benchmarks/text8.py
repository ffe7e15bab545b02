"""text8, the first 10^8 characters of cleaned English Wikipedia, as word ids, and windows of it as training samples.

Every word of the file is a class, 253,854 in all, so that no word is lost in an ``<unk>``: of the test words 1.3 % do
not occur in the training part. Ids go by frequency in the training part, the most frequent word first.
"""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.datasets import CACHE, SHARED, MissingDataError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TRAIN_WORDS = 13_604_165
"""The usual split: these are for training, the rest for tests."""
PIECE = 1 << 22
"""Bytes that are read at once."""


@dataclass(frozen=True, slots=True)
class Text:
    """A text as word ids.

    Args:
        train: int32 (T,), ids of the training part, in the order of the text.
        test: int32, ids of what follows.
        counts: int64 (C,), occurrences of every word in the training part, in descending order.
    """

    train: np.ndarray
    test: np.ndarray
    counts: np.ndarray

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.counts)


def load_text8(data: Path = SHARED) -> Text:
    """text8 in its usual split; the ids are kept in the cache.

    Raises:
        MissingDataError: if the file is not there.
    """
    kept = CACHE / "text8" / "words.npy"
    if not kept.exists():
        source = data / "text8" / "text8.xz"
        if not source.exists():
            raise MissingDataError(f"{source}: no such file; give --data the directory that has text8/.")
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(".unfinished.npy")
        np.save(unfinished, word_ids(source))
        unfinished.rename(kept)
    return split(np.load(kept), TRAIN_WORDS)


def word_ids(path: Path) -> np.ndarray:
    """The words of an xz-compressed text, numbered by first occurrence: int32."""
    ids: dict[bytes, int] = {}
    parts = [
        np.fromiter((ids.setdefault(word, len(ids)) for word in words), dtype=np.int32)
        for words in _words(path)
    ]
    return np.concatenate(parts)


def _words(path: Path) -> Iterator[list[bytes]]:
    cut = b""
    with lzma.open(path) as file:
        while piece := file.read(PIECE):
            head, space, tail = (cut + piece).rpartition(b" ")
            cut = tail if space else head + tail
            yield head.split() if space else []
    yield cut.split()


def split(words: np.ndarray, train_words: int) -> Text:
    """Cuts a text in two and numbers its words by frequency in the first part (ties: by their former ids)."""
    counts = np.bincount(words[:train_words], minlength=int(words.max()) + 1)
    order = np.argsort(-counts, kind="stable")
    rank = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    ranked = rank[words]
    return Text(ranked[:train_words], ranked[train_words:], counts[order])


def windows(words: np.ndarray, places: np.ndarray, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The words before each place and the word there.

    Args:
        words: int32 (T,).
        places: int64 (N,), each from `width` to T - 1.
        width: Words before it.

    Returns:
        int64 (N, width), in the order of the text, and int64 (N,).
    """
    context_NW = words[places[:, None] + np.arange(-width, 0)]
    return torch.from_numpy(context_NW).long(), torch.from_numpy(words[places]).long()


def random_windows(
    words: np.ndarray, count: int, width: int, *, seed: int, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`windows` at `count` random places, which are a function of `seed` and `step`."""
    bits = np.random.Philox(key=[seed, 11], counter=[0, 0, 0, step])
    return windows(words, np.random.Generator(bits).integers(width, len(words), count), width)
