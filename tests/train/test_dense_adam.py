"""The dense parameters' Adam is torch's."""

from __future__ import annotations

import subprocess
import sys

import torch

from slidex.train.dense_adam import DenseAdam


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


def test_training_imports_neither_torchs_compiler_nor_scikit_learn() -> None:
    code = (
        "import sys, torch; from slidex.train import loop; from slidex.train.dense_adam import DenseAdam\n"
        "w = torch.zeros(2, requires_grad=True); w.sum().backward(); DenseAdam([w], 0.9, 0.999, 1e-8).step(0.1)\n"
        "assert w.tolist() != [0, 0]\n"
        "print([name for name in ('sklearn', 'torch._dynamo') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
