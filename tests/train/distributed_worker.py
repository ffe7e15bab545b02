"""One process of tests/train/test_distributed.py: ``distributed_worker.py RANK SIZE FILE DATA JOBS``.

JOBS is JSON: a list of [directory, settings, resume]. Errors are printed. After each job, what all processes keep must
have the same bits in all of them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import slidex
from slidex.errors import SlidexError
from slidex.nn.sharding import Peers
from slidex.train import loop
from slidex.train.distributed import Ranks


class KeptTrainer(loop.Trainer):
    """The last one made can be looked at; gets a signal in one process after a step, if asked to."""

    last: KeptTrainer
    signal_after: int | None = None
    measured = 0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        KeptTrainer.last = self

    def train_step(self, *batch: Any) -> None:
        before, sizes = (Peers.reduce, Peers.gather), []
        Peers.reduce = lambda peers, x, op="sum": sizes.append(x.nbytes) or before[0](peers, x, op)
        Peers.gather = lambda peers, x: sizes.append(x.nbytes * peers.size) or before[1](peers, x)
        super().train_step(*batch)
        Peers.reduce, Peers.gather = before
        rows, config, encoder = batch[0].num_rows, self.config, self.model.encoder
        if rows % self.ranks.size == 0:  # docs/training.md has the table
            weights = sum(parameter.numel() for parameter in encoder.dense.parameters())
            scores = 4 * rows if config.loss == "softmax" else rows
            assert sum(sizes) == 4 * (
                2 * rows * encoder.out_features + scores + rows * config.hidden_width + weights
            )
            KeptTrainer.measured += 1
        if self.step == KeptTrainer.signal_after and self.ranks.rank == 1:
            signal.raise_signal(signal.SIGTERM)


class Told:
    """Remembers events."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def __call__(self, event: str, _facts: dict[str, Any]) -> None:
        self.events.append(event)


def replicas_are_equal(peers: Peers) -> None:
    trainer = KeptTrainer.last
    kept = [*trainer.model.encoder.state_dict().values(), *trainer.model.encoder.bag_state]
    kept += [value for state in trainer.dense_optimizer.state.values() for value in state.values()]
    assert len(kept) > 6
    for tensor in kept:
        assert all(torch.equal(tensor, other) for other in peers.gather(tensor))


def main(rank: int, size: int, file: str, data: str, jobs: str) -> None:
    warnings.simplefilter("error")
    loop.Trainer = KeptTrainer
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=size, timeout=timedelta(seconds=120)
    )
    dataset = slidex.Dataset.open(data)
    for out, settings, resume in json.loads(jobs):
        KeptTrainer.signal_after = settings.pop("signal_after", None)
        config = slidex.TrainConfig.from_mapping(settings)
        told = Told()
        try:
            slidex.fit(dataset, out, config, resume=resume, notify=told, processes=Ranks())
        except SlidexError as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        assert not told.events or rank == 0
        if KeptTrainer.last.step:
            replicas_are_equal(Peers.of_group())
    assert KeptTrainer.measured > 0
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
