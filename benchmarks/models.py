"""Trained models for the index benchmark: weights that moved as weights do, and the hidden vectors that query them.

Random rows flatter or damn an index for the wrong reasons: trained rows are clustered, differ in norm with class
frequency, and hidden vectors lie elsewhere than rows. A model is trained once for each set and kept in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.datasets import CACHE, load
from slidex.lsh import QuerySample
from slidex.train.config import TrainConfig
from slidex.train.loop import Trainer
from slidex.train.settle import settle

if TYPE_CHECKING:
    from pathlib import Path

    from slidex.data import Dataset

SETTINGS = {
    "eurlex-4k": {"pool_size": 1000, "batch_size": 128, "epochs": 8},
    "npm-deps-2017": {"epochs": 2},
    "site-packages": {"batch_size": 512, "max_steps": 3000, "learning_rate": 5e-3, "normalize": False},
    "deb-files-283k": {"epochs": 3, "pool_size": 8192},
    "deb-files-3m": {"epochs": 1, "pool_size": 8192},
}
"""How each model is trained, over the defaults of shared mode; uniform negatives, so that no index is favoured."""
TRAIN_ROWS, TEST_ROWS = 16_384, 2_048


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """The output layer, hidden vectors of random training rows with their labels, and those of test rows."""

    name: str
    weight_CD: torch.Tensor
    bias_C: torch.Tensor
    train: QuerySample
    test: QuerySample


def trained(name: str, data: Path) -> TrainedModel:
    """The trained model of the set `name`, from the cache or made now; ``random-N`` for `random_rows` of N classes."""
    if name.startswith("random-"):
        return random_rows(int(name.removeprefix("random-")))
    path = CACHE / "models" / f"{name}.pt"
    if not path.exists():
        dataset = load(name, data)
        config = TrainConfig(mode="shared", index="none", **SETTINGS[name])
        trainer = Trainer(dataset, settle(config, dataset), lambda *_: None)
        for batch_x, batch_y in trainer.batches():
            trainer.train_step(batch_x, batch_y)
        head = trainer.model.head
        parts = {"weight": head.weight.detach(), "bias": head.bias.detach()}
        for split, rows in (("train", TRAIN_ROWS), ("test", TEST_ROWS)):
            sample = _hidden(trainer, dataset, split, rows)
            parts |= {
                f"{split}.hidden": sample.hidden_ND,
                f"{split}.indptr": sample.label_indptr,
                f"{split}.ids": sample.label_ids,
            }
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(parts, path)
    parts = torch.load(path)
    samples = [
        QuerySample(parts[f"{split}.hidden"], parts[f"{split}.indptr"], parts[f"{split}.ids"])
        for split in ("train", "test")
    ]
    return TrainedModel(name, parts["weight"], parts["bias"], *samples)


def random_rows(num_classes: int, width: int = 128) -> TrainedModel:
    """Gaussian rows, for what an index costs at a size; hidden vectors are rows with noise, labelled by them."""
    generator = torch.Generator().manual_seed(0)
    weight_CD = torch.randn(num_classes, width, generator=generator)
    bias_C = 0.1 * torch.randn(num_classes, generator=generator)
    ids = torch.randint(num_classes, (TEST_ROWS,), generator=generator)
    hidden_ND = weight_CD[ids] + torch.randn(TEST_ROWS, width, generator=generator)
    sample = QuerySample(hidden_ND, torch.arange(TEST_ROWS + 1), ids)
    return TrainedModel(f"random-{num_classes}", weight_CD, bias_C, sample, sample)


def _hidden(trainer: Trainer, dataset: Dataset, split_name: str, count: int) -> QuerySample:
    split = dataset.split(split_name)
    rng = np.random.Generator(np.random.Philox(key=[0, 2]))
    labelled = np.flatnonzero(np.diff(split.y.indptr))
    rows = np.sort(rng.choice(labelled, min(count, len(labelled)), replace=False))
    with torch.no_grad():
        hidden_ND = trainer.model.encoder(split.x.take(rows))
    y = split.y.take(rows)
    return QuerySample(
        hidden_ND, torch.from_numpy(y.indptr.astype(np.int64)), torch.from_numpy(y.indices.astype(np.int64))
    )
