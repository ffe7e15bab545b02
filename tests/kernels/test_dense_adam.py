"""The dense parameters' Adam is torch's."""

from __future__ import annotations

import torch

from slidex.kernels.dense_adam import DenseAdam


def test_bit_for_bit_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(shape, generator=generator, requires_grad=True) for shape in ((7,), (33, 5), (2,))]
    theirs = [parameter.detach().clone().requires_grad_() for parameter in ours]
    adam = DenseAdam(ours, beta1=0.8, beta2=0.97, epsilon=1e-5)
    oracle = torch.optim.Adam(theirs, betas=(0.8, 0.97), eps=1e-5)
    for step in range(1, 20):
        for a, b in zip(ours[:2], theirs[:2], strict=True):  # the third never has a gradient
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        oracle.param_groups[0]["lr"] = 0.1 / step
        oracle.step()
        adam.step(0.1 / step)
        adam.zero_grad()
        assert all(parameter.grad is None for parameter in ours)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b), step
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        assert adam.state[a].keys() == oracle.state[b].keys()
        assert all(torch.equal(value, oracle.state[b][name]) for name, value in adam.state[a].items())
    assert ours[2] not in adam.state
