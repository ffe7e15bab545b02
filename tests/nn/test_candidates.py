"""The mixture of true, retrieved and random classes, and the corrections' unbiasedness."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slidex.data import CsrArrays
from slidex.errors import ConfigError
from slidex.lsh import ClassSampler, make_index
from slidex.nn.candidates import CandidateSelector

C, D, N = 200, 8, 6
LABELS = CsrArrays(np.array([0, 2, 3, 3, 6, 7, 8]), np.array([3, 5, 5, 0, 7, 199, 3, 9], np.int32), None, C)


def make_selector(correction="none", power=0.0, retrieved=20, random=30, with_index=True, counts=None):
    counts = np.arange(1, C + 1) if counts is None else counts
    index = None
    if with_index:
        index = make_index("simhash", D, C, seed=1, bits=3, tables=6)
        generator = torch.Generator().manual_seed(0)
        index.build(torch.randn(C, D, generator=generator), torch.randn(C, generator=generator))
    return CandidateSelector(
        C,
        index=index,
        sampler=ClassSampler(C, counts, power, seed=4),
        retrieved=retrieved,
        random=random,
        correction=correction,
        class_counts=counts,
    )


def hidden(seed=0):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed))


def test_pool_holds_true_then_retrieved_then_random_classes_once_each():
    selector = make_selector()
    pool = selector.pool(hidden(), LABELS, step=1)
    ids = pool.ids_U.numpy()
    assert len(set(ids)) == len(ids)
    assert set(ids[:6]) == {0, 3, 5, 7, 9, 199}
    assert pool.retrieved > 0
    assert pool.random > 0
    assert 6 + pool.retrieved + pool.random == len(ids)
    assert np.array_equal(ids[pool.target_positions.numpy()], LABELS.indices)
    sums = np.add.reduceat(np.append(pool.target_weights.numpy(), 0), LABELS.indptr[:-1])
    labelled = np.diff(LABELS.indptr) > 0
    np.testing.assert_allclose(sums[labelled], 1.0)


def test_pool_is_a_function_of_the_step():
    selector = make_selector()
    first, again, other = (selector.pool(hidden(), LABELS, step=s).ids_U for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_pool_of_every_class():
    pool = make_selector(random=C, retrieved=5).pool(hidden(), LABELS, step=1)
    assert sorted(pool.ids_U.tolist()) == list(range(C))


def test_active_sets_have_targets_first_and_no_duplicates():
    sets = make_selector().active_sets(hidden(), LABELS, step=1)
    for row in range(N):
        active = sets.active_NA[row]
        active = active[active >= 0].tolist()
        true = LABELS.indices[LABELS.indptr[row] : LABELS.indptr[row + 1]].tolist()
        assert len(set(active)) == len(active)
        assert active[: len(true)] == true
        target = sets.target_NA[row]
        assert target[: len(true)].sum().item() == pytest.approx(1.0 if true else 0.0)
        assert target[len(true) :].sum() == 0


def test_active_sets_with_one_row_and_only_random_classes():
    labels = CsrArrays(np.array([0, 1]), np.array([4], np.int32), None, C)
    sets = make_selector(with_index=False, random=10).active_sets(hidden()[:1], labels, step=3)
    assert sets.active_NA[0, 0] == 4
    assert 10 <= (sets.active_NA[0] >= 0).sum() <= 11


def estimate_partition(selector, scores_NC, mode, steps):
    """Mean over many draws of every row's corrected sum of exp(score)."""
    estimates = []
    for step in range(1, steps + 1):
        if mode == "shared":
            pool = selector.pool(hidden(), LABELS, step=step)
            terms = scores_NC[:, pool.ids_U] + pool.offset_U
        else:
            sets = selector.active_sets(hidden(), LABELS, step=step)
            terms = scores_NC.gather(1, sets.active_NA.clamp(min=0)) + sets.offset_NA
            terms = terms.masked_fill(sets.active_NA < 0, -torch.inf)
        estimates.append(terms.double().exp().sum(1))
    return torch.stack(estimates)


@pytest.mark.parametrize(
    ("mode", "correction", "power"),
    [
        ("shared", "stratified", 0.0),
        ("shared", "stratified", 0.5),
        ("per_sample", "stratified", 0.0),
        ("per_sample", "stratified", 0.5),
        ("per_sample", "logq", 0.5),  # shared logq is unbiased over batches, and here the batch is fixed
    ],
)
def test_corrected_partition_function_is_unbiased(mode, correction, power):
    selector = make_selector(correction, power)
    scores_NC = torch.randn(N, C, generator=torch.Generator().manual_seed(5))
    estimates = estimate_partition(selector, scores_NC, mode, 3000)
    error = estimates.mean(0) - scores_NC.double().exp().sum(1)
    standard_error = estimates.std(0) / len(estimates) ** 0.5
    assert (error.abs() < 4 * standard_error).all()
    # Without the weights the same sums are far too small: the check above can fail.
    naive = estimate_partition(make_selector("stratified", 0.0, random=30), scores_NC, mode, 10) * 0.5
    assert ((naive.mean(0) - scores_NC.double().exp().sum(1)).abs() > 4 * standard_error).all()


def test_logq_lowers_the_weight_of_frequent_true_classes():
    counts = np.ones(C, dtype=np.int64)
    counts[3] = 10_000
    pool = make_selector("logq", counts=counts).pool(hidden(), LABELS, step=1)
    place = {int(c): i for i, c in enumerate(pool.ids_U)}
    assert pool.offset_U[place[3]] < pool.offset_U[place[9]]


def test_errors_name_the_setting():
    with pytest.raises(ConfigError, match="'correction' parameter must be one of"):
        make_selector(correction="sometimes")
    with pytest.raises(ConfigError, match="No negative classes"):
        make_selector(random=0, with_index=False)
