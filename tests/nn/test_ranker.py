"""Which rows a class is fitted on, and how a linear score changes the order of the network's classes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from slidex.data import CsrArrays
from slidex.errors import ConfigError
from slidex.kernels import LinearWeights, reference
from slidex.lsh import make_index
from slidex.nn.classifier import PREDICT_ROWS, Classifier
from slidex.nn.ranker import (
    LinearRanker,
    NeighborSearch,
    class_pairs,
    known_classes,
    neighbor_search,
    row_tensors,
)
from slidex.train.config import TrainConfig

F, C = 30, 40


def random_rows(rows: int, seed: int) -> CsrArrays:
    rng = np.random.default_rng(seed)
    dense = rng.random((rows, F)) * (rng.random((rows, F)) < 0.2)
    indptr = np.concatenate([[0], np.cumsum((dense != 0).sum(1))])
    row, ids = dense.nonzero()
    return CsrArrays(indptr, ids.astype(np.int32), dense[row, ids].astype(np.float32), F)


def ranker(candidates: int, factor: float = 3.0) -> LinearRanker:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(C, F, generator=generator) * (torch.rand(C, F, generator=generator) < 0.4)
    indptr = torch.nn.functional.pad((dense != 0).sum(1).cumsum(0), (1, 0))
    bias = torch.randn(C, generator=generator)
    weights = LinearWeights(indptr, dense.nonzero()[:, 1].int(), dense[dense != 0], bias, F)
    return LinearRanker(weights, candidates, factor)


def model() -> Classifier:
    config = TrainConfig(
        hidden_width=8,
        mode="shared",
        pool_size=20,
        correction="none",
        precision="float32",
        index_options={"bits": 2, "tables": 20},
    )
    return Classifier.from_config(config, F, C, np.ones(C, dtype=np.int64))


def test_pairs_are_true_rows_and_candidates_that_are_not_true() -> None:
    labels = CsrArrays(np.array([0, 2, 2, 3]), np.array([1, 4, 0], dtype=np.int32), None, 5)
    candidates = np.array([[4, 2, -1], [1, 2, 0], [-1, -1, -1]], dtype=np.int32)
    pairs = class_pairs(labels, candidates)
    found = {
        c: [
            (int(pairs.rows[p]), bool(pairs.positive[p])) for p in range(pairs.indptr[c], pairs.indptr[c + 1])
        ]
        for c in range(5)
    }
    assert found == {
        0: [(1, False), (2, True)],
        1: [(0, True), (1, False)],
        2: [(0, False), (1, False)],
        3: [],
        4: [(0, True)],
    }


def test_scores_are_logits_and_linear_scores_of_unit_rows() -> None:
    network, x = model(), random_rows(50, 1)
    ranked = replace(network, ranker=ranker(C))
    ids_NA = torch.arange(C).repeat(50, 1)
    unit = row_tensors(x.unit_rows())
    norms = np.sqrt(np.asarray(x.to_scipy().power(2).sum(1)))[:, 0]
    np.testing.assert_allclose(unit[2], x.values / norms[x.row_ids()], rtol=1e-6)
    linear_NA = reference.linear_scores(ranked.ranker.weights, *unit, ids_NA)
    torch.testing.assert_close(ranked.scores(x, ids_NA), network.scores(x, ids_NA) + 3 * linear_NA)


def test_logits_far_below_the_best_one_count_alike() -> None:
    network, x = model(), random_rows(50, 1)
    floored = replace(network, ranker=replace(ranker(C), floor=0.05))
    ids_NA = torch.arange(C).repeat(50, 1)
    logits_NA = network.scores(x, ids_NA)
    linear_NA = reference.linear_scores(floored.ranker.weights, *row_tensors(x.unit_rows()), ids_NA)
    want_NA = torch.maximum(logits_NA, logits_NA.amax(1, keepdim=True) - 0.05) + 3 * linear_NA
    torch.testing.assert_close(floored.scores(x, ids_NA), want_NA)
    # The best logit is the row's, also where the best class is not asked for; topk gives what scores does.
    torch.testing.assert_close(floored.scores(x, ids_NA[:, :3]), want_NA[:, :3])
    scores_NK, best_NK = next(iter(floored.topk(x, 4)))
    torch.testing.assert_close(scores_NK, want_NA.topk(4).values)
    assert (scores_NK - want_NA.gather(1, best_NK)).abs().max() < 1e-5


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("totals", [False, True])
def test_a_network_proposes_only_classes_that_it_knows(indexed: bool, totals: bool) -> None:
    """Scored all or of an index, which finds all here; the partition function is of all classes."""
    network, x = model(), random_rows(50, 1)
    index = make_index("exact", network.head.in_features, C)
    index.build(network.head.weight, network.head.bias)
    network = replace(network, index=index, candidates=C)
    known_M = torch.arange(0, C, 3)
    some = replace(network, ranker=replace(ranker(4, factor=0.0), known_M=known_M))
    found = next(iter(some.ranked(x, 4, totals=totals, indexed=indexed)))
    logits_NM = network.scores(x, known_M.repeat(50, 1))
    assert torch.equal(found.ids_NK, known_M[logits_NM.topk(4).indices])
    torch.testing.assert_close(found.scores_NK, logits_NM.topk(4).values)
    if totals:
        every_N = network.scores(x, torch.arange(C).repeat(50, 1)).logsumexp(1)
        torch.testing.assert_close(found.log_total_N, every_N)
    more = next(iter(some.ranked(x, C, totals=totals, indexed=indexed)))  # than it knows
    assert set(more.ids_NK[0].tolist()) == set(range(C))


def test_which_classes_a_network_knows() -> None:
    counts_C = np.arange(3000)
    assert torch.equal(known_classes(counts_C, 10), torch.arange(10, 3000))
    assert known_classes(counts_C, 0) is None  # all
    assert known_classes(counts_C, 2990) is None  # too few


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("k", [3, 12])
def test_the_best_of_the_networks_candidates_are_ranked_by_both(k: int, indexed: bool) -> None:
    network, x = model(), random_rows(PREDICT_ROWS + 20, 2)
    network.index.build(network.head.weight, network.head.bias)
    ranked = replace(network, ranker=ranker(8))
    first = 0
    plain = list(network.ranked(x, max(8, k), indexed=indexed))
    for before, after in zip(plain, ranked.ranked(x, k, indexed=indexed), strict=True):
        rows = x.slice(first, first + len(before.ids_NK))
        scores_NA = ranked.scores(rows, before.ids_NK)
        want_NK = scores_NA.topk(k).indices
        assert torch.equal(after.ids_NK, before.ids_NK.gather(1, want_NK))
        torch.testing.assert_close(after.scores_NK, scores_NA.gather(1, want_NK))
        torch.testing.assert_close(after.logits_NK, before.logits_NK.gather(1, want_NK))
        assert (after.scores_NK.diff(dim=1) <= 0).all()
        first += len(before.ids_NK)
    assert any(
        (a != b[:, :k]).any() for (_, a), (_, b) in zip(ranked.topk(x, k), network.topk(x, k), strict=True)
    )


def search() -> NeighborSearch:
    rng = np.random.default_rng(5)
    labels = CsrArrays(
        np.arange(81) * 2,
        np.sort(rng.permuted(np.tile(np.arange(C), (80, 1)), axis=1)[:, :2], axis=1).ravel().astype(np.int32),
        None,
        C,
    )
    return neighbor_search(random_rows(80, 6), labels)


def rows_of(*rows: dict[int, float]) -> CsrArrays:
    indptr = np.cumsum([0, *map(len, rows)])
    indices = np.array([f for row in rows for f in row], dtype=np.int32)
    return CsrArrays(
        indptr, indices, np.array([v for row in rows for v in row.values()], dtype=np.float32), 3
    )


def own_classes(*classes: int) -> CsrArrays:
    return CsrArrays(np.arange(len(classes) + 1), np.array(classes, dtype=np.int32), None, max(classes) + 1)


def test_neighbours_vote_with_the_fourth_power_of_their_cosine() -> None:
    """Cosines with the first row are 1, 0.8 and 0.8: class 2 has the second and third, class 1 the first."""
    x = rows_of({0: 3}, {0: 4, 1: 3}, {0: 8, 2: 6})
    found, first = neighbor_search(x, own_classes(1, 2, 2)), x.slice(0, 1)
    assert found.classes(first, 3).tolist() == [[1, 2, -1]]  # 1 > 2 * 0.8^4, but not so for squares
    assert found.classes(first, 3, torch.tensor([0])).tolist() == [[2, -1, -1]]


def test_fifty_neighbours_vote() -> None:
    found = neighbor_search(rows_of(*[{0: 1.0}] * 60), own_classes(*range(60)))
    ids_NB = found.classes(rows_of({0: 1.0}), 60)
    assert ids_NB.tolist() == [[*range(50), *[-1] * 10]]  # of equal rows the first


def test_a_row_is_read_up_to_four_fifths_of_its_squares() -> None:
    found = neighbor_search(rows_of({0: 1}, {1: 1}, {2: 1}), own_classes(0, 1, 2))
    assert found.classes(rows_of({0: 0.7, 1: 0.55, 2: 0.45}), 3).tolist() == [
        [0, 1, 2]
    ]  # squares 0.49, 0.30, 0.20
    assert found.classes(rows_of({0: 0.8, 1: 0.5, 2: 0.33}), 3).tolist() == [[0, 1, -1]]  # 0.64, 0.25, 0.11


def test_a_search_refuses_labels_of_other_rows() -> None:
    found, other = (neighbor_search(rows_of(*[{0: 1}] * n), own_classes(*range(n))) for n in (2, 3))
    with pytest.raises(ConfigError, match=r"'labels' .* of 2 rows\. Got 3"):
        replace(found, labels=other.labels)


@pytest.mark.parametrize("indexed", [False, True])
def test_classes_of_the_nearest_rows_are_ranked_beside_the_networks(indexed: bool) -> None:
    network, x = model(), random_rows(PREDICT_ROWS + 20, 2)
    network.index.build(network.head.weight, network.head.bias)
    both = replace(network, ranker=replace(ranker(8), search=search(), proposed=6))
    first, brought = 0, 0
    for before, after in zip(
        network.ranked(x, 8, indexed=indexed), both.ranked(x, 5, indexed=indexed), strict=True
    ):
        rows = x.slice(first, first + len(before.ids_NK))
        more_NB = both.ranker.beside(rows, before.ids_NK)
        assert not (more_NB[:, :, None] == before.ids_NK.masked_fill(before.ids_NK < 0, -2)[:, None]).any()
        ids_NA = torch.cat([before.ids_NK, more_NB], 1)
        scores_NK, best_NK = both.scores(rows, ids_NA).topk(5)
        assert torch.equal(after.ids_NK, ids_NA.gather(1, best_NK))
        torch.testing.assert_close(after.scores_NK, scores_NK)
        torch.testing.assert_close(after.logits_NK, network.scores(rows, after.ids_NK))
        brought += int((best_NK >= before.ids_NK.shape[1]).sum())
        first += len(before.ids_NK)
    assert brought > 100


def test_rows_asked_for_one_by_one_leave_the_gradient_mode_alone() -> None:
    network, x = model(), random_rows(PREDICT_ROWS + 20, 2)
    one, other = network.topk(x, 3), network.topk(x, 3)
    for _ in zip(one, other, strict=True):
        assert torch.is_grad_enabled()
    next(network.topk(x, 3))
    assert torch.is_grad_enabled()


def test_partition_function_and_logits_stay_the_networks() -> None:
    network, x = model(), random_rows(30, 3)
    ranked = replace(network, ranker=ranker(C))
    (before,), (after,) = network.ranked(x, C, totals=True), ranked.ranked(x, C, totals=True)
    torch.testing.assert_close(after.log_total_N, before.log_total_N)
    order = before.ids_NK.argsort(1), after.ids_NK.argsort(1)
    torch.testing.assert_close(after.logits_NK.gather(1, order[1]), before.logits_NK.gather(1, order[0]))


def test_rows_with_fewer_classes_than_asked_for_are_padded() -> None:
    network, x = model(), random_rows(5, 4)
    network.index.build(network.head.weight, network.head.bias)
    ranked = replace(network, ranker=ranker(4), candidates=4)
    (best,) = ranked.ranked(x, C + 5, indexed=True)
    assert best.ids_NK.shape == (5, C + 5)
    missing = best.ids_NK < 0
    assert missing.any()
    assert (best.scores_NK[missing] == -torch.inf).all()
    assert (best.scores_NK[~missing] > -torch.inf).all()
