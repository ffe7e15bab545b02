"""The whole model: encoder, output layer, and the index over the output layer's rows.

Legend: N rows, C classes, D hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from slidex.errors import ConfigError, DataError
from slidex.lsh import ClassSampler, exact_topk_and_total, index_settings, make_index
from slidex.nn.candidates import CandidateSelector
from slidex.nn.encoder import BagEncoder
from slidex.nn.head import SampledHead
from slidex.nn.partition import PARTITION_CANDIDATES, PARTITION_CLASSES, PartitionEstimator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from slidex.data.csr import CsrArrays
    from slidex.lsh import CandidateIndex
    from slidex.train.config import TrainConfig

PREDICT_ROWS = 512
"""Rows scored at once in prediction."""
SHARED_TABLES = 8
"""Hash tables in training where the whole batch votes, unless `index_options` say otherwise (docs/performance.md)."""
PREDICT_CANDIDATES = 1024
"""Classes asked of the index for each row in indexed prediction, unless the index was tuned."""


@dataclass(frozen=True, slots=True)
class Classifier:
    """Encoder and head with the index over the head's rows.

    Args:
        encoder: Sparse features to hidden vectors.
        head: Hidden vectors to classes.
        index: Over ``[head.weight, head.bias]``; None in exact mode or with random classes only.
        candidates: Classes asked of the index for each row in indexed prediction.
        partition_classes: Random classes from which indexed prediction estimates the partition function.
    """

    encoder: BagEncoder
    head: SampledHead
    index: CandidateIndex | None
    candidates: int = PREDICT_CANDIDATES
    partition_classes: int = PARTITION_CLASSES

    @classmethod
    def from_config(
        cls, config: TrainConfig, num_features: int, num_classes: int, class_counts: np.ndarray
    ) -> Classifier:
        """A model with initial weights.

        Args:
            config: With `mode`, `precision` and `correction` other than ``auto``; no `batch_share` means 0.
            num_features: F.
            num_classes: C.
            class_counts: int64 (C,), training frequency of every class.
        """
        encoder = BagEncoder(
            num_features,
            config.hidden_width,
            dense_widths=config.dense_widths,
            input_dropout=config.input_dropout,
            hidden_dropout=config.hidden_dropout,
            normalize=config.normalize,
            optimizer=config.optimizer,
            seed=config.seed,
        )
        index = None
        if config.mode != "exact":
            index = make_config_index(_for_training(config), encoder.out_features, num_classes)
        negatives = config.pool_size if config.mode == "shared" else config.active_size
        batch = round(negatives * (config.batch_share or 0.0))
        random = negatives - batch if index is None else round(negatives * config.random_share)
        selector = None
        if config.mode != "exact":
            selector = CandidateSelector(
                num_classes,
                index=index,
                sampler=ClassSampler(num_classes, class_counts, config.random_power, seed=config.seed + 3),
                retrieved=max(0, negatives - random - batch),
                random=random,
                batch=batch,
                correction=config.correction,
                class_counts=class_counts,
                seed=config.seed + 4,
            )
        head = SampledHead(
            encoder.out_features,
            num_classes,
            mode=config.mode,
            loss=config.loss,
            precision=config.precision,
            selector=selector,
            optimizer=config.optimizer,
            seed=config.seed + 1,
        )
        return cls(encoder, head, index)

    def topk(
        self, x: CsrArrays, k: int, *, indexed: bool = False
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Scores float32 (n, k) and class ids int64 (n, k) of the best classes, for consecutive blocks of rows.

        Args:
            x: Rows of features.
            k: Classes per row.
            indexed: Score only the classes that the index returns; otherwise all classes.

        Raises:
            DataError: if `x` has another number of features than the model.
            ConfigError: if `indexed` is asked of a model without an index.
        """
        for scores_NK, ids_NK, _ in self.ranked(x, k, indexed=indexed):
            yield scores_NK, ids_NK

    def ranked(
        self,
        x: CsrArrays,
        k: int,
        *,
        indexed: bool = False,
        totals: bool = False,
        estimator: PartitionEstimator | None = None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """As `topk`, with the log of the softmax's partition function float32 (n,) of each block if asked for.

        Args:
            x: Rows of features.
            k: Classes per row.
            indexed: Score only the classes that the index returns; otherwise all classes.
            totals: Give the partition function: over all classes, or with `indexed` the estimate of
                `PartitionEstimator`, for which at least `PARTITION_CANDIDATES` classes are asked of the index (and
                ranked). Without, the third item is None.
            estimator: From `partition_estimator`, where calls are many; None makes one for this call.

        Raises:
            DataError: if `x` has another number of features than the model.
            ConfigError: if `indexed` is asked of a model without an index, or with one that is not built.
        """
        if x.num_columns != self.encoder.bag.shape[0]:
            raise DataError(
                f"the data have {x.num_columns:,} features; the model was trained on {self.encoder.bag.shape[0]:,}."
            )
        index = self.index if indexed else None
        if indexed and index is None:
            raise ConfigError("Indexed prediction needs a model with an index.")
        if indexed and totals and estimator is None:
            estimator = self.partition_estimator(k)
        for start in range(0, x.num_rows, PREDICT_ROWS):
            rows = x.take(np.arange(start, min(start + PREDICT_ROWS, x.num_rows)))
            with torch.no_grad():
                hidden_ND = self.encoder(rows)
                if index is not None:
                    yield self._best_of(index, hidden_ND, k, estimator if totals else None)
                elif totals:
                    yield exact_topk_and_total(hidden_ND, self.head.weight, self.head.bias, k)
                else:
                    yield *self.head.topk(hidden_ND, k), None

    def _best_of(
        self, index: CandidateIndex, hidden_ND: torch.Tensor, k: int, estimator: PartitionEstimator | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        if estimator is None:
            candidates_NA = index.query(hidden_ND, max(k, self.candidates))
            return *self.head.topk(hidden_ND, k, candidates_NA=candidates_NA), None
        asked = self._partition_candidates(k)
        scores_NA, ids_NA = self.head.topk(hidden_ND, asked, candidates_NA=index.query(hidden_ND, asked))
        log_total_N = estimator.log_total(hidden_ND, ids_NA, scores_NA)
        return scores_NA[:, :k], ids_NA[:, :k], log_total_N

    def partition_estimator(self, k: int) -> PartitionEstimator:
        """The estimator for indexed prediction of k classes, over today's weights."""
        count = max(self.partition_classes, self._partition_candidates(k) + 1)
        return PartitionEstimator(self.head.weight, self.head.bias, count, seed=0)

    def _partition_candidates(self, k: int) -> int:
        return max(k, self.candidates, PARTITION_CANDIDATES)


def _for_training(config: TrainConfig) -> TrainConfig:
    """The settings with the number of hash tables that suits the mode; prediction asks row by row and needs more."""
    if config.mode != "shared" or config.index == "none" or "tables" not in index_settings(config.index):
        return config
    return replace(config, index_options={"tables": SHARED_TABLES, **config.index_options})


def make_config_index(config: TrainConfig, in_features: int, num_classes: int) -> CandidateIndex | None:
    """The index that the settings ask for, not built yet; None for ``none``.

    Raises:
        ConfigError: for an unknown name, or options that the index does not have or take.
    """
    if config.index != "none":
        return make_index(
            config.index, in_features, num_classes, seed=config.seed + 2, **config.index_options
        )
    if config.index_options:
        raise ConfigError(
            f"The 'index_options' setting must be empty where 'index' is none. Got {config.index_options!r} instead."
        )
    return None
