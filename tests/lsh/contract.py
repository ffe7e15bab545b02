"""What every index must do, as a class of tests for any variant and device; see `tests.lsh.test_contract`.

An index promises equal answers down to the last tie, but for FAISS, which leaves two things open (see
`slidex.lsh.faiss_index.FaissIndex`): rounding in batches of another size, and the order in which a cell was
filled. Where that may show, its answers need only share 99 % of their ids.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

import numba
import pytest
import torch

from slidex.errors import ConfigError, DivergedError
from slidex.lsh import CandidateIndex, make_index, recall_at_k
from slidex.lsh.index import QuerySample

if TYPE_CHECKING:
    from collections.abc import Iterator

WIDTH = 12
FITTED = ("norm_augmentation", "center")
FAISS = importlib.util.find_spec("faiss") is not None


def set_threads(count: int) -> None:
    numba.set_num_threads(count)
    torch.set_num_threads(count)
    if FAISS:
        importlib.import_module("faiss").omp_set_num_threads(count)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Calls this small are over before a second thread is awake; one test looks at the number of threads."""
    before = torch.get_num_threads()
    set_threads(1)
    yield
    set_threads(min(before, numba.config.NUMBA_NUM_THREADS))


def is_faiss(variant) -> bool:
    return variant[0].startswith("faiss")


def problem(
    num_classes: int, num_rows: int = 9, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight_CD = torch.randn(num_classes, WIDTH, generator=generator)
    bias_C = 0.3 * torch.randn(num_classes, generator=generator)
    hidden_ND = torch.randn(num_rows, WIDTH, generator=generator)
    return weight_CD.to(device), bias_C.to(device), hidden_ND.to(device)


def sample(num_classes: int, device: str = "cpu", seed: int = 1) -> QuerySample:
    """Hidden vectors near the row of one of their three classes."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(num_classes, (3 * 64,), generator=generator)
    weight_CD = problem(num_classes)[0]
    hidden_ND = weight_CD[ids[::3]] + 0.3 * torch.randn(64, WIDTH, generator=generator)
    return QuerySample(hidden_ND.to(device), torch.arange(0, 3 * 64 + 1, 3), ids)


def empty(variant, num_classes, seed=3) -> CandidateIndex:
    name, settings = variant
    return make_index(name, WIDTH, num_classes, seed=seed, **settings)


def built(variant, weight_CD, bias_C, seed=3, queries=None) -> CandidateIndex:
    index = empty(variant, len(weight_CD), seed)
    index.build(weight_CD, bias_C, queries=queries)
    return index


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, exactly: bool = True) -> None:
    """Equal answers of `query` or `pool`; or, not exactly, 99 % of the ids in common, row by row."""
    assert ours.device == theirs.device
    if exactly:
        assert torch.equal(ours, theirs)
    else:
        rows = [answer[None] if answer.ndim == 1 else answer for answer in (ours, theirs)]
        assert recall_at_k(*rows) > 0.99
        assert recall_at_k(*rows[::-1]) > 0.99


def check_values_not_finite_are_refused(variant, device: str, value: float) -> None:
    """Rows and hidden vectors are named; a GPU may tell of the latter when it is next waited for."""
    weight_CD, bias_C, hidden_ND = problem(100, device=device)
    index = built(variant, weight_CD, bias_C)
    hidden_ND[4, 2] = value
    with pytest.raises(DivergedError, match="Row 4 "):
        ask_and_wait(index, hidden_ND)
    bias_C[33] = value
    with pytest.raises(DivergedError, match="class 33 "):
        index.update(weight_CD, bias_C, torch.tensor([3, 33], device=device))
    with pytest.raises(DivergedError, match="class 33 "):
        index.build(weight_CD, bias_C)
    with pytest.raises(ConfigError, match="before build"):
        index.query(weight_CD, 3)


def ask_and_wait(index: CandidateIndex, hidden_ND: torch.Tensor) -> None:
    index.query(hidden_ND, 3)
    index.state()


class Contract:
    """Tests for every index; a subclass says for which variants and devices, and how large problems may be."""

    most_classes = 6_000
    most_rows = 200

    def problem(
        self, num_classes: int, num_rows: int = 9, device: str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return problem(min(num_classes, self.most_classes), min(num_rows, self.most_rows), device)

    def asked(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        return hidden_ND[: self.most_rows]

    @pytest.mark.parametrize("k", [1, 10, 700])
    @pytest.mark.parametrize("num_classes", [1, 500])
    def test_query_gives_distinct_ids_in_range_then_padding(self, variant, device, num_classes, k) -> None:
        weight_CD, bias_C, _ = self.problem(num_classes, device=device)
        hidden_ND = self.asked(weight_CD[:9])
        ids_NK = built(variant, weight_CD, bias_C).query(hidden_ND, k)
        assert ids_NK.shape == (len(hidden_ND), k)
        assert ids_NK.dtype == torch.int64
        assert ids_NK.device == hidden_ND.device
        for row in ids_NK.tolist():
            found = [c for c in row if c >= 0]
            assert row == found + [-1] * (k - len(found))
            assert len(set(found)) == len(found)
            assert all(c < num_classes for c in found)
        assert num_classes == 1 or int(ids_NK.max()) >= 0

    @pytest.mark.parametrize("budget", [1, 60, 700])
    @pytest.mark.parametrize("num_classes", [1, 500])
    def test_pool_gives_distinct_ascending_ids_within_budget(
        self, variant, device, num_classes, budget
    ) -> None:
        weight_CD, bias_C, _ = self.problem(num_classes, device=device)
        ids = built(variant, weight_CD, bias_C).pool(self.asked(weight_CD[:9]), budget)
        assert ids.dtype == torch.int64
        assert ids.device == weight_CD.device
        assert len(ids) <= min(budget, num_classes)
        assert bool((ids.diff() > 0).all())
        assert num_classes == 1 or len(ids) > 0
        assert all(0 <= c < num_classes for c in ids.tolist())

    def test_a_single_class_can_be_updated(self, variant, device) -> None:
        weight_CD, bias_C, hidden_ND = self.problem(1, device=device)
        index, only = built(variant, weight_CD, bias_C), torch.zeros(1, dtype=torch.int64, device=device)
        weight_CD.neg_()
        index.update(weight_CD, bias_C, only)
        assert index.drift(weight_CD, bias_C, only) == 0.0
        assert set(index.query(hidden_ND, 2).flatten().tolist()) <= {0, -1}

    def test_empty_batch(self, variant, device) -> None:
        weight_CD, bias_C, hidden_ND = self.problem(50, device=device)
        index = built(variant, weight_CD, bias_C)
        assert index.query(hidden_ND[:0], 4).shape == (0, 4)
        assert index.pool(hidden_ND[:0], 4).shape == (0,)

    def test_no_bias_is_zero_bias(self, variant, device) -> None:
        weight_CD, bias_C, hidden_ND = self.problem(300, device=device)
        without, zero = built(variant, weight_CD, None), built(variant, weight_CD, torch.zeros_like(bias_C))
        assert torch.equal(without.query(hidden_ND, 20), zero.query(hidden_ND, 20))

    def test_bias_takes_part(self, variant, device) -> None:
        weight_CD, bias_C, _ = self.problem(300, device=device)
        plain, biased = built(variant, weight_CD, None), built(variant, weight_CD, 5 * bias_C)
        hidden_ND = self.asked(weight_CD)
        assert not torch.equal(plain.query(hidden_ND, 20), biased.query(hidden_ND, 20))

    def test_update_equals_rebuild_with_the_same_functions(self, variant, device) -> None:
        weight_CD, bias_C, hidden_ND = self.problem(6_000, device=device)
        index, count = built(variant, weight_CD, bias_C), len(weight_CD)
        changed = torch.tensor([7, count - 1, 0, 7, 123, count // 2, count // 3], device=device)
        rows = torch.randn(len(changed), WIDTH, generator=torch.Generator().manual_seed(8))
        weight_CD[changed] = rows.to(device)
        bias_C[5] += 9.0
        index.update(weight_CD, bias_C, torch.cat([changed, torch.tensor([5], device=device)]))
        rebuilt = empty(variant, count)
        everything = torch.arange(count, device=device)
        if is_faiss(variant) or any(variant[1].get(name) for name in FITTED):
            rebuilt.load_state(index.state(), weight_CD, bias_C)  # brings what was fitted or trained
            rebuilt.update(weight_CD, bias_C, everything)
        else:
            rebuilt.build(weight_CD, bias_C)
        if not is_faiss(variant):
            for ours, theirs in zip(index.state().values(), rebuilt.state().values(), strict=True):
                assert torch.equal(ours, theirs)
        exactly = not is_faiss(variant)
        assert_same(index.query(hidden_ND, 50, step=2), rebuilt.query(hidden_ND, 50, step=2), exactly)
        assert_same(index.pool(hidden_ND, 50, step=2), rebuilt.pool(hidden_ND, 50, step=2), exactly)
        assert index.drift(weight_CD, bias_C, everything) == 0.0

    def test_update_shows_in_the_answer(self, variant, device) -> None:
        weight_CD, bias_C, _ = self.problem(400, device=device)
        index = built(variant, weight_CD, bias_C)
        target = 3 * weight_CD[117:118].clone()
        before = index.query(target, 25).tolist()[0]
        weight_CD[:20] = target
        bias_C[:20] = 3.0
        index.update(weight_CD, bias_C, torch.arange(20, device=device))
        after = index.query(target, 25).tolist()[0]
        moved = set(range(20))
        assert len(moved & set(after)) > len(moved & set(before))

    def test_update_of_nothing_changes_nothing(self, variant, device) -> None:
        weight_CD, bias_C, hidden_ND = self.problem(80, device=device)
        index = built(variant, weight_CD, bias_C)
        before = index.query(hidden_ND, 9)
        index.update(weight_CD, bias_C, torch.empty(0, dtype=torch.int64, device=device))
        assert torch.equal(index.query(hidden_ND, 9), before)

    def test_same_seed_same_answer_for_any_number_of_threads_and_any_batch(self, variant, device) -> None:
        weight_CD, bias_C, hidden_ND = self.problem(900, num_rows=31, device=device)
        reference = built(variant, weight_CD, bias_C)
        expected_NK, expected = reference.query(hidden_ND, 30, step=4), reference.pool(hidden_ND, 77, step=4)
        set_threads(numba.config.NUMBA_NUM_THREADS)
        again = built(variant, weight_CD, bias_C)
        assert torch.equal(again.query(hidden_ND, 30, step=4), expected_NK)
        assert torch.equal(again.pool(hidden_ND, 77, step=4), expected)
        rows = torch.cat([again.query(row[None], 30, step=4) for row in hidden_ND])
        assert_same(rows, expected_NK, exactly=not is_faiss(variant))

    def test_repeated_calls_leave_no_trace(self, variant, device) -> None:
        weight_CD, bias_C, hidden_ND = self.problem(900, device=device)
        index = built(variant, weight_CD, bias_C)
        first = (index.query(hidden_ND, 30), index.pool(hidden_ND, 40), index.query(hidden_ND, 3))
        second = (index.query(hidden_ND, 30), index.pool(hidden_ND, 40), index.query(hidden_ND, 3))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_seed_settings_and_weights_are_all_there_is(self, variant, device) -> None:
        """An index that learned from no queries need not be saved, whatever it went through."""
        weight_CD, bias_C, hidden_ND = self.problem(900, device=device)
        index = empty(variant, len(weight_CD))
        if not is_faiss(variant):  # which keeps its quantisers from build to build
            index.build(weight_CD.flip(0), bias_C)
            index.update(weight_CD, bias_C, torch.arange(0, len(weight_CD), 7, device=device))
        index.build(weight_CD, bias_C)
        fresh = built(variant, weight_CD, bias_C)
        assert torch.equal(index.query(hidden_ND, 25, step=1), fresh.query(hidden_ND, 25, step=1))
        assert torch.equal(index.pool(hidden_ND, 25, step=1), fresh.pool(hidden_ND, 25, step=1))

    def test_state_restores_the_index_while_weights_move_on(self, variant, device) -> None:
        weight_CD, bias_C, hidden_ND = self.problem(400, device=device)
        index = built(variant, weight_CD, bias_C, queries=sample(len(weight_CD), device))
        noise = torch.randn(weight_CD.shape, generator=torch.Generator().manual_seed(1))
        weight_CD += noise.to(device)
        saved = {name: value.clone() for name, value in index.state().items()}
        other = empty(variant, len(weight_CD))
        other.load_state(saved, weight_CD, bias_C)
        assert torch.equal(other.query(hidden_ND, 25, step=1), index.query(hidden_ND, 25, step=1))
        assert torch.equal(other.pool(hidden_ND, 25, step=1), index.pool(hidden_ND, 25, step=1))
        some = torch.arange(0, len(weight_CD), 3, device=device)
        assert other.drift(weight_CD, bias_C, some) == index.drift(weight_CD, bias_C, some)

    def test_stats_count_builds_and_updates(self, variant, device) -> None:
        weight_CD, bias_C, _ = self.problem(40, device=device)
        index = empty(variant, 40)
        assert not index.stats().built
        index.build(weight_CD, bias_C)
        index.update(weight_CD, bias_C, torch.tensor([3], device=device))
        stats = index.stats()
        assert (stats.built, stats.rows, stats.builds, stats.updates) == (True, 40, 1, 1)
        assert stats.last_build_seconds > 0
        assert stats.last_update_seconds > 0

    def test_finds_a_row_by_itself(self, variant, device) -> None:
        weight_CD, _, _ = self.problem(200, device=device)
        weight_CD = torch.nn.functional.normalize(weight_CD, dim=1)
        found = built(variant, weight_CD, None).query(self.asked(10 * weight_CD), 20).cpu()
        assert float((found == torch.arange(len(found))[:, None]).any(dim=1).float().mean()) > 0.5

    def test_queries_are_learned_from_where_the_index_says_so(self, variant, device) -> None:
        weight_CD, bias_C, hidden_ND = self.problem(400, device=device)
        queries = sample(len(weight_CD), device)
        plain = built(variant, weight_CD, bias_C)
        taught = built(variant, weight_CD, bias_C, queries=queries)
        again = built(variant, weight_CD, bias_C, queries=queries)
        answer = taught.query(hidden_ND, 60, step=1)
        assert torch.equal(again.query(hidden_ND, 60, step=1), answer)
        assert torch.equal(again.pool(hidden_ND, 60, step=1), taught.pool(hidden_ND, 60, step=1))
        assert torch.equal(plain.query(hidden_ND, 60, step=1), answer) is not taught.uses_queries
        taught.build(weight_CD, bias_C)  # without queries: what was learned stays
        assert torch.equal(taught.query(hidden_ND, 60, step=1), answer)

    def test_use_before_build_is_refused(self, variant, device) -> None:
        weight_CD, bias_C, hidden_ND = self.problem(30, device=device)
        index, some = empty(variant, 30), torch.tensor([1], device=device)
        for call in (
            lambda: index.query(hidden_ND, 3),
            lambda: index.pool(hidden_ND, 3),
            lambda: index.update(weight_CD, bias_C, some),
            lambda: index.drift(weight_CD, bias_C, some),
            index.state,
        ):
            with pytest.raises(ConfigError, match="before build"):
                call()

    def test_wrong_arguments_are_named(self, variant, device) -> None:
        weight_CD, bias_C, hidden_ND = self.problem(30, device=device)
        index, queries = built(variant, weight_CD, bias_C), sample(30, device)
        other_classes = QuerySample(queries.hidden_ND, queries.label_indptr, queries.label_ids + 30)
        short = QuerySample(queries.hidden_ND, queries.label_indptr[:-1], queries.label_ids)
        narrow = QuerySample(queries.hidden_ND[:, 1:], queries.label_indptr, queries.label_ids)
        for call, name in (
            (lambda: index.build(weight_CD[:29], bias_C), "weight_CD"),
            (lambda: index.build(weight_CD.long(), bias_C), "weight_CD"),
            (lambda: index.build(weight_CD, bias_C[:3]), "bias_C"),
            (lambda: index.build(weight_CD, bias_C, queries=other_classes), "queries.label_ids"),
            (lambda: index.build(weight_CD, bias_C, queries=short), "queries.label_indptr"),
            (lambda: index.build(weight_CD, bias_C, queries=narrow), "hidden_ND"),
            (lambda: index.query(hidden_ND[:, :3], 3), "hidden_ND"),
            (lambda: index.query(hidden_ND, 0), "'k'"),
            (lambda: index.pool(hidden_ND, 0), "budget"),
            (lambda: index.update(weight_CD, bias_C, torch.tensor([30])), "changed_ids"),
            (lambda: index.update(weight_CD, bias_C, torch.tensor([-1])), "changed_ids"),
            (lambda: index.drift(weight_CD, bias_C, torch.tensor([0.5])), "sample_ids"),
            (lambda: index.load_state({"what": hidden_ND}, weight_CD, bias_C), "state"),
        ):
            with pytest.raises(ConfigError, match=name):
                call()
