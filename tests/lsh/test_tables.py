"""Bucket tables and voting against plain-Python references, and proof that the comparison has teeth."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidex.lsh import reading
from slidex.lsh import tables as module
from slidex.lsh.reading import OVERFLOWS
from slidex.lsh.tables import BucketTables, TableSettings


def reference(codes_LC: np.ndarray) -> list[dict[int, list[int]]]:
    tables = []
    for row in codes_LC.tolist():
        buckets = defaultdict(list)
        for c, code in enumerate(row):
            buckets[code].append(c)
        tables.append(dict(buckets))
    return tables


def contents(tables: BucketTables) -> list[dict[int, list[int]]]:
    found = []
    for offsets, ids in zip(tables.offsets, tables.ids, strict=True):
        buckets = {b: ids[offsets[b] : offsets[b + 1]].tolist() for b in range(len(offsets) - 1)}
        found.append({b: members for b, members in buckets.items() if members})
    return found


def filled(codes_LC: np.ndarray, bits: int, **settings: object) -> BucketTables:
    tables = BucketTables(codes_LC.shape[1], len(codes_LC), bits, TableSettings(**({"seed": 1} | settings)))
    tables.build(codes_LC)
    return tables


def random_codes(seed: int, num_tables: int, num_classes: int, bits: int) -> np.ndarray:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (num_tables, num_classes))
    return codes.astype(np.uint16)


def votes_of(codes_LC: np.ndarray, query_LV: np.ndarray) -> Counter[int]:
    votes = Counter()
    for table, codes in zip(reference(codes_LC), query_LV.tolist(), strict=True):
        for code in codes:
            votes.update(table.get(code, []))
    return votes


def ask(tables: BucketTables, codes_NLV: np.ndarray, k: int, step: int = 0) -> np.ndarray:
    return tables.query(codes_NLV.astype(np.int32), k, step=step)


def ask_pool(tables: BucketTables, codes_NLV: np.ndarray, budget: int, step: int = 0) -> np.ndarray:
    return tables.pool(codes_NLV.astype(np.int32), budget, step=step)


SHAPES = {
    "seed": st.integers(0, 10**6),
    "num_tables": st.integers(1, 6),
    "num_classes": st.integers(1, 200),
    "bits": st.integers(1, 8),
}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(**SHAPES)
def test_tables_hold_every_class_once_in_its_bucket(seed, num_tables, num_classes, bits) -> None:
    codes_LC = random_codes(seed, num_tables, num_classes, bits)
    assert contents(filled(codes_LC, bits)) == reference(codes_LC)


def test_a_misplaced_id_is_noticed_by_the_reference_and_by_the_votes() -> None:
    codes_LC = random_codes(0, 4, 100, 5)
    tables = filled(codes_LC, 5)
    lost = 40
    query_LV = codes_LC[:, lost : lost + 1]
    assert contents(tables) == reference(codes_LC)
    assert ask(tables, query_LV[None], 1)[0, 0] == lost
    for row, codes_C in zip(tables.ids, codes_LC, strict=True):
        here = int(np.flatnonzero(row == lost)[0])
        there = int(np.flatnonzero(codes_C[row] != codes_C[lost])[0])
        row[here], row[there] = row[there], row[here]
        assert contents(tables) != reference(codes_LC)
    votes = votes_of(codes_LC, query_LV)
    found = ask(tables, query_LV[None], 100)[0]
    assert lost not in found
    assert [votes[c] for c in found if c >= 0] != sorted(votes.values(), reverse=True)


def test_a_lost_id_is_noticed_by_the_reference() -> None:
    codes_LC = random_codes(0, 4, 100, 5)
    tables = filled(codes_LC, 5)
    tables.ids[2, 40] = tables.ids[2, 41]
    assert contents(tables) != reference(codes_LC)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    num_classes=st.integers(1, 12_000),
    bits=st.sampled_from([3, 11, 12]),
    changed=st.integers(0, 40),
    crowded=st.booleans(),
)
def test_update_equals_rebuild(seed, num_classes, bits, changed, crowded) -> None:
    generator = np.random.default_rng(seed)
    codes_LC = random_codes(seed, 3, num_classes, bits)
    if crowded:
        codes_LC %= 7  # many moves between the same few buckets
    tables = filled(codes_LC.copy(), bits)
    ids = np.unique(generator.integers(0, num_classes, changed))
    codes_LM = generator.integers(0, 7 if crowded else 1 << bits, (3, len(ids))).astype(np.uint16)
    codes_LM[1] = codes_LC[1, ids]
    assert tables.update(ids, codes_LM) == int((codes_LC[:, ids] != codes_LM).sum())
    codes_LC[:, ids] = codes_LM
    rebuilt = filled(codes_LC, bits)
    for name in ("offsets", "ids", "codes"):
        assert np.array_equal(getattr(tables, name), getattr(rebuilt, name)), name


@pytest.mark.parametrize(
    ("bits", "count", "merged"), [(11, 83, True), (11, 84, False), (10, 31, True), (10, 32, False)]
)
def test_few_moves_are_merged_and_many_sorted(monkeypatch, bits: int, count: int, merged: bool) -> None:
    monkeypatch.setattr(module, "merge_table", _refuse)
    codes_LC = random_codes(0, 2, 1_000, bits)
    tables, ids = filled(codes_LC.copy(), bits), np.arange(count)
    arguments = (
        tables.codes,
        tables.offsets,
        tables.ids,
        ids,
        codes_LC[:, ids] ^ 1,
        1,
        np.zeros(2, np.int64),
    )
    if merged:
        with pytest.raises(_MergedError):
            module._update_tables.py_func(*arguments)
    else:
        module._update_tables.py_func(*arguments)
        codes_LC[:, ids] ^= 1
        assert contents(tables) == reference(codes_LC)


class _MergedError(Exception):
    pass


def _refuse(*_: object) -> None:
    raise _MergedError


@settings(max_examples=50, deadline=None, derandomize=True)
@given(**SHAPES, k=st.integers(1, 250), min_votes=st.integers(1, 4), versions=st.integers(1, 2))
def test_query_takes_the_most_voted(seed, num_tables, num_classes, bits, k, min_votes, versions) -> None:
    codes_LC = random_codes(seed, num_tables, num_classes, bits)
    base = np.random.default_rng(seed + 1).integers(0, 1 << bits, (5, num_tables, 1))
    queries = np.concatenate([base ^ v for v in range(versions)], axis=2)
    answers = ask(filled(codes_LC, bits, min_votes=min_votes), queries, k)
    for ids, query_LV in zip(answers, queries, strict=True):
        votes = votes_of(codes_LC, query_LV)
        best = sorted((v for v in votes.values() if v >= min_votes), reverse=True)[:k]
        found = ids[ids >= 0].tolist()
        assert [votes[c] for c in found] == best
        assert len(set(found)) == len(found)
        assert (ids[len(found) :] == -1).all()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(**SHAPES, budget=st.integers(1, 250), min_votes=st.integers(1, 6), num_rows=st.integers(0, 6))
def test_pool_takes_the_most_voted(seed, num_tables, num_classes, bits, budget, min_votes, num_rows) -> None:
    codes_LC = random_codes(seed, num_tables, num_classes, bits)
    # Codes from a narrow range, so that several queries want the same bucket.
    queries = np.random.default_rng(seed + 1).integers(0, min(4, 1 << bits), (num_rows, num_tables, 1))
    found = ask_pool(filled(codes_LC, bits, min_votes=min_votes), queries, budget).tolist()
    votes = sum((votes_of(codes_LC, query_LV) for query_LV in queries), Counter())
    best = sorted((v for v in votes.values() if v >= min_votes), reverse=True)[:budget]
    assert sorted((votes[c] for c in found), reverse=True) == best
    assert found == sorted(set(found))


def answers_over_steps(call: str, tables: BucketTables, steps: int, k: int) -> list[np.ndarray]:
    queries = np.zeros((1, len(tables.ids), 1), dtype=np.int32)
    if call == "pool":
        return [ask_pool(tables, queries, k, step=step) for step in range(steps)]
    rows = (ask(tables, queries, k, step=step)[0] for step in range(steps))
    return [row[row >= 0] for row in rows]


@pytest.mark.parametrize("num_tables", [1, 3])
@pytest.mark.parametrize("call", ["query", "pool"])
def test_ties_favour_no_class(call: str, num_tables: int) -> None:
    tables = filled(np.zeros((num_tables, 50), dtype=np.uint16), 1)
    answers = answers_over_steps(call, tables, 1_000, 10)
    counts = np.bincount(np.concatenate(answers), minlength=50)
    assert np.abs(counts - 200).max() < 5 * np.sqrt(200 * 0.8)


@pytest.mark.parametrize("call", ["query", "pool"])
def test_overfull_buckets_are_read_at_a_window_that_favours_no_class(call: str) -> None:
    tables = filled(np.zeros((1, 50), dtype=np.uint16), 1, max_bucket=10)
    answers = answers_over_steps(call, tables, 1_000, 50)
    for found in answers:
        assert len(found) == 10
        assert (np.diff(np.sort(found)) > 1).sum() <= 1  # contiguous, but for the wrap
    counts = np.bincount(np.concatenate(answers), minlength=50)
    assert np.abs(counts - 200).max() < 5 * np.sqrt(200 * 0.8)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(**SHAPES, limit=st.integers(1, 30), overflow=st.sampled_from(OVERFLOWS), versions=st.integers(1, 2))
def test_overfull_buckets_are_read_to_the_limit(
    seed, num_tables, num_classes, bits, limit, overflow, versions
) -> None:
    codes_LC = random_codes(seed, num_tables, num_classes, bits)
    base = random_codes(seed + 1, 4, num_tables, bits)[:, :, None]
    queries = np.concatenate([base ^ v for v in range(versions)], axis=2)
    tables = filled(codes_LC, bits, max_bucket=limit, overflow=overflow)
    answers = ask(tables, queries, num_classes)
    pooled = ask_pool(tables, queries, num_classes).tolist()
    expected = [read_votes(codes_LC, query_LV, limit, overflow) for query_LV in queries]
    for ids, query_LV, votes in zip(answers, queries, expected, strict=True):
        found = ids[ids >= 0].tolist()
        if overflow == "window":  # where it lies is tested above; here that it holds what it must
            assert set(found) <= set(votes_of(codes_LC, query_LV))
            sizes = [
                len(t.get(c, []))
                for t, row in zip(reference(codes_LC), query_LV.tolist(), strict=True)
                for c in row
            ]
            assert min(limit, max(sizes)) <= len(found) <= sum(min(limit, size) for size in sizes)
        else:
            assert set(found) == set(votes)
            assert [votes[c] for c in found] == sorted(votes.values(), reverse=True)
    if overflow != "window":
        assert set(pooled) == set().union(*expected)


def read_votes(codes_LC: np.ndarray, query_LV: np.ndarray, limit: int, overflow: str) -> Counter[int]:
    votes = Counter()
    for t, (table, codes) in enumerate(zip(reference(codes_LC), query_LV.tolist(), strict=True)):
        for code in codes:
            members = table.get(code, [])
            if len(members) > limit and overflow == "reservoir":
                members = reservoir(members, limit, t, code)
            votes.update(members[:limit])
    return votes


def reservoir(members: list[int], limit: int, table: int, bucket: int) -> list[int]:
    out = np.zeros(limit, dtype=np.int32)
    key = np.uint64(reading.bucket_key(np.uint64(1), table, bucket))
    reading.draw_reservoir(np.array(members, dtype=np.int32), limit, key, out)
    return out.tolist()


@pytest.mark.parametrize(("size", "limit"), [(2, 1), (10, 9), (50, 7), (64, 16), (41, 20)])
def test_a_reservoir_favours_no_class(size: int, limit: int) -> None:
    draws, row, out = 20_000, np.arange(size, dtype=np.int32), np.zeros(limit, dtype=np.int32)
    counts = np.zeros(size, dtype=np.int64)
    for key in range(draws):
        unwrapped = reading.draw_reservoir(row, limit, np.uint64(1000 * key), out)
        assert len(set(out.tolist())) == limit
        assert (np.diff(out[:unwrapped]) > 0).all()
        assert (np.diff(out[unwrapped:]) > 0).all()
        counts[out] += 1
    share = limit / size
    assert np.abs(counts - draws * share).max() < 5 * np.sqrt(draws * share * (1 - share))


def test_a_reservoir_is_the_same_for_every_query_and_another_for_every_bucket_and_seed() -> None:
    codes_LC, everything = np.zeros((2, 400), dtype=np.uint16), np.zeros((1, 2, 1), dtype=np.int32)
    codes_LC[:, 200:] = 1
    tables = filled(codes_LC, 1, max_bucket=20, overflow="reservoir")
    one = np.sort(ask(tables, everything, 400, step=0))
    assert np.array_equal(one, np.sort(ask(tables, everything, 400, step=7)))
    assert len(np.unique(one[one >= 0])) > 20  # the two tables' samples differ
    assert {*(ask(tables, everything + 1, 400)[0] - 200)} != {*one[0]}
    other = ask(filled(codes_LC, 1, max_bucket=20, overflow="reservoir", seed=2), everything, 400)
    assert not np.array_equal(one, np.sort(other))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(**SHAPES, k=st.integers(1, 250), overflow=st.sampled_from(OVERFLOWS), limit=st.integers(1, 300))
def test_first_come_takes_whole_buckets_until_there_are_enough(
    seed, num_tables, num_classes, bits, k, overflow, limit
) -> None:
    codes_LC = random_codes(seed, num_tables, num_classes, bits)
    queries = random_codes(seed + 1, 4, num_tables, bits)[:, :, None]
    tables = filled(codes_LC, bits, first_come=True, overflow=overflow, max_bucket=limit)
    answers, pooled = ask(tables, queries, k), ask_pool(tables, queries, k).tolist()
    reachable = set()
    for ids, query_LV in zip(answers, queries, strict=True):
        everything = set(votes_of(codes_LC, query_LV))
        reachable |= everything
        found = ids[ids >= 0].tolist()
        assert len(set(found)) == len(found)
        assert set(found) <= everything
        assert (ids[len(found) :] == -1).all()
        if limit >= num_classes:
            assert len(found) == min(k, len(everything))
        if overflow != "window":
            readable = read_votes(codes_LC, query_LV, limit, overflow)
            assert len(found) == min(k, len(readable))
            assert set(found) <= set(readable)
    assert pooled == sorted(set(pooled))
    assert set(pooled) <= reachable
    assert len(pooled) == min(k, len(reachable)) or limit < num_classes


def test_first_come_reads_one_table_where_that_is_enough() -> None:
    codes_LC = np.repeat(np.arange(8, dtype=np.uint16)[None], 60, axis=1).reshape(1, -1).repeat(6, axis=0)
    for t in range(6):
        codes_LC[t] = np.roll(codes_LC[t], 11 * t)
    query_LV = np.full((6, 1), 3)
    buckets = [set(np.flatnonzero(row == 3).tolist()) for row in codes_LC]
    tables = filled(codes_LC, 3, first_come=True)
    tables_used = set()
    for step in range(60):
        found = set(ask(tables, query_LV[None], 60, step=step)[0].tolist())
        assert found in buckets
        tables_used.add(buckets.index(found))
    assert tables_used == set(range(6))


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("call", ["query", "pool"])
def test_first_come_favours_no_class_of_a_bucket(call: str, overflow: str) -> None:
    tables = filled(np.zeros((3, 50), dtype=np.uint16), 1, first_come=True, overflow=overflow)
    answers = answers_over_steps(call, tables, 2_000, 10)
    counts = np.bincount(np.concatenate(answers), minlength=50)
    assert np.abs(counts - 400).max() < 5 * np.sqrt(400 * 0.8)


def test_any_prefix_of_a_query_is_a_fair_draw_from_its_ties() -> None:
    tables = filled(np.zeros((2, 50), dtype=np.uint16), 1)
    heads = [answer[0] for answer in answers_over_steps("query", tables, 2_500, 50)]
    counts = np.bincount(heads, minlength=50)
    assert np.abs(counts - 50).max() < 5 * np.sqrt(50 * 0.98)


def test_step_and_seed_only_reorder_ties() -> None:
    codes_LC, queries = random_codes(5, 8, 400, 3), random_codes(6, 3, 8, 3)[:, :, None]
    first = ask(filled(codes_LC, 3), queries, 60)
    others = (ask(filled(codes_LC, 3), queries, 60, step=1), ask(filled(codes_LC, 3, seed=2), queries, 60))
    for second in others:
        assert not np.array_equal(first, second)
        for a, b, query_LV in zip(first, second, queries, strict=True):
            votes = votes_of(codes_LC, query_LV)
            assert [votes[c] for c in a] == [votes[c] for c in b]


def test_more_than_255_votes_are_counted() -> None:
    codes_LC = np.zeros((300, 20), dtype=np.uint16)
    codes_LC[:44, 7] = 1
    codes_LC[:10, 9] = 1
    found = ask(filled(codes_LC, 1), np.zeros((1, 300, 1), dtype=np.int32), 20)[0]
    assert found[-2:].tolist() == [9, 7]
