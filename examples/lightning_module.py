"""A LightningModule with a fused `LSHSoftmaxLoss`, stopped half-way and resumed from its checkpoint.

The output layer updates its own rows in backward, so automatic optimization has one optimizer, of the body alone. What
the fused updates keep (moments and step counts) is no parameter: the two checkpoint hooks carry it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from slidex.nn import LSHSoftmaxLoss, SamplingOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH, ROWS = 64, 256


class Classifier(lightning.LightningModule):
    """Vectors to many classes."""

    def __init__(self, num_classes: int, options: SamplingOptions) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.head = LSHSoftmaxLoss(WIDTH, num_classes, options=options)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """The sampled loss."""
        x, y = batch
        return self.head(self.body(x), y)

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        """The exact loss, as Lightning puts modules into eval mode here; and how often the best class is right."""
        x, y = batch
        hidden = self.body(x)
        best = self.head.topk(hidden, 1).ids[:, 0]
        self.log_dict({"loss": self.head(hidden, y), "P@1": (best == y).float().mean()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Of the body; the head needs none."""
        return torch.optim.AdamW(self.body.parameters(), lr=3e-3)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the head's moments and step counts."""
        checkpoint["head_optimizer"] = self.head.optimizer_state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores them."""
        self.head.load_optimizer_state_dict(checkpoint["head_optimizer"])


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains an epoch, saves, resumes in a new module for another one; returns the validations."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--classes", type=int, default=20_000, help="number of classes")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of each of the two epochs")
    parser.add_argument("--pool-size", type=int, default=1024, help="negative classes in a step")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    directions = torch.randn(args.classes, WIDTH)
    loaders = [DataLoader(rows(directions, count), batch_size=ROWS) for count in (ROWS * args.steps, 1024)]
    options = SamplingOptions(pool_size=args.pool_size, optimizer="adam", learning_rate=0.01)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "half.ckpt")
        first, model = quiet_trainer(folder, epochs=1), Classifier(args.classes, options)
        results = {"before": first.validate(model, loaders[1], verbose=False)[0]}
        first.fit(model, *loaders)
        first.save_checkpoint(file)
        results["half"] = numbers(first)
        second, resumed = quiet_trainer(folder, epochs=2), Classifier(args.classes, options)
        second.fit(resumed, *loaders, ckpt_path=file, weights_only=True)
        results["end"] = numbers(second)
    for name, result in results.items():
        print(f"{name}: exact loss {result['loss']:.2f}, P@1 {result['P@1']:.1%}")
    stats = resumed.head.stats()
    print(f"{stats.updates} updates of the head, {second.global_step} steps of the body")
    return {**results, "updates": stats.updates, "steps": second.global_step}


def quiet_trainer(folder: str, epochs: int) -> lightning.Trainer:
    """On the CPU, without files and bars."""
    return lightning.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def numbers(trainer: lightning.Trainer) -> dict[str, float]:
    """What was logged last."""
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def rows(directions: torch.Tensor, count: int) -> TensorDataset:
    """Inputs (N, D) near their class's direction, and class ids; class c has a frequency of about 1 / (c + 1)."""
    ids = (len(directions) ** torch.rand(count)).long() - 1
    return TensorDataset(directions[ids] + 0.5 * torch.randn(count, WIDTH), ids)


if __name__ == "__main__":
    main()
