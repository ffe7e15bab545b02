"""Votes of a batch over more classes than the counters of one span, against NumPy's counting of what buckets hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np
import pytest

from slidex.lsh.pool_voting import SPAN
from slidex.lsh.reading import OVERFLOWS, bucket_key, read_bucket, read_inserted
from slidex.lsh.tables import BucketTables, TableSettings
from slidex.lsh.voting import mix_ids

if TYPE_CHECKING:
    from collections.abc import Iterator

CLASSES = 2 * SPAN + SPAN // 2 + 7
TABLES, BITS, SEED = 3, 4, 5


@pytest.fixture
def threads() -> Iterator[None]:
    """Leaves Numba the threads that it had."""
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


def large_tables(**settings: object) -> BucketTables:
    """Buckets of 100 to 100,000 classes, some of them over all spans and some within one; classes inserted."""
    rng = np.random.default_rng(SEED)
    codes_LC = np.minimum(rng.geometric(0.5, (TABLES, CLASSES)) - 1, 12).astype(np.uint16)
    codes_LC[0, SPAN - 50 : SPAN + 50] = 14  # on both sides of a border
    codes_LC[1, -40:] = 15
    tables = BucketTables(CLASSES, TABLES, BITS, TableSettings(seed=SEED, **settings))
    tables.build(codes_LC)
    labels = rng.integers(0, CLASSES, 900)
    labels[:3] = 0, SPAN, CLASSES - 1
    landed = np.minimum(rng.geometric(0.5, (900, TABLES)) - 1, 15)
    if tables.inserted.most:
        tables.inserted.add(landed, np.arange(901), labels)
    return tables


def lookups() -> np.ndarray:
    """Codes of 40 queries: frequent, rare and empty buckets, most of them wanted by several."""
    return np.random.default_rng(SEED + 1).integers(3, 16, (40, TABLES, 1)).astype(np.int32)


def counted(tables: BucketTables, codes_NLV: np.ndarray, step: int) -> np.ndarray:
    """Votes of every class: int64 (C,)."""
    buckets, votes_C = tables._buckets(), np.zeros(CLASSES, dtype=np.int64)
    key = mix_ids(np.array([step]), np.uint64(SEED))[0]
    scratch = np.empty(buckets.limit, dtype=np.int32)
    for t in range(TABLES):
        for bucket, wanted in zip(*np.unique(codes_NLV[:, t], return_counts=True), strict=True):
            own_key = np.uint64(bucket_key(key, t, bucket))  # returned to Python as an int
            ids, start, take = read_bucket(buckets, t, bucket, own_key, scratch)
            votes_C[np.roll(ids, -start)[:take]] += wanted
            if tables.inserted.most:
                votes_C[read_inserted(buckets, t, bucket)] += wanted
    return votes_C


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("min_votes", [1, 12])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"insert": 6},
        *({"max_bucket": 3_000, "overflow": overflow, "insert": 2} for overflow in OVERFLOWS),
    ],
    ids=["whole", "inserted", *OVERFLOWS],
)
@pytest.mark.usefixtures("threads")
def test_the_most_voted_of_many_classes_are_taken(
    settings: dict[str, object], min_votes: int, count: int
) -> None:
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
    tables = large_tables(min_votes=min_votes, **settings)
    codes_NLV = lookups()
    for step, budget in enumerate(
        (1, 300, 20_000, CLASSES)
    ):  # a second call must find no votes left of the first
        found = tables.pool(codes_NLV, budget, step=step)
        votes_C = counted(tables, codes_NLV, step)
        best = np.sort(votes_C[votes_C >= min_votes])[::-1][:budget]
        assert np.array_equal(np.sort(votes_C[found])[::-1], best)
        assert (np.diff(found) > 0).all()


@pytest.mark.usefixtures("threads")
def test_any_number_of_threads_takes_the_same_classes() -> None:
    tables, found = large_tables(insert=2, max_bucket=5_000), []
    for count in (1, min(2, numba.config.NUMBA_NUM_THREADS)):
        numba.set_num_threads(count)
        found.append(tables.pool(lookups(), 700, step=3))
    assert np.array_equal(*found)
