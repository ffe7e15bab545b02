"""Hidden vectors of training rows, for indexes that learn where queries lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from slidex.data.csr import CsrArrays
from slidex.lsh.index import QuerySample
from slidex.nn.classifier import PREDICT_ROWS
from slidex.train.settle import STREAM_QUERIES, counter_rng

if TYPE_CHECKING:
    from slidex.nn.encoder import BagEncoder
    from slidex.nn.sharding import Shard


def draw_queries(
    encoder: BagEncoder, x: CsrArrays, y: CsrArrays, rows: np.ndarray, count: int, *, seed: int, step: int
) -> QuerySample:
    """Hidden vectors of random training rows with their true classes, a function of seed, step and weights.

    Args:
        encoder: Run without dropout, in blocks of `PREDICT_ROWS`.
        x: Features of all training rows.
        y: Their true classes.
        rows: int64, the rows to draw from.
        count: Rows to draw; all of `rows` where there are no more.
        seed: Of the run.
        step: Steps taken so far.
    """
    rng = counter_rng(seed, STREAM_QUERIES, step)
    chosen = np.sort(rng.choice(rows, min(count, len(rows)), replace=False, shuffle=False))
    with torch.no_grad():
        blocks = [
            encoder(x.take(chosen[first : first + PREDICT_ROWS]))
            for first in range(0, len(chosen), PREDICT_ROWS)
        ]
    labels = y.take(chosen)
    return QuerySample(
        torch.cat(blocks), torch.from_numpy(labels.indptr), torch.from_numpy(labels.indices).long()
    )


def own_classes(sample: QuerySample, shard: Shard) -> QuerySample:
    """The same hidden vectors with those of their true classes that a process has, counted from its first."""
    labels = CsrArrays(sample.label_indptr.numpy(), sample.label_ids.numpy(), None, shard.num_classes)
    own = shard.local(labels)
    return QuerySample(
        sample.hidden_ND,
        torch.from_numpy(own.indptr),
        torch.from_numpy(own.indices).to(sample.label_ids.dtype),
    )
