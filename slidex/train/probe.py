"""The index's recall in training, measured against exact scoring now and then."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from slidex.train.settle import STREAM_PROBE, counter_rng

if TYPE_CHECKING:
    from slidex.train.loop import Trainer

PROBE_ROWS, PROBE_K = 256, 10
"""The probe: the exact top 10 of so many training rows (or of a batch, if that is smaller)."""
PROBE_SHARE = 0.02
"""The index's recall is probed against exact top-k as long as that takes no more than this share of the time."""


class RecallProbe:
    """Measures what share of a few rows' exact top 10 the index proposes for them as it does in training."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def recall(self, trainer: Trainer) -> float | None:
        """The share over all processes' classes; None without an index, or where probing has taken too long so far."""
        index, head, ranks = trainer.model.index, trainer.model.head, trainer.ranks
        budget = head.selector.retrieved if head.selector is not None else 0
        if index is None or ranks.on_main(
            lambda: budget == 0 or self._seconds > PROBE_SHARE * trainer.seconds
        ):
            return None
        started = time.perf_counter()
        rng = counter_rng(trainer.config.seed, STREAM_PROBE, 0)
        size = min(PROBE_ROWS, trainer.config.batch_size, len(trainer.rows))
        chosen = np.sort(rng.choice(trainer.rows, size, replace=False))
        with torch.no_grad():
            hidden_ND = trainer.model.encoder(trainer.train_split.x.take(chosen))
            _, exact_NK = head.topk(hidden_ND, PROBE_K)
        if head.shard is not None:  # each looks for its own classes
            own = (exact_NK >= head.shard.begin) & (exact_NK < head.shard.end)
            exact_NK = torch.where(own, exact_NK - head.shard.begin, -1)
        found = torch.zeros_like(exact_NK, dtype=torch.bool)
        if budget and head.mode == "shared":
            found = torch.isin(exact_NK, index.pool(hidden_ND, budget))
        elif budget:
            for row, proposed in enumerate(index.query(hidden_ND, budget)):
                found[row] = torch.isin(exact_NK[row], proposed)
        asked = exact_NK >= 0
        hits, wanted = ranks.totals(int((found & asked).sum()), int(asked.sum()))
        self._seconds += time.perf_counter() - started
        return hits / wanted
