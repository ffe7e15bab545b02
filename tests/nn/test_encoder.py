"""The embedding bag encoder against plain torch, and its dropout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slidex.data import CsrArrays
from slidex.kernels import StepSettings
from slidex.nn.encoder import BagEncoder

X = CsrArrays(
    np.array([0, 2, 2, 5]), np.array([1, 4, 0, 1, 6], np.int32), np.array([3, 4, 1, 2, -2], np.float32), 7
)


def dense(x: CsrArrays) -> torch.Tensor:
    return torch.from_numpy(x.to_scipy().toarray())


@pytest.mark.parametrize("dense_widths", [(), (6,), (6, 3)])
@pytest.mark.parametrize("normalize", [False, True])
def test_forward_equals_plain_torch(dense_widths, normalize):
    encoder = BagEncoder(7, 5, dense_widths=dense_widths, normalize=normalize, seed=1)
    inputs = dense(X)
    if normalize:
        inputs = torch.nn.functional.normalize(inputs, dim=1)
    expected = torch.relu(inputs @ encoder.bag + encoder.bias)
    for layer in encoder.dense:
        expected = torch.relu(layer(expected))
    torch.testing.assert_close(encoder(X), expected)
    assert encoder.out_features == expected.shape[1]


def test_backward_moves_touched_rows_as_sparse_adam_does():
    encoder = BagEncoder(7, 5, dense_widths=(4,), normalize=False, seed=1)
    bag = encoder.bag.detach().clone().requires_grad_()
    hidden = torch.relu(encoder.dense[0](torch.relu(dense(X) @ bag + encoder.bias)))
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    hidden.backward(upstream)
    expected_dense = encoder.dense[0].weight.grad.clone()
    encoder.zero_grad()
    bag.grad = bag.grad.to_sparse(1)
    torch.optim.SparseAdam([bag], lr=0.1).step()

    before = encoder.bag.clone()
    got, graph = encoder.forward_train(X, step=1)
    encoder.backward(graph, upstream, StepSettings(learning_rate=0.1, step=1))
    torch.testing.assert_close(got, hidden.detach())
    torch.testing.assert_close(encoder.dense[0].weight.grad, expected_dense)
    torch.testing.assert_close(encoder.bag.data, bag.detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(encoder.bag[2], before[2])  # no row has feature 2


def test_the_bag_has_the_optimizer_that_was_asked_for():
    encoder = BagEncoder(7, 5, normalize=False, optimizer="rowwise_adagrad", seed=1)
    before = encoder.bag.clone()
    _, graph = encoder.forward_train(X, step=1)
    encoder.backward(graph, torch.ones(3, 5), StepSettings(learning_rate=0.1, step=1))
    assert encoder.bag_state.moment1.numel() == 0
    gradient = dense(X).T @ (graph.bag_ND + encoder.bias > 0).float()
    expected = before - 0.1 * gradient / (gradient.square().mean(1, keepdim=True).sqrt() + 1e-8)
    torch.testing.assert_close(encoder.bag.data, expected.detach())


@pytest.mark.parametrize("which", ["input_dropout", "hidden_dropout"])
def test_dropout_is_a_function_of_the_step_and_keeps_the_mean(which):
    encoder = BagEncoder(7, 64, **{which: 0.4}, normalize=False, seed=1)
    plain = encoder(X)
    assert torch.equal(encoder(X, step=3), encoder(X, step=3))
    assert not torch.equal(encoder(X, step=3), encoder(X, step=4))
    assert not torch.equal(encoder(X, step=3), plain)
    if which == "hidden_dropout":
        mean = torch.stack([encoder(X, step=s) for s in range(400)]).mean(0)
        torch.testing.assert_close(mean, plain, rtol=0.35, atol=0.2)


def test_an_empty_row_gives_the_bias_alone():
    encoder = BagEncoder(7, 5, seed=1)
    encoder.bias.data.fill_(0.5)
    assert torch.equal(encoder(X)[1].detach(), torch.full((5,), 0.5))


def test_rows_of_ones_without_stored_values():
    ones = CsrArrays(X.indptr, X.indices, None, 7)
    stored = CsrArrays(X.indptr, X.indices, np.ones(5, np.float32), 7)
    encoder = BagEncoder(7, 5, seed=1)
    torch.testing.assert_close(encoder(ones), encoder(stored))
