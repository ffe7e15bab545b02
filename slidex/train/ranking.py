"""Fits the linear ranker of a run on its training rows, when the network's weights no longer change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from slidex.errors import InterruptedRunError
from slidex.kernels.cpu import linear_fit
from slidex.lsh import make_index
from slidex.nn.class_groups import ClassGroups, distinct_groups, group_classes, group_labels
from slidex.nn.classifier import PREDICT_ROWS
from slidex.nn.known_classes import KnownClasses
from slidex.nn.ranker import class_pairs, known_classes, neighbor_search, row_tensors, without
from slidex.train.held_out import training_queries
from slidex.train.kept_ranker import KeptRanker, load_ranker, save_ranker
from slidex.train.rows import split_rows
from slidex.train.signals import SignalCatcher

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from slidex.data import CsrArrays, Dataset
    from slidex.kernels import LinearWeights
    from slidex.nn.classifier import Classifier
    from slidex.nn.ranker import ClassPairs, NeighborSearch
    from slidex.train.config import TrainConfig
    from slidex.train.run import Run

EXACT_CLASSES = 1 << 16
"""Up to so many that the network proposes from are all scored to find the candidates of the training rows; beyond, an
index proposes them."""
TABLES, INSERTED, EXTRA_CANDIDATES = 16, 64, 8
"""Of that index, with learned hash functions and inserted labels; and how many times what is wanted it is asked for."""
MORE_NEIGHBORS = 100
"""A class is fitted on the rows that have it among as many of the network's classes as are ranked, and so many more of
the neighbours': what looks like a class without being it is what to learn from."""
RARE = 30
"""The cost of a class with fewer true rows, n, is raised by sqrt(RARE / n): else its few errors cost too little to move
its weights."""
CENTROID, ORIGIN = 2.0, -1.0
"""Of `linear_fit`: where weights and bias are drawn to."""
MOST_GROUPS = 64
"""Groups that a row is a pair with at most, in fitting those: the groups of its first candidates."""


def fit_ranker(run: Run, dataset: Dataset, notify: Callable[[str, dict[str, Any]], None]) -> None:
    """Fits the ranker that the run's settings ask for and keeps it in the run, unless it is there already.

    Args:
        run: With the checkpoint that prediction will use.
        dataset: The one it was trained on.
        notify: Told of ``ranker``: ``stage`` ("candidates", in rows, then "weights", in classes, and "groups"),
            ``done``, ``total``.

    Raises:
        CheckpointError: It cannot be written.
        InterruptedRunError: After SIGTERM or Ctrl-C; nothing was kept, and resuming the run fits it anew.
    """
    config, checkpoint = run.config, run.checkpoint()
    kept = load_ranker(run.path)
    if kept is not None and kept.step == checkpoint.step:
        return
    rows, _ = split_rows(dataset, config)
    split = dataset.split("train")
    x, y = split.x.take(rows), split.y.take(rows)
    model = run.network(checkpoint)
    with SignalCatcher() as signals:

        def tell(stage: str, done: int, total: int) -> None:
            notify("ranker", {"stage": stage, "done": done, "total": total})
            if signals.received:
                raise InterruptedRunError(
                    f"stopped by {signals.received} while the ranker was fitted; the network is saved. "
                    f"Continue with: slidex train DATA --out {run.path} --resume"
                )

        search = neighbor_search(x, y) if config.ranker_neighbors else None
        propose = _proposer(model, dataset, config, run.class_counts())
        found_NA = _candidates(
            model, x, config, search, propose, lambda done: tell("candidates", done, x.num_rows)
        )
        x_rows = row_tensors(x.unit_rows())

        def fitted(stage: str, labels: CsrArrays, pairs: ClassPairs) -> LinearWeights:
            return linear_fit(
                *pairs,
                *x_rows,
                dataset.num_features,
                cost=config.ranker_cost * cost_factors(labels),
                centroid=CENTROID,
                origin=ORIGIN,
                tolerance=config.ranker_tolerance,
                threshold=config.ranker_threshold,
                progress=lambda done, total: tell(stage, done, total),
            )

        pairs, groups = class_pairs(y, found_NA), None
        weights = fitted("weights", y, pairs)
        if config.ranker_groups:
            group_C = group_classes(_hidden(model, x), y, config.ranker_groups, config.seed)
            labels = group_labels(group_C, y, int(group_C.max()) + 1)
            found_NB, _ = distinct_groups(
                group_C, torch.from_numpy(found_NA), min(MOST_GROUPS, found_NA.shape[1])
            )
            grouped = class_pairs(labels, found_NB.numpy())
            groups = ClassGroups(group_C, fitted("groups", labels, grouped))
    save_ranker(run.path, KeptRanker(checkpoint.step, len(rows), len(pairs.rows), weights, search, groups))


def cost_factors(labels: CsrArrays) -> torch.Tensor:
    """Factors of every class's cost: float32 (C,), ``sqrt(max(30 / n, 1))`` for a class with n true rows.

    Where most classes with one row are of that row alone, as names of files can be, those do not deserve it. In as many
    new rows such a class is expected ``2 N_2 / N_1`` times (N_n: classes with n rows; Good, Biometrika 1953), and its
    factor is also that of the root of this, if below 1.
    """
    counts_C = np.bincount(labels.indices, minlength=labels.num_columns)
    factors_C = np.sqrt(RARE / counts_C.clip(1, RARE))
    once_C = counts_C == 1
    again = (2 * np.count_nonzero(counts_C == 2) + 1) / (np.count_nonzero(once_C) + 1)  # ones: never 0
    factors_C[once_C] *= min(again, 1) ** 0.5
    return torch.from_numpy(factors_C.astype(np.float32))


def _candidates(
    model: Classifier,
    x: CsrArrays,
    config: TrainConfig,
    search: NeighborSearch | None,
    propose: Callable[[torch.Tensor], torch.Tensor],
    tell: Callable[[int], None],
) -> np.ndarray:
    """The classes that network and neighbours propose for training rows: int32 (N, A), padded with -1."""
    num_classes = model.head.num_classes
    count = min(config.ranker_candidates, num_classes)
    more = 0 if search is None else min(config.ranker_neighbors + MORE_NEIGHBORS, num_classes)
    found_NA = np.empty((x.num_rows, count + more), dtype=np.int32)
    for first in range(0, x.num_rows, PREDICT_ROWS):
        part = slice(first, min(first + PREDICT_ROWS, x.num_rows))
        with torch.no_grad():
            block = x.slice(part.start, part.stop)
            ids_NA = propose(model.encoder(block))
        if search is not None:
            found_NB = search.classes(block, more, torch.arange(part.start, part.stop))
            ids_NA = torch.cat([ids_NA, without(found_NB, ids_NA)], 1)
        found_NA[part] = ids_NA.numpy()
        tell(part.stop)
    return found_NA


def _hidden(model: Classifier, x: CsrArrays) -> torch.Tensor:
    """Hidden vectors of all rows."""
    with torch.no_grad():
        starts = range(0, x.num_rows, PREDICT_ROWS)
        return torch.cat([model.encoder(x.slice(n, min(n + PREDICT_ROWS, x.num_rows))) for n in starts])


def _proposer(
    model: Classifier, dataset: Dataset, config: TrainConfig, class_counts: np.ndarray
) -> Callable[[torch.Tensor], torch.Tensor]:
    """From hidden vectors to the network's best classes of each row, int64 (n, `ranker_candidates`).

    They are of the classes that it proposes from in prediction, unless an index finds them.
    """
    head = model.head
    count = min(config.ranker_candidates, head.num_classes)
    known_M = known_classes(class_counts, config.ranker_min_rows) if config.ranker_neighbors else None
    if known_M is None or count > len(known_M):
        known_M = torch.arange(head.num_classes)
    if len(known_M) <= EXACT_CLASSES:
        classes = KnownClasses.of(head, known_M)
        return lambda hidden_ND: classes.topk(hidden_ND, count)[1]
    index = make_index(
        "learned", head.in_features, head.num_classes, seed=config.seed, tables=TABLES, insert=INSERTED
    )
    queries = training_queries(model, dataset, np.empty(0, dtype=np.int64), None)
    index.build(head.weight, head.bias, queries=queries)

    def through_index(hidden_ND: torch.Tensor) -> torch.Tensor:
        candidates_NA = index.query(hidden_ND, EXTRA_CANDIDATES * count)
        return head.topk(hidden_ND, count, candidates_NA=candidates_NA)[1]

    return through_index
