"""The estimated partition function: unbiased whatever was retrieved, exact where all classes are counted."""

from __future__ import annotations

import math

import pytest
import torch

from slidex.errors import ConfigError
from slidex.lsh import exact_topk, exact_topk_and_total
from slidex.nn.partition import PartitionEstimator

C, D, N = 500, 8, 6
DRAWS = 1_000


def model(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(N, D, generator=generator)
    return (
        hidden_ND,
        torch.randn(C, D, generator=generator) * 0.5,
        torch.randn(C, generator=generator) * 0.3,
    )


def retrieved(hidden_ND, weight_CD, bias_C, wrong: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Uneven numbers of candidates per row, the best ones or any, with -1 in between, and their scores."""
    logits_NC = hidden_ND @ weight_CD.T + bias_C
    ids_NA = torch.argsort(logits_NC, dim=1, descending=not wrong)[:, :20].clone()
    for n in range(N):
        ids_NA[n, 3 : 3 + n] = -1
    scores_NA = logits_NC.gather(1, ids_NA.clamp(min=0)).masked_fill(ids_NA < 0, -math.inf)
    return ids_NA, scores_NA


def biases(weigh, wrong: bool) -> torch.Tensor:
    """How many standard errors the mean of many estimates of Z is from Z, for each row; `weigh` may break them."""
    hidden_ND, weight_CD, bias_C = model()
    ids_NA, scores_NA = retrieved(hidden_ND, weight_CD, bias_C, wrong)
    exact_N = (hidden_ND @ weight_CD.T + bias_C).double().logsumexp(dim=1).exp()
    estimates = torch.stack(
        [
            weigh(PartitionEstimator(weight_CD, bias_C, 40, seed=seed), hidden_ND, ids_NA, scores_NA)
            for seed in range(DRAWS)
        ]
    ).double()
    return (estimates.mean(dim=0) - exact_N) / (estimates.std(dim=0) / math.sqrt(DRAWS))


def ours(estimator, hidden_ND, ids_NA, scores_NA) -> torch.Tensor:
    return estimator.log_total(hidden_ND, ids_NA, scores_NA).double().exp()


@pytest.mark.parametrize("wrong", [False, True], ids=["best retrieved", "worst retrieved"])
def test_the_estimate_is_unbiased_whatever_was_retrieved(wrong):
    assert biases(ours, wrong).abs().max() < 3


def test_the_test_sees_weights_that_are_slightly_wrong():
    def all_stand_for_all(estimator, hidden_ND, ids_NA, scores_NA):
        """Retrieved classes are among those that the sample stands for: they count a second time."""
        everything = ours(estimator, hidden_ND, ids_NA[:, :0], scores_NA[:, :0])
        return everything + scores_NA.double().exp().sum(dim=1)

    assert biases(all_stand_for_all, False).abs().min() > 3

    def not_left_out(estimator, hidden_ND, ids_NA, scores_NA):
        none = torch.full_like(ids_NA, -1)
        others = ours(estimator, hidden_ND, none, torch.full_like(scores_NA, -math.inf))
        found_N = (ids_NA >= 0).sum(dim=1)
        return others * (C - found_N) / C + scores_NA.double().exp().sum(dim=1)

    assert biases(not_left_out, False).abs().min() > 3


def test_it_is_exact_where_every_class_is_drawn_or_retrieved():
    hidden_ND, weight_CD, bias_C = model()
    exact_N = (hidden_ND @ weight_CD.T + bias_C).logsumexp(dim=1)
    found = PartitionEstimator(weight_CD, bias_C, C, seed=1)
    torch.testing.assert_close(
        found.log_total(hidden_ND, *retrieved(hidden_ND, weight_CD, bias_C)), exact_N, rtol=1e-6, atol=1e-5
    )
    every = torch.arange(C).expand(N, C)
    scores_NC = hidden_ND @ weight_CD.T + bias_C
    torch.testing.assert_close(found.log_total(hidden_ND, every, scores_NC), exact_N, rtol=1e-6, atol=1e-5)


def test_a_row_does_not_depend_on_the_others_and_a_seed_gives_the_sample():
    hidden_ND, weight_CD, bias_C = model()
    ids_NA, scores_NA = retrieved(hidden_ND, weight_CD, bias_C)
    estimator = PartitionEstimator(weight_CD, bias_C, 60, seed=3)
    together = estimator.log_total(hidden_ND, ids_NA, scores_NA)
    alone = torch.cat(
        [estimator.log_total(hidden_ND[n : n + 1], ids_NA[n : n + 1], scores_NA[n : n + 1]) for n in range(N)]
    )
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)
    again = PartitionEstimator(weight_CD, bias_C, 60, seed=3)
    assert torch.equal(again.ids_S, estimator.ids_S)
    assert not torch.equal(PartitionEstimator(weight_CD, bias_C, 60, seed=4).ids_S, estimator.ids_S)
    assert len(estimator.ids_S.unique()) == 60


def test_more_random_classes_come_closer():
    hidden_ND, weight_CD, bias_C = model()
    ids_NA, scores_NA = retrieved(hidden_ND, weight_CD, bias_C)
    exact_N = (hidden_ND @ weight_CD.T + bias_C).logsumexp(dim=1)

    def spread(count: int) -> float:
        errors = [
            PartitionEstimator(weight_CD, bias_C, count, seed=seed).log_total(hidden_ND, ids_NA, scores_NA)
            - exact_N
            for seed in range(50)
        ]
        return float(torch.stack(errors).square().mean().sqrt())

    assert spread(300) < 0.5 * spread(30)


def test_too_few_random_classes_are_refused():
    hidden_ND, weight_CD, bias_C = model()
    ids_NA, scores_NA = retrieved(hidden_ND, weight_CD, bias_C)
    with pytest.raises(ConfigError, match=r"'A' parameter of PartitionEstimator\.log_total must be .* to 19"):
        PartitionEstimator(weight_CD, bias_C, 20, seed=0).log_total(hidden_ND, ids_NA, scores_NA)
    with pytest.raises(ConfigError, match="'count' parameter of PartitionEstimator"):
        PartitionEstimator(weight_CD, bias_C, 0, seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_exact_totals_beside_the_best_classes(dtype, monkeypatch):
    monkeypatch.setattr("slidex.lsh.exact._CHUNK_SCORES", 6 * 70)  # several chunks of classes
    hidden_ND, weight_CD, bias_C = (value.to(dtype) for value in model())
    scores, ids, log_total_N = exact_topk_and_total(hidden_ND, weight_CD, bias_C, 5)
    assert torch.equal(ids, exact_topk(hidden_ND, weight_CD, bias_C, 5)[1])
    logits_NC = hidden_ND.double() @ weight_CD.double().T + bias_C.double()
    torch.testing.assert_close(log_total_N.double(), logits_NC.logsumexp(dim=1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.double(), logits_NC.gather(1, ids), rtol=1e-5, atol=1e-5)
    no_bias = exact_topk_and_total(hidden_ND, weight_CD, None, 5)[2]
    expected = (hidden_ND.double() @ weight_CD.double().T).logsumexp(dim=1)
    torch.testing.assert_close(no_bias.double(), expected, rtol=1e-5, atol=1e-5)
