"""The mixture of true, retrieved, in-batch and random classes, and the corrections' unbiasedness.

What is unbiased, whatever the index returns, is the partition function's estimate, the corrected sum of exp(score) over
the active set, and its gradient. Loss and gradient of the loss are a logarithm and a quotient of it; their bias is of
the order Var(Z-hat) / Z^2 and is small beside the standard error only where that is. So the first pair is tested at
small samples and the second at large ones.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slidex.data import CsrArrays
from slidex.errors import ConfigError
from slidex.lsh import ClassSampler, make_index
from slidex.nn.candidates import CandidateSelector
from slidex.nn.head import SampledHead

C, D, N = 200, 8, 6
LABELS = CsrArrays(np.array([0, 2, 3, 3, 6, 7, 8]), np.array([3, 5, 5, 0, 7, 199, 3, 9], np.int32), None, C)


class Contrary:
    """An index that returns the worst classes, others at every step, with holes; and the true ones of all rows."""

    def __init__(self, weight_CD, bias_C):
        self.weight_CD, self.bias_C = weight_CD, bias_C

    def query(self, hidden_ND, k, *, step=0):
        worst_first = (hidden_ND @ self.weight_CD.T + self.bias_C).argsort(1)
        ids = worst_first.roll(-(step % 7) * k, 1)[:, :k].contiguous()
        ids[:, 1::4] = -1
        true = np.unique(LABELS.indices)[: k // 2]
        ids[:, : len(true)] = torch.where(torch.isin(torch.from_numpy(true), ids), -1, torch.from_numpy(true))
        return ids

    def pool(self, hidden_ND, budget, *, step=0):
        ids = self.query(hidden_ND, budget // 4, step=step)
        return ids[ids >= 0].unique()[:budget]


def weights(scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(C, D, generator=generator), scale * torch.randn(C, generator=generator)


def make_selector(
    correction="none", power=0.0, retrieved=20, random=30, index="simhash", counts=None, scale=1.0, batch=0
):
    counts = np.arange(1, C + 1) if counts is None else counts
    made = None
    if index == "simhash":
        made = make_index("simhash", D, C, seed=1, bits=3, tables=6)
        made.build(*weights(scale))
    elif index == "contrary":
        made = Contrary(*weights(scale))
    return CandidateSelector(
        C,
        index=made,
        sampler=ClassSampler(C, counts, power, seed=4),
        retrieved=retrieved,
        random=random,
        batch=batch,
        correction=correction,
        class_counts=counts,
        seed=6,
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
    sets = make_selector(index=None, random=10).active_sets(hidden()[:1], labels, step=3)
    assert sets.active_NA[0, 0] == 4
    assert 10 <= (sets.active_NA[0] >= 0).sum() <= 11


@pytest.mark.parametrize("batch", [3, 50])
def test_rows_get_true_classes_of_the_batch(batch):
    selector = make_selector(index=None, random=0, batch=batch)
    distinct = np.unique(LABELS.indices)
    drawn = []
    for step in range(20):
        sets = selector.active_sets(hidden(), LABELS, step)
        again = selector.active_sets(hidden(), LABELS, step)
        assert torch.equal(sets.active_NA, again.active_NA)
        row = sets.active_NA[2]  # the row without true classes of its own
        drawn.append(frozenset(row[row >= 0].tolist()))
        assert len(drawn[-1]) == min(batch, len(distinct))
        assert drawn[-1] <= set(distinct)
        for other in range(N):
            own = LABELS.indices[LABELS.indptr[other] : LABELS.indptr[other + 1]].tolist()
            active = sets.active_NA[other]
            assert set(active[active >= 0].tolist()) == drawn[-1] | set(own)
    assert frozenset.union(*drawn) == set(distinct)
    assert (len(set(drawn)) > 1) == (batch < len(distinct))


def terms(selector, mode, scores_NC, step):
    """Of one draw: class ids (N, A), and their corrected exp(score), 0 at padding."""
    if mode == "shared":
        pool = selector.pool(hidden(), LABELS, step=step)
        ids_NA, offset_NA = pool.ids_U.expand(N, -1), pool.offset_U.expand(N, -1)
    else:
        sets = selector.active_sets(hidden(), LABELS, step=step)
        ids_NA, offset_NA = sets.active_NA, sets.offset_NA
    values_NA = (scores_NC.gather(1, ids_NA.clamp(min=0)) + offset_NA.double()).exp()
    return ids_NA, values_NA.masked_fill(ids_NA < 0, 0.0)


def standard_errors(samples, expected):
    """How many standard errors the mean of the samples (S, ...) lies from what is expected."""
    return (samples.mean(0) - expected).abs() / (samples.std(0) / len(samples) ** 0.5)


def partition_errors(selector, mode, draws=1500):
    """Standard errors by which partition function and its gradient are off: of each row's (N,), and of all rows' sum.

    The gradient is taken along one random direction of the hidden vector.
    """
    weight_CD, bias_C = (tensor.double() for tensor in weights())
    scores_NC = hidden().double() @ weight_CD.T + bias_C
    along_C = weight_CD @ torch.randn(D, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    exact_NC = scores_NC.exp()
    exact_2N = torch.stack([exact_NC.sum(1), (exact_NC * along_C).sum(1)])
    samples = []
    for step in range(draws):
        ids_NA, values_NA = terms(selector, mode, scores_NC, step)
        samples.append(torch.stack([values_NA.sum(1), (values_NA * along_C[ids_NA]).sum(1)]))
    samples_S2N = torch.stack(samples) / exact_2N[0]
    exact_2N = exact_2N / exact_2N[0]
    return standard_errors(samples_S2N, exact_2N), standard_errors(samples_S2N.sum(2), exact_2N.sum(1))


@pytest.mark.parametrize("power", [0.0, 0.5])
@pytest.mark.parametrize("index", ["simhash", "contrary", None])
@pytest.mark.parametrize("mode", ["shared", "per_sample"])
def test_partition_function_and_its_gradient_are_unbiased(mode, index, power):
    rows, together = partition_errors(make_selector("stratified", power, index=index), mode)
    assert (together < 3).all()
    assert (rows < 4).all()


@pytest.mark.parametrize(("correction", "batch"), [("logq", 0), ("stratified", 4), ("stratified", 50)])
def test_so_they_are_in_rows_with_other_mixtures(correction, batch):
    # Shared logq is unbiased over batches; here the batch is fixed.
    rows, together = partition_errors(make_selector(correction, 0.5, batch=batch), "per_sample")
    assert (together < 3).all()
    assert (rows < 4).all()


@pytest.mark.parametrize("power", [0.0, 0.5])
@pytest.mark.parametrize("mode", ["shared", "per_sample"])
def test_a_weight_that_is_a_tenth_too_large_is_noticed(mode, power, monkeypatch):
    right = CandidateSelector._tail_log_weight
    monkeypatch.setattr(CandidateSelector, "_tail_log_weight", lambda *a: right(*a) + np.log(1.1))
    _, together = partition_errors(make_selector("stratified", power, index="contrary"), mode)
    assert together[0] > 3


ALL_LABELLED = CsrArrays(
    np.array([0, 2, 3, 4, 7, 8, 9]), np.array([3, 5, 5, 1, 0, 7, 199, 3, 9], np.int32), None, C
)


def full_softmax(head, labels):
    """Loss of every row and its gradient by the scores, with all classes: (N,), (N, C), in float64."""
    scores_NC = (hidden() @ head.weight.T + head.bias).double()
    target_NC = torch.zeros(N, C, dtype=torch.float64)
    for row in range(N):
        own = labels.indices[labels.indptr[row] : labels.indptr[row + 1]]
        target_NC[row, own] = 1 / len(own)
    loss_N = -(target_NC * scores_NC.log_softmax(1)).sum(1)
    return loss_N, scores_NC.softmax(1) - target_NC


def sampled_softmax(mode, scale, **mixture):
    head = SampledHead(D, C, mode=mode, selector=make_selector("stratified", scale=scale, **mixture))
    weight_CD, bias_C = weights(scale)
    head.weight.data.copy_(weight_CD)
    head.bias.data.copy_(bias_C)
    return head


def dense_gradient(scored):
    """The gradient of the rows' summed loss by the scores of all classes: (N, C)."""
    ids_NA = scored.ids if scored.ids.ndim == 2 else scored.ids.expand(N, -1)
    dense_N1 = torch.zeros(N, C + 1, dtype=torch.float64)
    dense_N1.scatter_(1, ids_NA.where(ids_NA >= 0, C), N * scored.grad.double())
    return dense_N1[:, :C]


def loss_errors(mode, power, draws=100, **mixture):
    """Standard errors by which the rows' summed loss and its gradient (along a random direction) are off."""
    head = sampled_softmax(mode, 0.1, power=power, random=150, **mixture)
    loss_N, grad_NC = full_softmax(head, ALL_LABELLED)
    along_NC = torch.randn(N, C, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    samples = []
    for step in range(draws):
        scored = head.score(hidden(), ALL_LABELLED, step)
        samples.append(torch.stack([scored.loss_N.double().sum(), (dense_gradient(scored) * along_NC).sum()]))
    samples_S2 = torch.stack(samples)
    relative = float(samples_S2[:, 0].std()) / N  # of Z-hat, as its logarithm is what varies
    assert relative**2 / 2 < 0.25 * relative / draws**0.5, "the logarithm's bias is not negligible"
    return standard_errors(samples_S2, torch.stack([loss_N.sum(), (grad_NC * along_NC).sum()]))


@pytest.mark.parametrize("power", [0.0, 0.5])
@pytest.mark.parametrize("index", ["simhash", "contrary"])
@pytest.mark.parametrize("mode", ["shared", "per_sample"])
def test_expected_loss_and_gradient_are_those_of_the_full_softmax(mode, index, power):
    assert (loss_errors(mode, power, index=index) < 3).all()


@pytest.mark.parametrize("mode", ["shared", "per_sample"])
def test_loss_with_a_weight_two_hundredths_too_large_is_noticed(mode, monkeypatch):
    right = CandidateSelector._tail_log_weight
    monkeypatch.setattr(CandidateSelector, "_tail_log_weight", lambda *a: right(*a) + np.log(1.02))
    assert loss_errors(mode, 0.0, index="contrary")[0] > 3


def test_sets_say_how_many_slots_are_no_padding():
    sets = make_selector("stratified", random=20).active_sets(hidden(), ALL_LABELLED, step=1)
    assert sets.count == int((sets.active_NA >= 0).sum())
    assert N < sets.count < sets.active_NA.numel()


@pytest.mark.parametrize("mode", ["shared", "per_sample"])
def test_a_true_class_is_no_negative_of_its_row_however_often_it_is_proposed(mode):
    # Every class is drawn, the index proposes the true ones of all rows: each must count once, as in the full softmax.
    mixture = {"batch": 50} if mode == "per_sample" else {}
    head = sampled_softmax(mode, 1.0, index="contrary", random=C, **mixture)
    loss_N, grad_NC = full_softmax(head, ALL_LABELLED)
    scored = head.score(hidden(), ALL_LABELLED, 1)
    np.testing.assert_allclose(scored.loss_N, loss_N, rtol=1e-5)
    np.testing.assert_allclose(dense_gradient(scored), grad_NC, atol=1e-5)


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
        make_selector(random=0, index=None)
    with pytest.raises(ConfigError, match="'correction' parameter must be none or stratified"):
        make_selector(correction="logq", batch=5)
    with pytest.raises(
        ConfigError, match="'batch' parameter of CandidateSelector must be 0 for a shared pool"
    ):
        make_selector(batch=5).pool(hidden(), LABELS, step=1)
