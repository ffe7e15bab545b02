"""Label insertion against a plain-Python reference, and what `HashIndex` makes of it, of its settings and families."""

from __future__ import annotations

from collections import Counter

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slidex.errors import ConfigError
from slidex.lsh import SimHash, hash_index, index, index_settings, make_index, register_hash_family
from slidex.lsh.index import QuerySample
from slidex.lsh.insertion import InsertedLabels
from slidex.lsh.tables import BucketTables, TableSettings

WIDTH = 8


def contents(labels: InsertedLabels) -> dict[tuple[int, int], dict[int, int]]:
    found = {}
    for t, offsets in enumerate(labels.offsets):
        for b in range(len(offsets) - 1):
            part = slice(labels.starts[t] + offsets[b], labels.starts[t] + offsets[b + 1])
            ids = labels.ids[part].tolist()
            assert ids == sorted(set(ids))
            if ids:
                found[t, b] = dict(zip(ids, labels.counts[part].tolist(), strict=True))
    return found


def landing(seed: int, rows: int, tables: int, bits: int, classes: int) -> tuple[np.ndarray, ...]:
    generator = np.random.default_rng(seed)
    sizes = generator.integers(0, 4, rows)
    codes_NL = generator.integers(0, 1 << bits, (rows, tables))
    labels = (generator.random(sizes.sum()) ** 3 * classes).astype(np.int64)  # low ids are frequent
    return codes_NL, np.concatenate([[0], np.cumsum(sizes)]), labels


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(0, 60),
    tables=st.integers(1, 4),
    bits=st.integers(1, 4),
    classes=st.integers(1, 30),
    most=st.integers(1, 6),
)
def test_the_most_counted_classes_are_kept_and_counts_go_on(seed, rows, tables, bits, classes, most) -> None:
    labels = InsertedLabels(tables, bits, most, seed)
    kept: dict[tuple[int, int], dict[int, int]] = {}
    for call in range(3):
        codes_NL, indptr, ids = landing(seed + call, rows, tables, bits, classes)
        labels.add(codes_NL, indptr, ids)
        counts = {place: Counter(old) for place, old in kept.items()}
        for row, codes in enumerate(codes_NL.tolist()):
            for t, b in enumerate(codes):
                counts.setdefault((t, b), Counter()).update(ids[indptr[row] : indptr[row + 1]].tolist())
        counts = {place: counter for place, counter in counts.items() if counter}
        kept = contents(labels)
        assert kept.keys() == counts.keys()
        for place, counter in counts.items():
            assert all(counter[c] == count for c, count in kept[place].items())
            best = sorted(counter.values(), reverse=True)[:most]
            assert sorted(kept[place].values(), reverse=True) == best
    assert labels.bytes <= 4 * tables * ((1 << bits) + 1) + 8 * most * tables * (1 << bits)


def test_ties_for_the_last_place_favour_no_class() -> None:
    counts = np.zeros(10, dtype=np.int64)
    for seed in range(1_000):
        labels = InsertedLabels(1, 1, 3, seed)
        labels.add(np.zeros((10, 1), dtype=np.int64), np.arange(11), np.arange(10))
        counts[labels.ids] += 1
    assert np.abs(counts - 300).max() < 5 * np.sqrt(300 * 0.7)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6), classes=st.integers(1, 60), min_votes=st.integers(1, 3), k=st.integers(1, 70)
)
def test_an_inserted_class_has_a_vote_of_its_bucket(seed, classes, min_votes, k) -> None:
    tables_count, bits = 4, 2
    codes_LC = np.random.default_rng(seed).integers(0, 4, (tables_count, classes)).astype(np.uint16)
    tables = BucketTables(classes, tables_count, bits, TableSettings(insert=5, min_votes=min_votes))
    tables.build(codes_LC)
    tables.inserted.add(*landing(seed, 30, tables_count, bits, classes))
    queries = np.random.default_rng(seed + 1).integers(0, 4, (3, tables_count, 1)).astype(np.int32)
    inserted, total = contents(tables.inserted), Counter()
    answers = tables.query(queries, k, step=0)
    for row, query_L in zip(answers, queries[:, :, 0].tolist(), strict=True):
        votes = Counter()
        for t, b in enumerate(query_L):
            votes.update(np.flatnonzero(codes_LC[t] == b).tolist())
            votes.update(list(inserted.get((t, b), {})))
        total += votes
        found = row[row >= 0].tolist()
        best = sorted((v for v in votes.values() if v >= min_votes), reverse=True)[:k]
        assert [votes[c] for c in found] == best
        assert len(set(found)) == len(found)
    pooled = tables.pool(queries, k, step=0).tolist()
    best = sorted((v for v in total.values() if v >= min_votes), reverse=True)[:k]
    assert sorted((total[c] for c in pooled), reverse=True) == best
    assert pooled == sorted(set(pooled))


def test_most_tables_and_two_votes_each_are_counted() -> None:
    tables = BucketTables(20, 130, 1, TableSettings(insert=1))
    tables.build(np.zeros((130, 20), dtype=np.uint16))
    tables.inserted.add(np.zeros((1, 130), dtype=np.int64), np.array([0, 1]), np.array([7]))
    assert tables.query(np.zeros((1, 130, 1), dtype=np.int32), 20, step=0)[0, 0] == 7


def test_first_come_takes_inserted_classes_first() -> None:
    tables = BucketTables(90, 3, 1, TableSettings(insert=2, first_come=True))
    tables.build(np.zeros((3, 90), dtype=np.uint16))
    tables.inserted.add(np.zeros((2, 3), dtype=np.int64), np.array([0, 1, 2]), np.array([70, 20]))
    query = np.zeros((1, 3, 1), dtype=np.int32)
    assert set(tables.query(query, 5, step=3)[0, :2]) == {20, 70}
    assert {20, 70} <= set(tables.pool(query, 5, step=3))
    assert {tables.query(query, 1, step=s)[0, 0] for s in range(40)} == {20, 70}


def clustered(num_classes: int = 600, rows: int = 400) -> tuple[torch.Tensor, QuerySample]:
    """Weights that say nothing of where the classes' samples lie."""
    generator = torch.Generator().manual_seed(0)
    weight_CD = torch.randn(num_classes, WIDTH, generator=generator)
    labels = torch.randint(0, num_classes, (rows,), generator=generator) // 3 * 3
    centres = torch.randn(num_classes, WIDTH, generator=generator)
    hidden_ND = centres[labels] + 0.1 * torch.randn(rows, WIDTH, generator=generator)
    return weight_CD, QuerySample(hidden_ND, torch.arange(rows + 1), labels)


def with_insertion(weight_CD: torch.Tensor, queries: QuerySample | None, **settings: object):
    made = make_index("simhash", WIDTH, len(weight_CD), seed=3, bits=5, tables=12, insert=4, **settings)
    made.build(weight_CD, queries=queries)
    return made


def test_true_classes_are_found_where_their_samples_lie() -> None:
    weight_CD, queries = clustered()
    share = []
    for sample in (None, queries):
        found = with_insertion(weight_CD, sample).query(queries.hidden_ND + 0.05, 10)
        share.append(float((found == queries.label_ids[:, None]).any(dim=1).float().mean()))
    assert share[0] < 0.2
    assert share[1] > 0.7


def test_builds_without_queries_keep_what_was_inserted_and_builds_with_them_add() -> None:
    weight_CD, queries = clustered()
    made = with_insertion(weight_CD, queries)
    once = made.state()["inserted_counts"].clone()
    moved = weight_CD.flip(0)
    made.build(moved)
    assert torch.equal(made.state()["inserted_counts"], once)
    made.build(moved, queries=queries)
    assert int(made.state()["inserted_counts"].sum()) > 1.9 * int(once.sum())


def test_what_was_inserted_is_forgotten_when_the_query_functions_change() -> None:
    weight_CD, queries = clustered()
    made = with_insertion(weight_CD, queries)

    def fit(*_: object) -> None:
        made.family.query_version += 1

    made.family.fit = fit
    made.build(weight_CD)
    assert len(made.state()["inserted_ids"]) == 0
    made.build(weight_CD, queries=queries)
    assert len(made.state()["inserted_ids"]) > 0


def test_updates_keep_what_was_inserted_and_equal_a_rebuild() -> None:
    weight_CD, queries = clustered()
    made = with_insertion(weight_CD, queries)
    weight_CD[7], changed = -weight_CD[7], torch.tensor([7])
    made.update(weight_CD, None, changed)
    rebuilt = with_insertion(weight_CD, queries)
    assert torch.equal(made.query(queries.hidden_ND, 30), rebuilt.query(queries.hidden_ND, 30))
    assert torch.equal(made.pool(queries.hidden_ND, 99), rebuilt.pool(queries.hidden_ND, 99))
    assert made.drift(weight_CD, None, torch.arange(600)) == 0.0


def test_state_brings_back_what_was_inserted() -> None:
    weight_CD, queries = clustered()
    made = with_insertion(weight_CD, queries)
    saved = {name: value.clone() for name, value in made.state().items()}
    other = make_index("simhash", WIDTH, 600, seed=3, bits=5, tables=12, insert=4)
    other.load_state(saved, weight_CD)
    assert torch.equal(made.query(queries.hidden_ND, 30), other.query(queries.hidden_ND, 30))
    for again in (made, other):
        again.build(weight_CD, queries=queries)
    for name, value in made.state().items():
        assert torch.equal(value, other.state()[name]), name


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("inserted_ids", lambda v: v[:-1]),
        ("inserted_ids", lambda v: v + 600),
        ("inserted_ids", lambda v: -v),
        ("inserted_counts", lambda v: v - v),
        ("inserted_offsets", lambda v: v.flip(1)),
        ("inserted_offsets", lambda v: v[:, :-1]),
        ("inserted_offsets", lambda v: v.long()),
        ("inserted_counts", lambda v: v[None]),
    ],
)
def test_a_state_that_does_not_hold_together_is_refused(name, change) -> None:
    weight_CD, queries = clustered()
    made = with_insertion(weight_CD, queries)
    state = {key: value.clone() for key, value in made.state().items()}
    state[name] = change(state[name])
    before = made.query(queries.hidden_ND, 30)
    with pytest.raises(ConfigError, match="inserted"):
        made.load_state(state, weight_CD)
    assert torch.equal(made.query(queries.hidden_ND, 30), before)


def test_off_means_no_queries_no_state_and_no_memory() -> None:
    off = make_index("simhash", WIDTH, 600, seed=3, bits=5, tables=12)
    on = make_index("simhash", WIDTH, 600, seed=3, bits=5, tables=12, insert=4)
    assert (off.uses_queries, on.uses_queries) == (False, True)
    weight_CD, queries = clustered()
    off.build(weight_CD, queries=queries)
    assert off.tables.inserted.bytes == 0
    assert not any(name.startswith("inserted") for name in off.state())
    on.build(weight_CD)
    assert torch.equal(off.query(queries.hidden_ND, 30), on.query(queries.hidden_ND, 30))


def test_a_single_class_can_be_inserted() -> None:
    made = with_insertion(
        torch.ones(1, WIDTH), QuerySample(-torch.ones(1, WIDTH), torch.tensor([0, 1]), torch.tensor([0]))
    )
    assert made.query(-torch.ones(1, WIDTH), 2).tolist() == [[0, -1]]
    assert made.pool(-torch.ones(1, WIDTH), 2).tolist() == [0]


@pytest.mark.parametrize(
    "settings",
    [
        {"insert": 4, "max_bucket": 5, "overflow": "reservoir"},
        {"insert": 4, "budget": "first_come"},
        {"max_bucket": 5, "overflow": "first", "budget": "first_come", "probes": 2},
    ],
)
def test_answers_do_not_depend_on_threads_or_batch(settings) -> None:
    weight_CD, queries = clustered()
    hidden_ND, answers, threads = queries.hidden_ND[:31], [], numba.get_num_threads()
    try:
        for count in {1, threads}:
            numba.set_num_threads(count)
            made = make_index("simhash", WIDTH, 600, seed=3, bits=5, tables=12, **settings)
            made.build(weight_CD, queries=queries)
            answers.append((made.query(hidden_ND, 40, step=2), made.pool(hidden_ND, 90, step=2)))
    finally:
        numba.set_num_threads(threads)
    rows = torch.cat([made.query(row[None], 40, step=2) for row in hidden_ND])
    assert all(torch.equal(rows, query) and torch.equal(answers[0][1], pool) for query, pool in answers)


def test_every_setting_of_the_tables_changes_the_answer() -> None:
    weight_CD, queries = clustered()
    base = {"bits": 3, "tables": 12, "max_bucket": 20}
    changes = (
        {},
        {"overflow": "reservoir"},
        {"overflow": "first"},
        {"budget": "first_come"},
        {"insert": 2},
        {"insert": 3},
    )
    answers = []
    for change in changes:
        made = make_index("simhash", WIDTH, 600, seed=0, **base, **change)
        made.build(weight_CD, queries=queries)
        answers.append((made.query(queries.hidden_ND[:9], 50), made.pool(queries.hidden_ND[:9], 50)))
    for i, (query, pool) in enumerate(answers):
        for other_query, other_pool in answers[:i]:
            assert not torch.equal(query, other_query), changes[i]
            assert not torch.equal(pool, other_pool), changes[i]


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"overflow": "last"}, ["'overflow'", "window, reservoir, first", "'last'"]),
        ({"budget": 3}, ["'budget'", "votes, first_come", "3"]),
        ({"budget": "first_come", "min_votes": 2}, ["'min_votes'", "first_come", "2"]),
        ({"insert": -1}, ["'insert'", "0 to 65536", "-1"]),
        ({"insert": 1, "tables": 40_000, "bits": 1}, ["'tables'", "32767", "40000"]),
    ],
)
def test_bad_settings_name_the_setting_its_limits_and_the_value(settings, parts) -> None:
    with pytest.raises(ConfigError) as caught:
        make_index("simhash", WIDTH, 1000, **settings)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(index, "_FACTORIES", dict(index._FACTORIES))
    monkeypatch.setattr(index, "_SETTINGS", dict(index._SETTINGS))


@pytest.mark.usefixtures("registry")
def test_a_family_brings_its_settings_and_its_automatic_bits() -> None:
    @register_hash_family("turned")
    class Turned(SimHash):
        @classmethod
        def automatic_bits(cls, num_classes: int) -> int:
            return 3 if num_classes > 10 else 1

        def __init__(self, in_features, *, bits, tables, seed, probes=1, turn=0.5) -> None:
            super().__init__(in_features, bits=bits, tables=tables, seed=seed, probes=probes)
            self.turn = turn

    known = index_settings("turned")
    assert {"bits": None, "tables": 50, "probes": 1, "turn": 0.5, "insert": 0}.items() <= known.items()
    assert "center" not in known
    made = make_index("turned", WIDTH, 100, turn=0.25, min_votes=2)
    assert isinstance(made, hash_index.HashIndex)
    assert (made.family.bits, made.family.turn, made.family.probes) == (3, 0.25, 1)
    assert make_index("turned", WIDTH, 100, bits=5, tables=7).tables.offsets.shape == (7, 33)


@pytest.mark.usefixtures("registry")
def test_a_family_must_not_take_a_setting_of_the_tables() -> None:
    with pytest.raises(ValueError, match="insert"):

        @register_hash_family("clash")
        class _Clash(SimHash):
            def __init__(self, in_features, *, bits, tables, seed, insert=1) -> None: ...
