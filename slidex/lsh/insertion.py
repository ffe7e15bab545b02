"""Classes inserted in the buckets where their own samples' hidden vectors land, with counts.

A hashed index finds a class where its weight row lies; a query asks where its hidden vector lies, and the two
need not meet. Inserting the true classes of training rows in the very buckets those rows look up (BOLT's
freeze-and-insert, HALOS) makes the tables an inverted index from places to labels, learned by counting. Each
bucket keeps its most frequent classes only, so memory is bounded whatever the number of samples; what is
turned away loses its count. Legend: N rows, L tables, B = 2^K buckets per table, P labels of all rows, I kept.
"""

from __future__ import annotations

import numba
import numpy as np

from slidex.errors import ConfigError
from slidex.lsh.reading import bucket_key, mix

_LARGEST_COUNT = np.iinfo(np.int32).max


class InsertedLabels:
    """At most `most` classes per bucket, those counted most often; equal counts by a hash.

    Memory: ``4 L (B + 1)`` bytes and 8 bytes per class kept; nothing but the object where `most` is 0.

    Args:
        tables: L.
        bits: K.
        most: Classes kept per bucket; 0 for none ever.
        seed: Keys the choice among equal counts.

    Attributes:
        offsets: int32 (L, B + 1), as in `slidex.lsh.reading.Buckets`; (0, 0) where `most` is 0.
        starts: int64 (L + 1,), where each table's part of `ids` begins.
        ids: int32 (I,), ascending within a bucket.
        counts: int32 (I,), how many sampled rows of the class landed in the bucket since it is kept.
    """

    def __init__(self, tables: int, bits: int, most: int, seed: int) -> None:
        self.most = most
        self._tables, self._buckets, self._seed = tables, 1 << bits, np.uint64(seed)
        self.clear()

    @property
    def bytes(self) -> int:
        """Memory held."""
        return self.offsets.nbytes + self.ids.nbytes + self.counts.nbytes

    def clear(self) -> None:
        """Forget all."""
        self.offsets = np.zeros((self._tables, self._buckets + 1) if self.most else (0, 0), dtype=np.int32)
        self.starts = np.zeros(self._tables + 1, dtype=np.int64)
        self.ids, self.counts = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32)

    def add(self, codes_NL: np.ndarray, label_indptr: np.ndarray, label_ids: np.ndarray) -> None:
        """Count every row's classes in the buckets the row lands in, and keep the most counted of each.

        Args:
            codes_NL: integer (N, L), values in ``[0, B)``.
            label_indptr: int64 (N + 1,).
            label_ids: int64 (P,).
        """
        order = np.argsort(label_ids, kind="stable")
        rows_P = np.repeat(np.arange(len(codes_NL)), np.diff(label_indptr))[order]
        width = len(label_ids) + int(np.diff(self.starts).max())
        ids_LW = np.empty((self._tables, min(width, self.most * self._buckets)), dtype=np.int32)
        counts_LW = np.empty_like(ids_LW)
        offsets = np.zeros_like(self.offsets)
        codes_LN = np.ascontiguousarray(codes_NL.T, dtype=np.int32)
        kept = (self.offsets, self.starts, self.ids, self.counts)
        _insert_tables(
            codes_LN, rows_P, label_ids[order], kept, self.most, self._seed, offsets, ids_LW, counts_LW
        )
        filled = np.arange(ids_LW.shape[1]) < offsets[:, -1:]
        self._set(offsets, ids_LW[filled], counts_LW[filled])

    def state(self) -> dict[str, np.ndarray]:
        """What `load_state` restores: nothing where `most` is 0."""
        if not self.most:
            return {}
        return {
            "inserted_offsets": self.offsets,
            "inserted_ids": self.ids,
            "inserted_counts": self.counts,
        }

    def load_state(self, state: dict[str, np.ndarray], num_classes: int) -> None:
        """Restore what `state` gave on labels of the same tables, bits and `most`.

        Raises:
            ConfigError: The arrays are not such a state of an index over `num_classes` classes.
        """
        if not self.most:
            return
        offsets, ids, counts = (
            state[name] for name in ("inserted_offsets", "inserted_ids", "inserted_counts")
        )
        sizes = np.diff(offsets, axis=1)
        fits = bool((offsets[:, 0] == 0).all() and (sizes >= 0).all() and (sizes <= self.most).all())
        fits = fits and len(ids) == len(counts) == int(offsets[:, -1].sum(dtype=np.int64))
        fits = fits and not (((ids < 0) | (ids >= num_classes)).any() or (counts < 1).any())
        if not fits:
            raise ConfigError(
                f"The 'inserted' tensors of the state given to HashIndex.load_state must hold, per bucket, at "
                f"most {self.most} ids from 0 to {num_classes - 1} with counts of at least 1. "
                f"Got {len(ids)} ids and {len(counts)} counts that do not instead."
            )
        self._set(offsets.copy(), ids.copy(), counts.copy())

    def _set(self, offsets: np.ndarray, ids: np.ndarray, counts: np.ndarray) -> None:
        self.offsets, self.ids, self.counts = offsets, ids, counts
        self.starts = np.concatenate([[0], np.cumsum(offsets[:, -1], dtype=np.int64)])


@numba.njit(cache=True, nogil=True)
def _count_bucket(old_ids, old_counts, new_ids, ids, counts):
    """Merge ascending kept classes with ascending, repeated new ones; returns how many distinct there are."""
    size = i = j = 0
    while i < len(old_ids) or j < len(new_ids):
        if j == len(new_ids) or (i < len(old_ids) and old_ids[i] <= new_ids[j]):
            c, count = old_ids[i], np.int64(old_counts[i])
            i += 1
        else:
            c, count = new_ids[j], np.int64(0)
        while j < len(new_ids) and new_ids[j] == c:
            count += 1
            j += 1
        ids[size], counts[size] = c, min(count, _LARGEST_COUNT)
        size += 1
    return size


@numba.njit(cache=True, nogil=True)
def _keep_most(ids, counts, most, key, ranks):
    """Move the `most` highest counts to the front, in order of class; returns how many are left."""
    if len(ids) <= most:
        return len(ids)
    for i in range(len(ids)):
        ranks[i] = np.uint64(counts[i]) << np.uint64(32) | mix(key ^ np.uint64(ids[i])) >> np.uint64(32)
    lowest = np.sort(ranks[: len(ids)])[len(ids) - most]
    size = 0
    for i in range(len(ids)):
        if ranks[i] >= lowest and size < most:
            ids[size], counts[size] = ids[i], counts[i]
            size += 1
    return size


@numba.njit(cache=True, nogil=True)
def _insert_table(codes_N, rows_P, labels_P, old, most, key, table, offsets, out_ids, out_counts):
    """One table of `_insert_tables`; `old` is its (offsets, ids, counts) before."""
    ends = np.zeros(len(offsets), dtype=np.int64)
    for p in range(len(rows_P)):
        ends[codes_N[rows_P[p]] + 1] += 1
    ends = np.cumsum(ends)
    landed = np.empty(len(rows_P), dtype=np.int32)
    for p in range(len(rows_P)):  # labels ascend, so they do within each bucket
        bucket = codes_N[rows_P[p]]
        landed[ends[bucket]] = labels_P[p]
        ends[bucket] += 1
    ids = np.empty(len(rows_P) + most, dtype=np.int32)
    counts, ranks = np.empty_like(ids), np.empty(len(ids), dtype=np.uint64)
    first = at = 0
    for b in range(len(offsets) - 1):
        kept = slice(old[0][b], old[0][b + 1])
        size = _count_bucket(old[1][kept], old[2][kept], landed[first : ends[b]], ids, counts)
        size = _keep_most(ids[:size], counts[:size], most, bucket_key(key, table, b), ranks)
        out_ids[at : at + size], out_counts[at : at + size] = ids[:size], counts[:size]
        first, at = ends[b], at + size
        offsets[b + 1] = at


@numba.njit(cache=True, nogil=True, parallel=True)
def _insert_tables(codes_LN, rows_P, labels_P, old, most, key, offsets, ids_LW, counts_LW):
    """Add the labels (ascending, each with its row) to what is kept; a table is one thread's.

    Reads ``old = (offsets, starts, ids, counts)``; writes `offsets`, and each table's classes to the head of
    its row of `ids_LW` and `counts_LW`.
    """
    old_offsets, starts, old_ids, old_counts = old
    for t in numba.prange(len(codes_LN)):
        part = slice(starts[t], starts[t + 1])
        kept = (old_offsets[t], old_ids[part], old_counts[part])
        _insert_table(codes_LN[t], rows_P, labels_P, kept, most, key, t, offsets[t], ids_LW[t], counts_LW[t])
