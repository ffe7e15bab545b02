"""L tables of 2^K buckets in compressed form: an offset per bucket, an id per class, made by counting sort.

Against lists or fixed-size arrays per bucket (SLIDE), this holds every class exactly once per table, needs no
allocation per bucket, and is in a fixed order (ids ascend within a bucket), so tables made by any route from
the same codes are equal to the byte and answers do not depend on history. Overfull buckets are bounded when
they are read, not when they are filled: see `slidex.lsh.reading`.

Legend: N rows in a batch, C classes, K hash bits, B = 2^K buckets per table, L tables, V codes looked up per
    table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from slidex.lsh import pool_voting, voting
from slidex.lsh.first_come import pool_first_come, query_first_come
from slidex.lsh.insertion import InsertedLabels
from slidex.lsh.merge import BLOCK, merge_table
from slidex.lsh.reading import OVERFLOWS, Buckets

_FEW_BUCKETS = 1024
_MERGE_RATIO_FEW = 32
_MERGE_RATIO_MANY = 12
"""A table is merged rather than sorted anew where at most one class in 32 moves, or one in 12 where it has more
than 1,024 buckets: a sort's write streams then no longer stay in the first-level cache (both measured)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSettings:
    """What queries read of tables, on whatever device they are.

    Args:
        seed: Keys ties, windows, reservoirs and orders.
        min_votes: Leave out classes with fewer votes; at least 1, of no effect with `first_come`.
        max_bucket: The most hashed classes read from one bucket; None for all.
        overflow: One of `slidex.lsh.reading.OVERFLOWS`.
        first_come: Take the first classes met instead of the most voted.
        insert: The most classes inserted per bucket, see `InsertedLabels`.
    """

    seed: int = 0
    min_votes: int = 1
    max_bucket: int | None = None
    overflow: str = "window"
    first_come: bool = False
    insert: int = 0

    def limit(self, num_classes: int) -> int:
        """The most hashed classes read from one bucket of `num_classes` in all."""
        return num_classes if self.max_bucket is None else min(self.max_bucket, num_classes)


class BucketTables:
    """Classes by code.

    Memory: ``4 L (C + 2^K + 1)`` bytes, the codes ``2 L C`` bytes (4 beyond 16 bits), and scratch for queries
        of
    1 or 2 bytes per class and thread, made on first use.

    Args:
        num_classes: C.
        tables: L.
        bits: K.
        settings: What is read of them.

    Attributes:
        offsets: int32 (L, B + 1): bucket b of table t is ``ids[t, offsets[t, b]:offsets[t, b + 1]]``.
        ids: int32 (L, C), ascending within a bucket.
        codes: (L, C), the bucket of every class in every table.
        inserted: What is read of a bucket beside its own classes.
    """

    def __init__(
        self,
        num_classes: int,
        tables: int,
        bits: int,
        settings: TableSettings,
    ) -> None:
        self.offsets = np.zeros((tables, (1 << bits) + 1), dtype=np.int32)
        entries = tables * num_classes
        self.ids = np.zeros(entries + BLOCK, dtype=np.int32)[:entries].reshape(tables, num_classes)
        self.codes = np.zeros((tables, 0), dtype=np.uint16)
        self.inserted = InsertedLabels(tables, bits, settings.insert, settings.seed)
        self._seed, self._min_votes = np.uint64(settings.seed), settings.min_votes
        self._first_come = settings.first_come
        self._limit = settings.limit(num_classes)
        self._overflow = OVERFLOWS.index(settings.overflow)
        self._votes_TC: np.ndarray = np.zeros((0, 0), dtype=np.uint8)
        self._pool_seen_C = np.zeros(0, dtype=np.uint8)
        self._pool_2TE = np.zeros((2, 0, 0), dtype=np.int32)

    @property
    def bytes(self) -> int:
        """Memory held, scratch included."""
        scratch = self._votes_TC.nbytes + self._pool_seen_C.nbytes + self._pool_2TE.nbytes
        return self.offsets.nbytes + self.ids.nbytes + self.codes.nbytes + self.inserted.bytes + scratch

    def build(self, codes_LC: np.ndarray) -> None:
        """Fill the tables.

        Args:
            codes_LC: unsigned or int32 (L, C), values in ``[0, B)``; kept, not copied.
        """
        self.codes = codes_LC
        _sort_tables(codes_LC, self.offsets, self.ids)

    def update(self, changed_ids: np.ndarray, codes_LM: np.ndarray) -> int:
        """Move the classes whose codes changed; equal to `build` with the new codes.

        Args:
            changed_ids: int64 (M,), ascending, distinct.
            codes_LM: (L, M), their new codes.

        Returns:
            How many (table, class) entries moved.
        """
        moved_L = np.zeros(len(self.ids), dtype=np.int64)
        threads = min(numba.get_num_threads(), len(self.ids))
        _update_tables(self.codes, self.offsets, self.ids, changed_ids, codes_LM, threads, moved_L)
        return int(moved_L.sum())

    def query(self, codes_NLV: np.ndarray, k: int, *, step: int) -> np.ndarray:
        """The k best classes of each query: int64 (N, k), -1 where there are no more.

        Args:
            codes_NLV: int32 (N, L, V), distinct along V.
            k: At least 1.
            step: Keys, with the seed and the codes, every random choice but the reservoirs.
        """
        out_NK = np.empty((len(codes_NLV), k), dtype=np.int64)
        buckets, keys_N = self._buckets(), voting.query_keys(codes_NLV, self._seed, np.uint64(step))
        # With insertion, a bucket may give a class two votes.
        most_votes = codes_NLV.shape[1] * codes_NLV.shape[2] * (2 if self.inserted.most else 1)
        votes_TC = self._scratch(np.dtype(np.uint8 if most_votes <= 255 else np.uint16))
        if self._first_come:
            query_first_come(buckets, codes_NLV, keys_N, votes_TC, out_NK)
            return out_NK
        capacity = min(self.ids.shape[1], voting.query_capacity(buckets, codes_NLV))
        voting.query_tables(buckets, codes_NLV, keys_N, self._min_votes, votes_TC, capacity, out_NK)
        return out_NK

    def pool(self, codes_NLV: np.ndarray, budget: int, *, step: int) -> np.ndarray:
        """The `budget` best classes over all queries: int64 (at most budget,), ascending.

        `min_votes` applies to the sum over the queries. Arguments as for `query`.
        """
        num_classes = self.ids.shape[1]
        buckets, key = self._buckets(), np.uint64(voting.mix_ids(np.array([step]), self._seed)[0])
        if self._first_come:
            if len(self._pool_seen_C) == 0:
                self._pool_seen_C = np.zeros(num_classes, dtype=np.uint8)
            ids = np.empty(min(budget, num_classes), dtype=np.int64)
            found = pool_first_come(buckets, codes_NLV, key, self._pool_seen_C, ids)
            return np.sort(ids[:found])
        codes_LM = np.ascontiguousarray(codes_NLV.transpose(1, 0, 2)).reshape(len(self.ids), -1)
        codes_LM.sort(axis=1)
        threads = numba.get_num_threads()
        if self._pool_2TE.shape[1] != threads:
            self._pool_2TE = np.empty((2, threads, num_classes // threads + 2), dtype=np.int32)
        touched_TE, votes_TE = self._pool_2TE
        most = codes_LM.size * (2 if self.inserted.most else 1)
        counts_T, histogram_TV = (
            np.zeros(threads, dtype=np.int64),
            np.zeros((threads, most + 1), dtype=np.int64),
        )
        wanted_R3 = pool_voting.distinct_buckets(codes_LM)
        pool_voting.pool_votes(buckets, wanted_R3, key, touched_TE, votes_TE, counts_T, histogram_TV)
        above, level = pool_voting.take_most_voted(
            touched_TE, votes_TE, counts_T, histogram_TV.sum(axis=0), budget, self._min_votes
        )
        wanted = min(budget - len(above), len(level))
        if wanted < len(level):  # those of the smallest hash with the key: a fair draw; NumPy's partition, as
            hashes = voting.mix_ids(level, key)  # Numba takes 10 s to compile its own
            level = level[np.argpartition(hashes, wanted)[:wanted]]
        return np.sort(np.concatenate([above, level]))

    def _buckets(self) -> Buckets:
        inserted = self.inserted
        return Buckets(
            self.offsets,
            self.ids,
            inserted.offsets,
            inserted.starts,
            inserted.ids,
            self._limit,
            self._overflow,
            self._seed,
        )

    def _scratch(self, dtype: np.dtype) -> np.ndarray:
        """A (threads, C) array of zeros, kept from call to call; users leave it zero."""
        shape = (numba.get_num_threads(), self.ids.shape[1])
        if self._votes_TC.shape != shape or self._votes_TC.dtype != dtype:
            self._votes_TC = np.zeros(shape, dtype=dtype)
        return self._votes_TC


@numba.njit(cache=True, nogil=True)
def _sort_table(codes_C, offsets, ids, cursor):
    offsets[:] = 0
    for c in range(len(codes_C)):
        offsets[codes_C[c] + 1] += 1
    for b in range(len(cursor)):
        cursor[b] = offsets[b]
        offsets[b + 1] += offsets[b]
    for c in range(len(codes_C)):
        at = cursor[codes_C[c]]
        ids[at] = c
        cursor[codes_C[c]] = at + 1


@numba.njit(cache=True, nogil=True, parallel=True)
def _sort_tables(codes_LC, offsets, ids):
    for t in numba.prange(len(codes_LC)):
        _sort_table(codes_LC[t], offsets[t], ids[t], np.empty(offsets.shape[1] - 1, dtype=np.int32))


@numba.njit(cache=True, nogil=True, parallel=True)
def _update_tables(codes_LC, offsets, ids, changed, codes_LM, threads, moved_L):
    """Tables are independent; each chunk of them shares scratch."""
    num_tables, num_classes = codes_LC.shape
    buckets = offsets.shape[1] - 1
    ratio = _MERGE_RATIO_MANY if buckets > _FEW_BUCKETS else _MERGE_RATIO_FEW
    for chunk in numba.prange(threads):
        moved = np.empty(len(changed), dtype=np.int64)
        old, new = np.empty(len(changed), dtype=np.int32), np.empty(len(changed), dtype=np.int32)
        for t in range(num_tables * chunk // threads, num_tables * (chunk + 1) // threads):
            count = 0
            for i in range(len(changed)):
                if codes_LC[t, changed[i]] != codes_LM[t, i]:
                    moved[count], old[count], new[count] = changed[i], codes_LC[t, changed[i]], codes_LM[t, i]
                    codes_LC[t, changed[i]] = codes_LM[t, i]
                    count += 1
            moved_L[t] = count
            if count == 0:
                continue
            if count * ratio > num_classes:
                _sort_table(codes_LC[t], offsets[t], ids[t], np.empty(buckets, dtype=np.int32))
            else:
                merge_table(ids[t], offsets[t], old[:count], new[:count], moved[:count])
