"""The output layer against plain torch: loss, gradient, update, top-k, in all three modes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slidex.data import CsrArrays
from slidex.errors import ConfigError
from slidex.kernels import OPTIMIZERS, StepSettings
from slidex.kernels.optimizer import state_size
from slidex.lsh import ClassSampler
from slidex.nn.candidates import CandidateSelector, label_weights
from slidex.nn.head import SampledHead
from slidex.nn.scoring import Rows, Scorer
from slidex.nn.sharding import Shard
from slidex.nn.smoothing import LabelMass

C, D, N = 40, 12, 7
LABELS = CsrArrays(
    np.array([0, 2, 3, 4, 5, 6, 8, 9]), np.array([3, 5, 5, 0, 7, 39, 3, 9, 1], np.int32), None, C
)


def make_head(mode, loss="softmax", random=C, correction="none", optimizer="adam"):
    selector = CandidateSelector(
        C, index=None, sampler=ClassSampler(C, seed=1), retrieved=0, random=random, correction=correction
    )
    selector = None if mode == "exact" else selector
    head = SampledHead(D, C, mode=mode, loss=loss, selector=selector, optimizer=optimizer, seed=3)
    head.bias.copy_(torch.randn(C, generator=torch.Generator().manual_seed(4)))
    return head


def hidden():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0))


def torch_loss(weight, bias, hidden_ND, loss):
    target = torch.zeros(N, C)
    for row in range(N):
        target[row, LABELS.indices[LABELS.indptr[row] : LABELS.indptr[row + 1]].tolist()] = 1
    logits = hidden_ND @ weight.T + bias
    if loss == "softmax":
        return torch.nn.functional.cross_entropy(
            logits, target / target.sum(1, keepdim=True), reduction="none"
        )
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1)


@pytest.mark.parametrize("loss", ["softmax", "logistic"])
@pytest.mark.parametrize("mode", ["exact", "shared", "per_sample"])
def test_one_step_with_all_classes_active_equals_torch(mode, loss):
    head = make_head(mode, loss)
    weight, bias, hidden_ND = (
        t.detach().clone().requires_grad_() for t in (head.weight, head.bias, hidden())
    )
    optimizer = torch.optim.SparseAdam([weight, bias], lr=0.05)
    expected = torch_loss(weight, bias, hidden_ND, loss)
    expected.mean().backward()
    weight.grad, bias.grad = weight.grad.to_sparse(1), bias.grad.to_sparse()
    optimizer.step()

    scored = head.score(hidden(), LABELS, step=1)
    grad_hidden = head.update(scored, StepSettings(learning_rate=0.05, step=1))
    torch.testing.assert_close(scored.loss_N, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_hidden, hidden_ND.grad, rtol=1e-4, atol=1e-6)
    # A first Adam step is lr * sign(gradient): where a gradient is nearly 0 its sign is rounding.
    clear = weight.grad.to_dense().abs() > 1e-5
    torch.testing.assert_close(head.weight[clear], weight.detach()[clear], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.bias.data, bias.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["exact", "shared", "per_sample"])
def test_a_step_of_rowwise_adagrad_is_the_gradient_over_its_root_mean_square(mode):
    head = make_head(mode, optimizer="rowwise_adagrad")
    weight, bias = (t.detach().clone().requires_grad_() for t in (head.weight, head.bias))
    torch_loss(weight, bias, hidden(), "softmax").mean().backward()
    settings = StepSettings(learning_rate=0.05, step=1)
    head.update(head.score(hidden(), LABELS, step=1), settings)
    expected = weight - 0.05 * weight.grad / (weight.grad.square().mean(1, keepdim=True).sqrt() + 1e-8)
    torch.testing.assert_close(head.weight.data, expected.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.bias.data, bias.detach() - 0.05 * bias.grad.sign(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_state_of_the_weights_is_as_large_as_the_optimizer_says(optimizer):
    head = make_head("exact", optimizer=optimizer)
    entries = sum(moment.numel() for moment in head.weight_state)
    assert entries == {"adam": 2 * C * D, "rowwise_adam": C * D + C, "rowwise_adagrad": C}[optimizer]
    assert entries == C * state_size(optimizer, D)


@pytest.mark.parametrize("mode", ["shared", "per_sample"])
def test_classes_that_are_not_active_do_not_move(mode):
    head = make_head(mode, random=5)
    before = head.weight.clone()
    scored = head.score(hidden(), LABELS, step=1)
    active = set(scored.ids.ravel().tolist()) - {-1}
    head.update(scored, StepSettings(learning_rate=0.1, step=1))
    moved = set(torch.nonzero((head.weight != before).any(1)).ravel().tolist())
    assert moved == active
    assert len(active) < C


@pytest.mark.parametrize("mode", ["shared", "per_sample"])
@pytest.mark.parametrize("correction", ["none", "stratified"])
def test_correction_changes_the_loss(mode, correction):
    loss = make_head(mode, random=5, correction=correction).score(hidden(), LABELS, step=1).loss_N
    plain = make_head(mode, random=5).score(hidden(), LABELS, step=1).loss_N
    assert torch.equal(loss, plain) == (correction == "none")
    if correction == "stratified":
        assert (loss > plain).all()  # the drawn classes stand for those not drawn


@pytest.mark.parametrize(("loss", "dtype"), [("softmax", torch.bfloat16), ("logistic", torch.float32)])
@pytest.mark.parametrize("mode", ["exact", "shared"])
def test_gradients_of_bfloat16_products_are_torchs(mode, loss, dtype):
    """A pool of 40 classes is multiplied as one of 256: nothing of the other 216 may show."""
    head = make_head(mode, loss)
    head.scorer.precision = "bfloat16"
    weight, bias, hidden_ND = (
        t.detach().bfloat16().float().requires_grad_() for t in (head.weight, head.bias, hidden())
    )
    head.weight.copy_(weight.detach())
    head.bias.copy_(bias.detach())
    expected = torch_loss(weight, bias, hidden_ND, loss)
    expected.mean().backward()
    scored = head.score(hidden_ND.detach(), LABELS, step=1)
    assert scored.grad.dtype == dtype
    assert not scored.grad[:, C:].any()
    ids_C, grad_CD, grad_C = head.scorer.rows_grad(scored)
    torch.testing.assert_close(scored.loss_N, expected.detach(), rtol=0.01, atol=0.01)
    torch.testing.assert_close(ids_C, torch.arange(C))
    settings = StepSettings(learning_rate=0.05, step=1)
    for got, want in (
        (head.scorer.hidden_grad(scored), hidden_ND.grad),
        (grad_CD, weight.grad),
        (grad_C, bias.grad),
        (head.update(scored, settings), hidden_ND.grad),
        (head.weight_state.moment1 / (1 - settings.beta1), weight.grad),
        (head.bias_state.moment1 / (1 - settings.beta1), bias.grad),
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.01 * float(want.abs().max()))


@pytest.mark.parametrize("what", ["smoothing", "float64", "shard"])
def test_scores_are_as_wide_as_before_where_something_else_than_the_kernel_takes_them(what):
    dtype = torch.float64 if what == "float64" else torch.float32
    shard = Shard(None, 0, 1, C, 0, C) if what == "shard" else None
    weights, smoothing = label_weights(LABELS), 0.1 if what == "smoothing" else 0.0
    mass = LabelMass(weights, smoothing)
    rows = Rows(torch.randn(C, D, generator=torch.Generator().manual_seed(3)).to(dtype), None)
    scored, want = (
        Scorer("exact", precision=precision, shard=shard).score(
            rows, hidden().to(dtype), LABELS, 1, mass=mass
        )
        for precision in ("bfloat16", "float32")
    )
    assert scored.grad.dtype == dtype
    torch.testing.assert_close(scored.loss_N, want.loss_N, rtol=0.03, atol=0.03)
    torch.testing.assert_close(scored.grad, want.grad, rtol=0.05, atol=0.05)


def test_bfloat16_products_stay_close_to_float32():
    full, half = make_head("exact"), make_head("exact")
    half.scorer.precision = "bfloat16"
    a, b = full.score(hidden(), LABELS, 1).loss_N, half.score(hidden(), LABELS, 1).loss_N
    assert not torch.equal(a, b)
    torch.testing.assert_close(a, b, rtol=0.03, atol=0.03)


def test_topk_equals_a_full_sort_and_pads():
    head = make_head("exact")
    scores, ids = head.topk(hidden(), 5)
    full = (hidden() @ head.weight.T + head.bias).sort(1, descending=True)
    assert torch.equal(ids, full.indices[:, :5])
    torch.testing.assert_close(scores, full.values[:, :5])
    scores, ids = head.topk(hidden(), C + 3)
    assert (ids[:, C:] == -1).all()
    assert torch.isneginf(scores[:, C:]).all()


def test_topk_among_candidates():
    head = make_head("exact")
    candidates = torch.tensor([[3, 1, -1, -1]] * N)
    scores, ids = head.topk(hidden(), 3, candidates_NA=candidates)
    full = hidden() @ head.weight.T + head.bias
    for row in range(N):
        best = [3, 1] if full[row, 3] > full[row, 1] else [1, 3]
        assert ids[row].tolist() == [*best, -1]
        torch.testing.assert_close(scores[row, :2], full[row, best])


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match="'mode' parameter of Scorer must be one of"):
        SampledHead(D, C, mode="magic")
    with pytest.raises(ConfigError, match="'selector' parameter of Scorer must be given"):
        SampledHead(D, C, mode="shared")
    with pytest.raises(ConfigError, match="'optimizer' parameter of SampledHead must be one of"):
        SampledHead(D, C, mode="exact", optimizer="sgd")
