"""Bucket tables and voting against plain-Python references, and proof that the comparison has teeth."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidex.lsh import tables as module
from slidex.lsh.tables import BucketTables


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


def filled(codes_LC: np.ndarray, bits: int) -> BucketTables:
    tables = BucketTables(codes_LC.shape[1], len(codes_LC), bits)
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


def ask(tables: BucketTables, codes_NLV: np.ndarray, k: int, **changes: int) -> np.ndarray:
    arguments = {"seed": 1, "step": 0, "min_votes": 1, "max_bucket": 10**6} | changes
    return tables.query(codes_NLV.astype(np.int32), k, **arguments)


def ask_pool(tables: BucketTables, codes_NLV: np.ndarray, budget: int, **changes: int) -> np.ndarray:
    arguments = {"seed": 1, "step": 0, "min_votes": 1, "max_bucket": 10**6} | changes
    return tables.pool(codes_NLV.astype(np.int32), budget, **arguments)


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
    answers = ask(filled(codes_LC, bits), queries, k, min_votes=min_votes)
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
    found = ask_pool(filled(codes_LC, bits), queries, budget, min_votes=min_votes).tolist()
    votes = sum((votes_of(codes_LC, query_LV) for query_LV in queries), Counter())
    best = sorted((v for v in votes.values() if v >= min_votes), reverse=True)[:budget]
    assert sorted((votes[c] for c in found), reverse=True) == best
    assert found == sorted(set(found))


def answers_over_steps(
    call: str, tables: BucketTables, steps: int, k: int, **changes: int
) -> list[np.ndarray]:
    queries = np.zeros((1, len(tables.ids), 1), dtype=np.int32)
    if call == "pool":
        return [ask_pool(tables, queries, k, step=step, **changes) for step in range(steps)]
    rows = (ask(tables, queries, k, step=step, **changes)[0] for step in range(steps))
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
    tables = filled(np.zeros((1, 50), dtype=np.uint16), 1)
    answers = answers_over_steps(call, tables, 1_000, 50, max_bucket=10)
    for found in answers:
        assert len(found) == 10
        assert (np.diff(np.sort(found)) > 1).sum() <= 1  # contiguous, but for the wrap
    counts = np.bincount(np.concatenate(answers), minlength=50)
    assert np.abs(counts - 200).max() < 5 * np.sqrt(200 * 0.8)


def test_any_prefix_of_a_query_is_a_fair_draw_from_its_ties() -> None:
    tables = filled(np.zeros((2, 50), dtype=np.uint16), 1)
    heads = [answer[0] for answer in answers_over_steps("query", tables, 2_500, 50)]
    counts = np.bincount(heads, minlength=50)
    assert np.abs(counts - 50).max() < 5 * np.sqrt(50 * 0.98)


def test_step_and_seed_only_reorder_ties() -> None:
    codes_LC = random_codes(5, 8, 400, 3)
    tables, queries = filled(codes_LC, 3), random_codes(6, 3, 8, 3)[:, :, None]
    first = ask(tables, queries, 60)
    for changes in ({"step": 1}, {"seed": 2}):
        second = ask(tables, queries, 60, **changes)
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
