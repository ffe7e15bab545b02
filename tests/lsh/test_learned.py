from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from slidex.errors import ConfigError, DivergedError
from slidex.lsh import exact_topk, make_index, recall_at_k
from slidex.lsh.index import QuerySample
from slidex.lsh.learned import LearnedSimHash, _bucket_share_loss, _pool, _true_pairs
from slidex.lsh.simhash import SimHash

WIDTH, CLASSES, ROWS = 16, 2_000, 600
SETTINGS = {"bits": 5, "tables": 12, "steps": 3}


def sample(hidden_ND: torch.Tensor, label_ids: torch.Tensor) -> QuerySample:
    return QuerySample(hidden_ND, torch.arange(len(hidden_ND) + 1), label_ids)


@pytest.fixture(scope="module")
def clustered() -> tuple[torch.Tensor, torch.Tensor, QuerySample, torch.Tensor]:
    """Rows about 50 centres; hidden vectors near their class's row on top of a large common mean."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    weight_CD = draw(50, WIDTH)[torch.arange(CLASSES) % 50] + 0.7 * draw(CLASSES, WIDTH)
    labels = torch.randint(CLASSES, (2 * ROWS,), generator=generator)
    hidden_ND = 3.0 + weight_CD[labels] + 0.3 * draw(2 * ROWS, WIDTH)
    # Popularity, such that the mean of the hidden vectors does not decide which class wins.
    bias_C = -3.0 * weight_CD.sum(dim=1) - 0.5 * weight_CD.square().sum(dim=1)
    return weight_CD, bias_C, sample(hidden_ND[:ROWS], labels[:ROWS]), hidden_ND[ROWS:]


def made(**settings) -> LearnedSimHash:
    return LearnedSimHash(WIDTH, seed=3, **(SETTINGS | settings))


def fitted(clustered, rounds: int = 1, **settings) -> LearnedSimHash:
    weight_CD, bias_C, queries, _ = clustered
    family = made(**settings)
    for _ in range(rounds):
        family.fit(weight_CD, bias_C, queries)
    return family


def recall(clustered, queries: QuerySample | None, *, steps: int, rounds: int = 1) -> float:
    weight_CD, bias_C, _, hidden_ND = clustered
    index = make_index("learned", WIDTH, CLASSES, seed=3, **(SETTINGS | {"steps": steps}))
    for _ in range(rounds):
        index.build(weight_CD, bias_C, queries=queries)
    best_NK = exact_topk(hidden_ND, weight_CD, bias_C, 10)[1]
    return recall_at_k(index.query(hidden_ND, 100), best_NK)


def test_learning_raises_recall_at_the_same_budget(clustered) -> None:
    plain, learned = recall(clustered, None, steps=30), recall(clustered, clustered[2], steps=30)
    assert learned > 0.6
    assert learned > plain + 0.4


def test_rounds_go_on_from_each_other_on_fresh_draws(clustered) -> None:
    queries = clustered[2]
    one, two = recall(clustered, queries, steps=5), recall(clustered, queries, steps=5, rounds=2)
    assert two > one + 0.1
    first, second = (fitted(clustered, rounds).parameters()["row_mean"] for rounds in (1, 2))
    assert not torch.equal(first, second)


def test_without_queries_it_is_plain_simhash(clustered) -> None:
    weight_CD, bias_C, _, hidden_ND = clustered
    family, plain = made(), SimHash(WIDTH, bits=5, tables=12, seed=3)
    family.fit(weight_CD, bias_C, None)
    family.fit(weight_CD, bias_C, sample(torch.empty(0, WIDTH), torch.empty(0, dtype=torch.int64)))
    assert np.array_equal(family.hash_rows(weight_CD, bias_C), plain.hash_rows(weight_CD, bias_C))
    assert np.array_equal(family.hash_queries(hidden_ND), plain.hash_queries(hidden_ND))
    assert family.query_version == 0


def test_learning_starts_at_the_plain_geometry(clustered, monkeypatch) -> None:
    weight_CD, bias_C, _, hidden_ND = clustered
    monkeypatch.setattr("slidex.lsh.learned._STEP_SIZE", 0.0)
    family, plain = fitted(clustered, steps=1), SimHash(WIDTH, bits=5, tables=12, seed=3)
    # Rounding differs, which turns a few bits of the vectors near a hyperplane.
    assert np.mean(family.hash_rows(weight_CD, bias_C) != plain.hash_rows(weight_CD, bias_C)) < 0.1
    assert np.mean(family.hash_queries(hidden_ND) != plain.hash_queries(hidden_ND)) < 0.1


def test_a_build_without_queries_keeps_what_was_learned(clustered) -> None:
    weight_CD, bias_C, _, _ = clustered
    family = fitted(clustered)
    before = {name: value.clone() for name, value in family.parameters().items()}
    family.fit(weight_CD + 1, bias_C, None)
    assert family.query_version == 1
    assert all(torch.equal(before[name], value) for name, value in family.parameters().items())


def test_learning_runs_on_one_thread_and_under_inference_mode(clustered, monkeypatch) -> None:
    first = fitted(clustered, rounds=2).parameters()
    threads_seen = set()

    def spy(*arguments):
        threads_seen.add(torch.get_num_threads())
        return _pool(*arguments)

    monkeypatch.setattr("slidex.lsh.learned._pool", spy)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with torch.inference_mode():
            second = fitted(clustered, rounds=2).parameters()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert threads_seen == {1}
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert int(first["rounds"]) == 2


def test_parameters_restore_codes_and_the_next_round(clustered) -> None:
    weight_CD, bias_C, queries, hidden_ND = clustered
    family, other = fitted(clustered), made()
    saved = {name: value.clone() for name, value in family.parameters().items()}
    other.load_parameters(saved)
    for _ in range(2):
        assert other.query_version == family.query_version
        assert np.array_equal(other.hash_rows(weight_CD, bias_C), family.hash_rows(weight_CD, bias_C))
        assert np.array_equal(other.hash_queries(hidden_ND), family.hash_queries(hidden_ND))
        family.fit(weight_CD, bias_C, queries)
        other.fit(weight_CD, bias_C, queries)
    other.load_parameters(made().parameters())
    plain = SimHash(WIDTH, bits=5, tables=12, seed=3)
    assert np.array_equal(other.hash_queries(hidden_ND), plain.hash_queries(hidden_ND))


def test_codes_of_one_vector_are_those_it_has_in_a_batch(clustered, monkeypatch) -> None:
    weight_CD, bias_C, _, hidden_ND = clustered
    family = fitted(clustered, probes=2)
    rows_LC, queries_NLV = family.hash_rows(weight_CD, bias_C), family.hash_queries(hidden_ND)
    for c in (0, 7, CLASSES - 1):
        assert np.array_equal(family.hash_rows(weight_CD, bias_C, torch.tensor([c]))[:, 0], rows_LC[:, c])
    assert np.array_equal(family.hash_queries(hidden_ND[5:6])[0], queries_NLV[5])
    monkeypatch.setattr("slidex.lsh.simhash._CHUNK_PROJECTIONS", 60 * 70)
    family._row_dtype = torch.float32
    assert np.array_equal(family.hash_rows(weight_CD, bias_C), rows_LC)
    family._row_dtype = torch.bfloat16
    assert np.array_equal(family.hash_rows(weight_CD, bias_C), rows_LC)
    assert np.array_equal(family.hash_queries(hidden_ND), queries_NLV)


def test_update_equals_rebuild_and_state_restores_after_learning(clustered) -> None:
    weight_CD, bias_C, queries, hidden_ND = clustered
    index = make_index("learned", WIDTH, CLASSES, seed=3, **SETTINGS)
    assert index.uses_queries
    index.build(weight_CD, bias_C, queries=queries)
    moved = weight_CD.clone()
    moved[[3, 900]] *= -1
    index.update(moved, bias_C, torch.tensor([3, 900]))
    other = make_index("learned", WIDTH, CLASSES, seed=3, **SETTINGS)
    other.load_state({name: value.clone() for name, value in index.state().items()}, moved, bias_C)
    other.build(moved, bias_C)
    assert torch.equal(index.query(hidden_ND, 50), other.query(hidden_ND, 50))
    assert index.drift(moved, bias_C, torch.arange(CLASSES)) == 0.0


@pytest.mark.parametrize("num_classes", [1, 3])
def test_few_classes_no_bias_no_labels_and_constant_hidden_vectors(num_classes: int) -> None:
    weight = torch.ones(num_classes, WIDTH) * torch.arange(1, num_classes + 1)[:, None]
    index = make_index("learned", WIDTH, num_classes, seed=0, tables=20, steps=3)
    queries = QuerySample(
        torch.ones(4, WIDTH), torch.zeros(5, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    )
    index.build(weight, None, queries=queries)
    assert index.query(torch.ones(1, WIDTH), 5).shape == (1, 5)
    assert all(
        bool(torch.isfinite(value).all())
        for name, value in index.state().items()
        if name in made().parameters()
    )


def test_loss_is_minus_log_of_the_targets_share_of_the_bucket() -> None:
    query, rows = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 2.0], [0.0, 3.0], [-1.0, 1.0]])
    p = (1 - torch.tensor([0.25, 0.5, 0.75])) ** 3
    count = torch.tensor([1.0, 1.0, 10.0])
    target = torch.tensor([[0.75, 0.25, 0.0]])
    load = float((p * count).sum()) + 0.5
    expected = -(0.75 * math.log(p[0] / load) + 0.25 * math.log(p[1] / load))
    loss = _bucket_share_loss(query, rows, target, count.log(), 3, math.log(0.5))
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_pool_counts_every_class_once_on_the_whole() -> None:
    generator = np.random.Generator(np.random.Philox(0))
    labels = torch.tensor([9, 4, 9, 70_000])
    ids_U, place_P, weight_U = _pool(labels, 100_000, generator)
    assert torch.equal(ids_U[place_P], labels)
    assert len(ids_U.unique()) == len(ids_U)
    assert torch.equal(weight_U[:3], torch.zeros(3))
    assert float(weight_U.double().exp().sum()) == pytest.approx(100_000, rel=1e-4)


def test_true_pairs_are_the_rows_labels_or_a_random_part_of_them(monkeypatch) -> None:
    queries = QuerySample(torch.zeros(3, 2), torch.tensor([0, 2, 2, 5]), torch.tensor([7, 8, 1, 2, 3]))
    generator = np.random.Generator(np.random.Philox(0))
    row_P, label_P = _true_pairs(queries, torch.tensor([2, 1, 0, 2]), generator)
    assert row_P.tolist() == [0, 0, 0, 2, 2, 3, 3, 3]
    assert label_P.tolist() == [1, 2, 3, 7, 8, 1, 2, 3]
    monkeypatch.setattr("slidex.lsh.learned._POOL", 4)
    row_P, label_P = _true_pairs(queries, torch.tensor([2, 1, 0, 2]), generator)
    pairs = set(zip(row_P.tolist(), label_P.tolist(), strict=True))
    assert len(pairs) == 4
    assert pairs <= {(0, 1), (0, 2), (0, 3), (2, 7), (2, 8), (3, 1), (3, 2), (3, 3)}


def test_values_that_are_not_finite_are_named(clustered) -> None:
    weight_CD, bias_C, queries, _ = clustered
    family = fitted(clustered)
    before = family.parameters()
    hidden_ND = queries.hidden_ND.clone()
    hidden_ND[11, 2] = math.inf
    with pytest.raises(DivergedError, match="Row 11 of the hidden vectors"):
        family.fit(weight_CD, bias_C, QuerySample(hidden_ND, queries.label_indptr, queries.label_ids))
    with pytest.raises(DivergedError, match=r"of class \d+ holds"):
        family.fit(weight_CD, torch.full_like(bias_C, math.nan), queries)
    with pytest.raises(DivergedError, match="scores of classes are not finite"):
        family.fit(3e37 * weight_CD.clamp(-1, 1), None, queries)
    assert all(value is before[name] for name, value in family.parameters().items())


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"steps": 0}, ["'steps'", "learned", "at least 1", "0"]),
        ({"center": True}, ["'center'", "unknown to the 'learned' index"]),
    ],
)
def test_bad_settings_name_the_setting_its_limits_and_the_value(settings, parts) -> None:
    with pytest.raises(ConfigError) as caught:
        make_index("learned", WIDTH, CLASSES, seed=0, **settings)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_learning_does_not_depend_on_the_scale_of_weights_beyond_its_softmax(clustered) -> None:
    weight_CD, bias_C, queries, _ = clustered
    huge = 1e25 * weight_CD
    family = made()
    family.fit(huge, 1e25 * bias_C, queries)
    codes_LC = family.hash_rows(huge, 1e25 * bias_C)
    assert np.mean(codes_LC != fitted(clustered).hash_rows(weight_CD, bias_C)) < 0.2
