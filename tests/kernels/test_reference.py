"""The oracle's own oracle: every reference formula against torch's operators, autograd and optimisers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from slidex.kernels import RowState, StepSettings, reference
from tests.kernels.cases import Problem, Shape

DOUBLE = torch.float64


def _close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def _upstream(loss_N: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1.5, 2.0, len(loss_N), dtype=DOUBLE)


@pytest.mark.parametrize("optional", [True, False])
def test_embedding_bag_is_torch_embedding_bag(optional: bool) -> None:
    indptr, ids, values, weight, bias = Problem(Shape(optional=optional)).arguments("embedding_bag", DOUBLE)
    want = F.embedding_bag(
        ids.long(), weight, indptr, mode="sum", per_sample_weights=values, include_last_offset=True
    )
    _close(reference.embedding_bag(indptr, ids, values, weight, bias), want + bias if optional else want)


@pytest.mark.parametrize("optional", [True, False])
def test_softmax_loss_is_cross_entropy_with_soft_targets(optional: bool) -> None:
    logits, target, offset = Problem(Shape(optional=optional)).arguments("softmax_loss", DOUBLE)
    active = logits.isfinite()
    loss, grad = reference.softmax_loss(logits, target, offset)
    upstream = _upstream(loss)
    for n in range(len(logits)):
        scores = logits[n, active[n]].requires_grad_()
        adjusted = scores if offset is None else scores + offset[n, active[n]]
        want = F.cross_entropy(adjusted[None], target[n, active[n]][None]) if len(scores) else adjusted.sum()
        (want * upstream[n]).backward()
        _close(loss[n], want.detach())
        _close((grad * upstream[:, None])[n, active[n]], scores.grad)
    assert grad[~active].eq(0).all()


@pytest.mark.parametrize("optional", [True, False])
def test_logistic_loss_is_binary_cross_entropy(optional: bool) -> None:
    logits, target, weight = Problem(Shape(optional=optional)).arguments("logistic_loss", DOUBLE)
    active = logits.isfinite()
    loss, grad = reference.logistic_loss(logits, target, weight)
    upstream = _upstream(loss)
    scores = logits.masked_fill(~active, 0).requires_grad_()
    want = F.binary_cross_entropy_with_logits(scores, target, weight, reduction="none")
    want = want.masked_fill(~active, 0).sum(1)
    (want * upstream).sum().backward()
    _close(loss, want.detach())
    _close(grad * upstream[:, None], scores.grad)


def test_shared_losses_are_the_dense_losses_on_the_pool() -> None:
    for name in ("shared_softmax_loss", "shared_logistic_loss"):
        logits, indptr, positions, weights, extra = Problem(Shape()).arguments(name, DOUBLE)
        target = torch.zeros_like(logits)
        for n in range(len(logits)):
            for j in range(int(indptr[n]), int(indptr[n + 1])):
                target[n, int(positions[j])] = weights[j]
        scores = logits.clone().requires_grad_()
        if "softmax" in name:
            want = F.cross_entropy(scores + extra, target, reduction="none")
        else:
            want = F.binary_cross_entropy_with_logits(
                scores, target, extra.expand_as(scores), reduction="none"
            )
            want = want.sum(1)
        upstream = _upstream(want)
        (want * upstream).sum().backward()
        _close(getattr(reference, name)(logits, indptr, positions, weights, extra), want.detach())
        _close(logits * upstream[:, None], scores.grad)


def test_hidden_gradient_is_autograd_of_the_logits() -> None:
    hidden, weight, bias, active = Problem(Shape()).arguments("pair_logits", DOUBLE)
    grad = torch.randn(active.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    hidden.requires_grad_()
    every_NC = F.linear(hidden, weight, bias)
    picked = every_NC.gather(1, active.clamp(min=0))
    _close(reference.pair_logits(hidden, weight, bias, active)[active >= 0], picked[active >= 0])
    picked.backward(grad.masked_fill(active < 0, 0))
    _close(reference.pair_hidden_grad(grad, weight, active), hidden.grad)


def _dense_gradients(active: torch.Tensor, grad: torch.Tensor, hidden: torch.Tensor, classes: int):
    scores_NC = torch.zeros(len(active), classes + 1, dtype=DOUBLE)
    scores_NC.scatter_add_(1, active.where(active >= 0, classes), grad)  # pads land in a column of their own
    return scores_NC[:, :-1].T @ hidden, scores_NC[:, :-1].sum(0)


def test_updates_are_sparse_adam_over_several_steps() -> None:
    grad, hidden, active, weight, bias, *_ = Problem(Shape(slots=20)).arguments("pair_update", DOUBLE)
    parameters = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    optimiser = torch.optim.SparseAdam(parameters, lr=0.02, betas=(0.8, 0.9), eps=1e-6)
    states = RowState.zeros_like(weight), RowState.zeros_like(bias)
    for step in range(1, 4):
        kept = active.clone()
        kept[step:] = -1  # so that rows drop out: their moments must not decay
        touched = kept[kept >= 0].unique()
        for parameter, dense in zip(
            parameters, _dense_gradients(kept, grad, hidden, len(weight)), strict=True
        ):
            parameter.grad = torch.sparse_coo_tensor(
                touched[None], dense[touched], parameter.shape, check_invariants=True
            )
        optimiser.step()
        settings = StepSettings(learning_rate=0.02, beta1=0.8, beta2=0.9, epsilon=1e-6, step=step)
        reference.pair_update(grad, hidden, kept, weight, bias, *states, settings)
        _close(weight, parameters[0].detach())
        _close(bias, parameters[1].detach())


def test_weight_decay_is_adamw_where_every_row_is_touched() -> None:
    indptr, ids = torch.tensor([0, 3]), torch.arange(3, dtype=torch.int32)
    weight = torch.linspace(-1, 1, 12, dtype=DOUBLE).view(3, 4)
    parameter = weight.clone().requires_grad_()
    optimiser = torch.optim.AdamW([parameter], lr=0.05, eps=0.0, weight_decay=0.3)
    state = RowState.zeros_like(weight)
    grad = torch.tensor([[0.5, -1.0, 2.0, 0.1]], dtype=DOUBLE)
    for step in range(1, 4):
        parameter.grad = grad.expand(3, 4).clone()
        optimiser.step()
        settings = StepSettings(learning_rate=0.05, epsilon=0.0, weight_decay=0.3, step=step)
        reference.embedding_bag_update(indptr, ids, None, grad, weight, state, settings)
        _close(weight, parameter.detach())


SPARSE = {
    "adam": lambda weight: torch.optim.SparseAdam([weight], lr=0.05, betas=(0.8, 0.9), eps=1e-3),
    "rowwise_adam": lambda weight: torch.optim.SparseAdam([weight], lr=0.05, betas=(0.8, 0.9), eps=1e-3),
    "rowwise_adagrad": lambda weight: torch.optim.Adagrad([weight], lr=0.05, eps=1e-3),
}


@pytest.mark.parametrize("optimizer", SPARSE)
def test_rowwise_rules_are_torchs_where_a_rows_gradient_has_one_magnitude(optimizer: str) -> None:
    """The mean square of a row is then each entry's square, and torch's optimisers are the oracle."""
    rng = torch.Generator().manual_seed(8)
    weight = torch.randn(6, 4, dtype=DOUBLE, generator=rng)
    parameter = weight.clone().requires_grad_()
    torch_optimizer = SPARSE[optimizer](parameter)
    state = RowState.zeros_like(weight, optimizer)
    no_bias = torch.zeros(6, dtype=DOUBLE)
    for step in range(1, 5):
        ids = torch.randperm(6, generator=rng)[:4]
        signs = torch.randint(0, 2, (4, 4), generator=rng) * 2 - 1
        grad = torch.rand(4, 1, dtype=DOUBLE, generator=rng) * signs
        parameter.grad = torch.sparse_coo_tensor(ids[None], grad, (6, 4), check_invariants=True)
        with torch.sparse.check_sparse_tensor_invariants():  # Adagrad warns of what it leaves unsaid
            torch_optimizer.step()
        settings = StepSettings(learning_rate=0.05, beta1=0.8, beta2=0.9, epsilon=1e-3, step=step)
        bias_state = RowState.zeros_like(no_bias, optimizer)
        reference.rows_update(ids, grad, no_bias[:4], weight, no_bias, state, bias_state, settings)
        _close(weight, parameter.detach())


def test_rowwise_rules_take_the_mean_square_of_a_row() -> None:
    grad = torch.tensor([[3.0, -4.0, 0.0, 5.0]], dtype=DOUBLE)  # mean square 12.5
    for optimizer, moment2 in (("rowwise_adam", 0.1 * 12.5), ("rowwise_adagrad", 12.5)):
        weight, state = grad * 0, RowState.zeros_like(grad, optimizer)
        settings = StepSettings(learning_rate=0.5, step=1, beta2=0.9, epsilon=0.0)
        indptr, ids = torch.tensor([0, 1]), torch.tensor([0], dtype=torch.int32)
        reference.embedding_bag_update(indptr, ids, None, grad, weight, state, settings)
        _close(state.moment2, torch.full((1, 1), moment2, dtype=DOUBLE))
        _close(weight, -0.5 * grad / 12.5**0.5)


@pytest.mark.parametrize("optimizer", SPARSE)
def test_a_bias_has_a_state_of_its_own_for_each_entry(optimizer: str) -> None:
    bias = torch.linspace(-1, 1, 5, dtype=DOUBLE)
    parameter = bias.clone().requires_grad_()
    torch_optimizer = SPARSE[optimizer](parameter)
    state = RowState.zeros_like(bias, optimizer)
    weight = torch.zeros(5, 0, dtype=DOUBLE)
    ids, grad = torch.tensor([3, 0, 4]), torch.tensor([0.5, -2.0, 0.1], dtype=DOUBLE)
    for step in range(1, 5):
        parameter.grad = torch.sparse_coo_tensor(ids[None], grad, (5,), check_invariants=True)
        with torch.sparse.check_sparse_tensor_invariants():
            torch_optimizer.step()
        settings = StepSettings(learning_rate=0.05, beta1=0.8, beta2=0.9, epsilon=1e-3, step=step)
        reference.rows_update(
            ids, weight[:3], grad, weight, bias, RowState.zeros_like(weight), state, settings
        )
        _close(bias, parameter.detach())
