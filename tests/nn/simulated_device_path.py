"""The head on a GPU's path with the CUDA kernels and tables, in the simulator, against the reference kernels."""

from __future__ import annotations

import pytest
import torch

from slidex import kernels
from slidex.kernels import OPTIMIZERS
from slidex.lsh import hash_index
from slidex.nn import LSHSoftmaxLoss, SamplingOptions
from slidex.nn import placement as placements
from slidex.nn.placement import Placement
from tests.nn.device_path import CPU, KERNELS

C, D, N = 40, 8, 3
DTYPES = (torch.float32, torch.bfloat16)
CASES = {
    "shared": {"pool_size": 10},
    "shared-dwta": {"pool_size": 10, "index": "dwta", "correction": "none"},
    "per_sample": {"mode": "per_sample", "active_size": 8},
    "exact": {"mode": "exact"},
}


@pytest.fixture
def take(monkeypatch):
    """Takes a path from now on: that of the CPU, or a GPU's with one kind of kernels."""

    def choose(path):
        module = {"cuda": kernels.get("cuda"), "reference": KERNELS}.get(path)
        monkeypatch.setattr(hash_index, "is_cuda", lambda _: module is not None)
        monkeypatch.setattr(
            placements,
            "place",
            lambda device: CPU if module is None else Placement(device, module, waits=False, dtypes=DTYPES),
        )

    return choose


def train(dtype=torch.float32, **options):
    """Losses, gradients of the input, and the rows after three steps, of which the second rehashes."""
    tables = {} if options["mode"] == "exact" else {"index_options": {"bits": 3, "tables": 3}}
    defaults = {"precision": "float32", "rehash_every": 1, "learning_rate": 0.05, **tables}
    head = LSHSoftmaxLoss(D, C, bias=True, dtype=dtype, options=SamplingOptions(**{**defaults, **options}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    seen = []
    for _ in range(3):
        hidden_ND = torch.randn(N, D, generator=generator).requires_grad_()
        target_NP = torch.randint(C, (N, 1), generator=generator)
        target_NP = torch.cat([target_NP, (target_NP + 3) % C], 1)
        target_NP[1, 0] = -1
        loss = head(hidden_ND, target_NP)
        loss.backward()
        seen += [loss.detach(), hidden_ND.grad]
    assert head.stats().index is None or head.stats().index.builds + head.stats().index.updates > 1
    return [*seen, head.weight.detach().float(), head.bias.detach().float()]


@pytest.mark.parametrize("case", CASES)
def test_cuda_kernels_take_the_steps_of_the_reference(take, case):
    options = {"mode": "shared", **CASES[case], "optimizer": "adam"}
    results = {}
    for path in ("cuda", "reference", "cpu"):
        take(path)
        results[path] = train(**options)
    others = (
        ["reference"] if case == "per_sample" else ["reference", "cpu"]
    )  # which draw equal votes otherwise
    for path in others:
        for mine, theirs in zip(results["cuda"], results[path], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_in_bfloat16(take, optimizer):
    results = []
    for path in ("cuda", "reference"):
        take(path)
        results.append(train(torch.bfloat16, mode="shared", pool_size=10, optimizer=optimizer))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2**-7, atol=1e-3)


def test_a_kernel_that_is_wrong_is_noticed(take, monkeypatch):
    options = {"mode": "shared", "pool_size": 10, "optimizer": "adam"}
    take("reference")
    want = train(**options)
    module = kernels.get("cuda")
    monkeypatch.setattr(module, "rows_update", lambda *_: None, raising=False)
    take("cuda")
    with pytest.raises(AssertionError):
        torch.testing.assert_close(train(**options)[-2], want[-2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["shared", "per_sample"])
def test_indexed_topk(take, case):
    best = []
    hidden_ND = torch.randn(N, D, generator=torch.Generator().manual_seed(9))
    for path in ("cuda", "reference"):
        take(path)
        torch.manual_seed(0)
        head = LSHSoftmaxLoss(D, C, options=SamplingOptions(index_options={"bits": 2, "tables": 3}))
        best.append([*head.topk(hidden_ND, 4, indexed=True, candidates=20), *head.topk(hidden_ND, 4)])
    for mine, theirs in zip(*best, strict=True):
        torch.testing.assert_close(mine, theirs)
