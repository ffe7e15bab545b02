"""The head on a GPU against one on the CPU, and that a step of it waits for nothing.

pytest does not collect this file by itself: `make gpu-check` runs it, and there must be a GPU.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch

from slidex.errors import ConfigError, DivergedError
from slidex.kernels import OPTIMIZERS
from slidex.nn import LSHSoftmaxLoss, SamplingOptions, memory
from tests.nn.test_sixteen_bits import train as train_slowly

DEVICE = "cuda"
C, D, N = 20_000, 96, 64
RATE = 0.01
CASES = {
    "shared": {},
    "shared-dwta": {"index": "dwta"},
    "shared-random": {"index": "none"},
    "per_sample-random": {"mode": "per_sample", "index": "none", "batch_share": 0.25},
    "exact": {"mode": "exact"},
}
"""Those for which both devices choose the same classes: of equal votes for a single row they draw others."""


def make_head(**options) -> LSHSoftmaxLoss:
    defaults = {"precision": "float32", "optimizer": "adam", "learning_rate": RATE, "rehash": "fixed"}
    torch.manual_seed(0)
    return LSHSoftmaxLoss(D, C, bias=True, options=SamplingOptions(**{**defaults, **options}))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    target_NP = torch.rand(N, 400, generator=generator).topk(3).indices * 50
    target_NP[::5, 1] = -1
    return torch.randn(N, D, generator=generator), target_NP


def train(head: LSHSoftmaxLoss, device: str, steps: int = 8) -> list[torch.Tensor]:
    seen = []
    for step in range(steps):
        hidden_ND, target_NP = (part.to(device) for part in batch(step))
        hidden_ND.requires_grad_()
        loss = head(hidden_ND, target_NP)
        loss.backward()
        seen += [loss.detach().cpu(), hidden_ND.grad.cpu()]
    return [*seen, head.weight.detach().cpu(), head.bias.detach().cpu()]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_are_those_of_the_cpu(case: str, optimizer: str) -> None:
    """Over one index, since a row that differs in its last bit may have another code at the next rehash."""
    here = make_head(**CASES[case], optimizer=optimizer, rehash_every=1000)
    there = copy.deepcopy(here).to(DEVICE)
    *mine, weight_CD, bias_C = train(there, DEVICE)
    *theirs, other_CD, other_C = train(here, "cpu")
    for got, want in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    for got, want in ((weight_CD, other_CD), (bias_C, other_C)):
        difference = (got - want).abs()  # Adam makes a whole step of a gradient that is all but 0
        assert difference.mean() < 1e-6
        assert difference.max() < RATE


@pytest.mark.parametrize("case", [*CASES, "per_sample"])
def test_same_bits_in_every_run(case: str) -> None:
    options = CASES.get(case, {"mode": case}) | {"rehash_every": 3}
    runs = [train(make_head(**options).to(DEVICE), DEVICE) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("mode", ["shared", "per_sample", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_waits_for_nothing(mode: str, dtype: torch.dtype) -> None:
    head = make_head(mode=mode, rehash_every=1000).to(DEVICE, dtype)
    batches = [tuple(part.to(DEVICE) for part in batch(step)) for step in range(4)]
    for hidden_ND, target_NP in batches[:2]:  # compiles, and builds the index
        head(hidden_ND.requires_grad_(), target_NP).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for hidden_ND, target_NP in batches[2:]:
            head(hidden_ND.requires_grad_(), target_NP).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(head.stats().active_classes)


def test_what_is_wrong_writes_nothing_and_is_told_later() -> None:
    head = make_head().to(DEVICE)
    train(head, DEVICE, steps=1)
    before = head.weight.clone()
    hidden_ND, target_NP = (part.to(DEVICE) for part in batch(1))
    hidden_ND[3, 1] = math.nan
    head(hidden_ND, target_NP).backward()
    assert torch.equal(head.weight, before)
    with pytest.raises(DivergedError, match="not finite"):
        head.stats()
    fresh = make_head(index="none").to(DEVICE)
    fresh(torch.randn(N, D, device=DEVICE), torch.full((N,), C, device=DEVICE)).backward()
    with pytest.raises(ConfigError, match="class ids from 0"):
        fresh.stats()


def test_bfloat16_weights_learn() -> None:
    head = make_head(learning_rate=0.05).to(DEVICE, torch.bfloat16)
    hidden_ND, target_NP = (part.to(DEVICE) for part in batch(0))
    losses = [head(hidden_ND, target_NP) for _ in range(30) if head(hidden_ND, target_NP).backward() is None]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("optimizer", "mode", "dtype"),
    [
        ("adam", "exact", torch.bfloat16),
        ("adam", "per_sample", torch.bfloat16),
        ("rowwise_adam", "shared", torch.bfloat16),
        ("rowwise_adagrad", "shared", torch.float16),
    ],
)
def test_steps_far_below_a_16_bit_weights_last_place_add_up(
    optimizer: str, mode: str, dtype: torch.dtype
) -> None:
    start, wide = train_slowly(optimizer, torch.float32, mode, device=DEVICE)
    _, narrow = train_slowly(optimizer, dtype, mode, device=DEVICE)
    assert abs(narrow - wide) < 0.02 * (start - wide)


def test_the_best_classes_are_those_of_the_cpu() -> None:
    here = make_head()
    hidden_ND, _ = batch(0)
    want = here.topk(hidden_ND, 5)
    got = here.to(DEVICE).topk(hidden_ND.to(DEVICE), 5)
    assert (got.ids.cpu() == want.ids).float().mean() > 0.999
    torch.testing.assert_close(got.scores.cpu(), want.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["shared", "per_sample", "exact"])
def test_the_memory_that_was_asked_for_is_enough(mode: str) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    options = SamplingOptions(mode=mode, optimizer="adam", precision="float32")
    head = LSHSoftmaxLoss(64, 300_000, bias=True, device=DEVICE, options=options)
    hidden_ND, target_N = torch.randn(128, 64, device=DEVICE), torch.arange(128, device=DEVICE)
    needed = head.weight.nbytes + head.bias.nbytes + sum(head._sampling.memory(bias=True).values())
    needed += memory.step_bytes(options, 64, 300_000, 128, 128)
    for _ in range(3):
        head(hidden_ND.requires_grad_(), target_N).backward()
    assert torch.cuda.max_memory_allocated() - before <= needed + memory._RESERVE
