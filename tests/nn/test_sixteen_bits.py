"""Training in bfloat16 on a GPU's path: rounded stochastically it learns as in float32, to nearest it stalls."""

from __future__ import annotations

import pytest
import torch

from slidex.kernels import reference
from slidex.nn import LSHSoftmaxLoss, SamplingOptions
from tests.nn.device_path import take_device_path

C, D, N, STEPS = 100, 32, 64, 400
RATES = {"adam": 3e-4, "rowwise_adam": 3e-4, "rowwise_adagrad": 3e-3}
pytestmark = pytest.mark.usefixtures("one_thread")


def train(
    optimizer: str, dtype: torch.dtype, mode: str, seed: int = 0, device: str = "cpu"
) -> tuple[float, float]:
    """The first loss and the mean of the last 20: noisy vectors, each near one of a hundred points."""
    generator = torch.Generator().manual_seed(seed)
    options = {"learning_rate": RATES[optimizer], "precision": "float32", "pool_size": 80, "seed": seed}
    head = LSHSoftmaxLoss(
        D,
        C,
        bias=True,
        device=device,
        dtype=dtype,
        options=SamplingOptions(mode=mode, optimizer=optimizer, **options),
    )
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 5)
    points_CD, losses = torch.randn(C, D, generator=generator), []
    for _ in range(STEPS):
        target_N = torch.randint(C, (N,), generator=generator)
        hidden_ND = points_CD[target_N] + torch.randn(N, D, generator=generator) / 2
        loss = head(hidden_ND.to(device), target_N.to(device))
        loss.backward()
        losses.append(float(loss.detach()))
    return losses[0], sum(losses[-20:]) / 20


@pytest.mark.parametrize(
    ("optimizer", "mode"),
    [("adam", "exact"), ("rowwise_adam", "shared"), ("rowwise_adagrad", "shared"), ("adam", "per_sample")],
)
def test_bfloat16_learns_what_float32_learns_and_rounded_to_nearest_it_does_not(monkeypatch, optimizer, mode):
    take_device_path(monkeypatch)
    (start, wide), (_, narrow) = (train(optimizer, dtype, mode) for dtype in (torch.float32, torch.bfloat16))
    monkeypatch.setattr(reference, "stochastic_round", lambda x, dtype, *_: x.to(dtype))
    _, nearest = train(optimizer, torch.bfloat16, mode)
    learned = start - wide
    assert learned > 1
    assert abs(narrow - wide) < 0.02 * learned
    assert nearest - wide > 0.15 * learned


def test_one_seed_is_one_training_and_another_seed_another(monkeypatch):
    take_device_path(monkeypatch)
    monkeypatch.setattr("tests.nn.test_sixteen_bits.STEPS", 30)
    losses = [train("adam", torch.bfloat16, "exact", seed) for seed in (0, 0)]
    assert losses[0] == losses[1]
    weights = []
    for seed in (0, 1):
        head = LSHSoftmaxLoss(
            D, C, dtype=torch.bfloat16, options=SamplingOptions(mode="exact", optimizer="adam", seed=seed)
        )
        with torch.no_grad():
            head.weight.fill_(1.0)
        head(torch.ones(N, D), torch.zeros(N, dtype=torch.long)).backward()
        weights.append(head.weight.detach().clone())
    assert not torch.equal(*weights)
