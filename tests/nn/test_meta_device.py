"""A step of the head where tensors have no values: all of it is on the layer's device, and none of it is read."""

from __future__ import annotations

import pytest
import torch

from slidex.kernels import OPTIMIZERS
from slidex.nn import LSHSoftmaxLoss, SamplingOptions

pytest.importorskip("numba_cuda", reason="numba-cuda is installed on Linux x86-64 only (extra dev)")

from tests.nn.meta_device import META, meta_device

C, D, N = 500, 16, 6
COUNTS = list(range(1, C + 1))
CASES = {
    "shared": {},
    "shared-dwta": {"index": "dwta"},
    "shared-logq": {"index": "exact", "correction": "logq", "random_power": 0.5, "class_counts": COUNTS},
    "per_sample": {"mode": "per_sample"},
    "per_sample-power": {
        "mode": "per_sample",
        "correction": "stratified",
        "batch_share": 0.2,
        "random_power": 0.5,
        "class_counts": COUNTS,
    },
    "exact": {"mode": "exact"},
}
HOT = {"shared": "update_rows", "per_sample": "update_groups", "exact": "update_rows"}
TARGETS = {
    "ids": torch.zeros(N, dtype=torch.int64, device=META),
    "padded": torch.zeros(N, 3, dtype=torch.int32, device=META),
    "of the host": torch.arange(N),
}


def step(case, target, *, dtype=torch.float32, smoothing=0.0, reduction="mean", weighted=False, **options):
    """The head, its loss and the gradient of its input after a step, and the names of the kernels."""
    with meta_device() as launches:
        head = LSHSoftmaxLoss(
            D,
            C,
            bias=True,
            device=META,
            dtype=dtype,
            reduction=reduction,
            label_smoothing=smoothing,
            weight=torch.ones(C, device=META) if weighted else None,
            options=SamplingOptions(**{"precision": "float32", **CASES[case], **options}),
        )
        hidden_ND = torch.zeros(N, D, device=META, dtype=dtype).requires_grad_()
        loss = head(hidden_ND, TARGETS[target])
        loss.backward(torch.ones_like(loss))
    return head, loss, hidden_ND.grad, {launch.kernel.name for launch in launches}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_fused_step(case, target, dtype, optimizer):
    head, loss, grad_ND, kernels = step(case, target, dtype=dtype, optimizer=optimizer)
    assert (loss.device, loss.dtype) == (META, torch.float32)
    assert (grad_ND.device, grad_ND.dtype) == (META, dtype)
    assert HOT[head.options.mode] in kernels
    state = head._sampling._updater.tensors()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert {tensor.device for tensor in state.values()} == {META}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_argument(case, reduction, smoothing, precision):
    _, loss, grad_ND, _ = step(
        case,
        "padded",
        reduction=reduction,
        smoothing=smoothing,
        precision=precision,
        weighted=smoothing > 0,
        optimizer="adam",
    )
    assert loss.shape == ((N,) if reduction == "none" else ())
    assert grad_ND.shape == (N, D)


@pytest.mark.parametrize("case", ["shared", "shared-logq", "exact"])
@pytest.mark.parametrize("sparse_grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_for_an_optimizer_of_ones_own(case, sparse_grad, dtype):
    head, _, _, _ = step(case, "padded", dtype=dtype, sparse_grad=sparse_grad)
    for parameter in head.parameters():
        assert (parameter.grad.device, parameter.grad.dtype) == (META, dtype)
        assert parameter.grad.is_sparse == sparse_grad


def test_what_reads_a_result_or_mixes_devices_would_fail():
    with meta_device(), pytest.raises(RuntimeError, match="meta"):
        int(torch.zeros((), device=META))
    with meta_device(), pytest.raises(RuntimeError, match=r"device|meta"):
        torch.zeros(3, device=META) + torch.zeros(3)
    with meta_device(), pytest.raises(NotImplementedError, match="meta"):
        torch.zeros(3, device=META).nonzero()
