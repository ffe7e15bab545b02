"""A bare torch loop with `slidex.nn.LSHSoftmaxLoss` as output layer and loss.

The data are made here: each class has a direction, its rows point there with noise, and classes are as unequally
frequent as words are. Two runs of the same loop: gradients for an optimizer of torch's, and fused row updates.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import torch
from torch import nn

from slidex.nn import LSHSoftmaxLoss, SamplingOptions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

WIDTH, ROWS = 64, 256


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains twice; returns what it prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--classes", type=int, default=100_000, help="number of classes")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of each run")
    parser.add_argument("--pool-size", type=int, default=2048, help="negative classes in a step")
    args = parser.parse_args(arguments)
    options = {
        # Sparse gradients hold the touched rows alone. SGD, Adagrad and SparseAdam take them.
        "gradients": SamplingOptions(pool_size=args.pool_size, sparse_grad=True),
        # Fused: backward updates the touched rows at once, with an Adam of the kernels' own.
        "fused": SamplingOptions(pool_size=args.pool_size, optimizer="adam", learning_rate=0.01),
    }
    results = {name: train(setting, args.classes, args.steps) for name, setting in options.items()}
    for name, result in results.items():
        print(f"{name}: loss {result['first']:.2f} -> {result['last']:.2f}, P@1 {result['P@1']:.1%}")
    return results


def train(options: SamplingOptions, num_classes: int, steps: int) -> dict[str, float]:
    """One run: exact loss on held-out rows before and after, and the share of them whose best class is right."""
    torch.manual_seed(0)
    directions = torch.randn(num_classes, WIDTH)
    body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    head = LSHSoftmaxLoss(WIDTH, num_classes, options=options)
    optimizers = [torch.optim.AdamW(body.parameters(), lr=3e-3)]
    if options.optimizer is None:
        optimizers.append(torch.optim.SparseAdam(head.parameters(), lr=0.01))
    ((test_x, test_y),) = batches(directions, 1, seed=1)

    model = nn.ModuleList([body, head])
    first = evaluate(model, test_x, test_y)["loss"]
    for x, y in batches(directions, steps, seed=2):
        loss = head(body(x), y)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    last = evaluate(model, test_x, test_y)
    return {"first": first, "last": last["loss"], "P@1": last["P@1"]}


@torch.no_grad()
def evaluate(model: nn.ModuleList, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """The loss, over all classes in eval mode, and the share of rows whose best class is right."""
    body, head = model.eval()
    hidden = body(x)
    best = head.topk(hidden, 1).ids[:, 0]
    result = {"loss": head(hidden, y).item(), "P@1": (best == y).float().mean().item()}
    model.train()
    return result


def batches(directions: torch.Tensor, count: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs (N, D) and class ids (N,)."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        uniform = torch.rand(ROWS, generator=generator)
        ids = (len(directions) ** uniform).long() - 1  # class c with a frequency of about 1 / (c + 1)
        yield directions[ids] + 0.5 * torch.randn(ROWS, directions.shape[1], generator=generator), ids


if __name__ == "__main__":
    main()
