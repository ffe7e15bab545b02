"""The whole model: encoder, output layer, and the index over the output layer's rows.

Legend: N rows, C classes, D hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from slidex.errors import ConfigError, DataError
from slidex.lsh import exact_topk_and_total
from slidex.nn.encoder import BagEncoder
from slidex.nn.head import SampledHead
from slidex.nn.known_classes import KnownClasses
from slidex.nn.partition import PARTITION_CANDIDATES, PARTITION_CLASSES, PartitionEstimator
from slidex.nn.selection import PREDICT_CANDIDATES, make_selector
from slidex.threads import threads_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from slidex.data.csr import CsrArrays
    from slidex.lsh import CandidateIndex
    from slidex.nn.placement import Placement
    from slidex.nn.ranker import LinearRanker
    from slidex.nn.sharding import Shard
    from slidex.train.config import TrainConfig

PREDICT_ROWS = 2048
"""Rows scored at once in prediction: of 512, arrays as long as there are features would take an eighth of the time."""
_ROW_SCORES = 1 << 14
"""What the rest of a row's prediction takes, in scores of classes."""


class Ranked(NamedTuple):
    """The best classes of some rows.

    Args:
        scores_NK: float32 (n, k), best first, padded with -inf: the logits, or what a ranker made of them.
        ids_NK: int64 (n, k), padded with -1.
        logits_NK: float32 (n, k), the head's scores of the same classes.
        log_total_N: float32 (n,), log of the softmax's partition function over `logits_NK`'s kind, if asked for.
    """

    scores_NK: torch.Tensor
    ids_NK: torch.Tensor
    logits_NK: torch.Tensor
    log_total_N: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Classifier:
    """Encoder and head with the index over the head's rows.

    Args:
        encoder: Sparse features to hidden vectors.
        head: Hidden vectors to classes.
        index: Over ``[head.weight, head.bias]``; None in exact mode or with random classes only.
        candidates: Classes asked of the index for each row in indexed prediction.
        partition_classes: Random classes from which indexed prediction estimates the partition function.
        ranker: Ranks the head's best classes anew; None leaves them in the order of their logits.
    """

    encoder: BagEncoder
    head: SampledHead
    index: CandidateIndex | None
    candidates: int = PREDICT_CANDIDATES
    partition_classes: int = PARTITION_CLASSES
    ranker: LinearRanker | None = None
    known: KnownClasses | None = field(init=False, default=None)
    """Those that the network is to propose from where there is a ranker; None for all."""

    def __post_init__(self) -> None:
        """Lays out the rows of the classes that the network is to propose from."""
        if self.ranker is not None and self.ranker.known_M is not None:
            object.__setattr__(self, "known", KnownClasses.of(self.head, self.ranker.known_M))

    @classmethod
    def from_config(
        cls,
        config: TrainConfig,
        num_features: int,
        num_classes: int,
        class_counts: np.ndarray,
        shard: Shard | None = None,
        *,
        device: str = "cpu",
    ) -> Classifier:
        """A model with initial weights, on the CPU; to work there it needs `weight_dtype` float32.

        Args:
            config: From `slidex.train.settle.settle`.
            num_features: F.
            num_classes: C.
            class_counts: int64 (C,), training frequency of every class.
            shard: Which of the classes this process has; None where it has all.
            device: ``meta`` makes one without weights instead, which `place` draws where they are to be, so that the
                host never has all of them.

        Raises:
            ConfigError: if there are more processes than classes, or than negatives.
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
            device=device,
        )
        begin, end, part, parts = 0, num_classes, 0, 1
        if shard is not None:
            begin, end, part, parts = shard.begin, shard.end, shard.rank, shard.size
        if num_classes < parts:
            raise ConfigError(f"{num_classes:,} classes cannot be shared out among {parts:,} processes.")
        selector = make_selector(
            config, encoder.out_features, end - begin, class_counts[begin:end], part=part, parts=parts
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
            weight_dtype=getattr(torch, config.weight_dtype),
            shard=shard,
            device=device,
        )
        return cls(encoder, head, selector.index if selector is not None else None)

    def place(self, placement: Placement, index_name: str | None = None) -> None:
        """Goes to a device.

        Args:
            placement: Where to.
            index_name: Of the index that is to propose classes in training, which must then be built there anew; None
                for a model that only predicts.

        Raises:
            ConfigError: The index does not work there, or classes are sharded.
        """
        self.encoder.place(placement, trains=index_name is not None)
        self.head.place(placement, index_name)

    def topk(
        self, x: CsrArrays, k: int, *, indexed: bool = False
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Scores float32 (n, k) and class ids int64 (n, k) of the best classes, for consecutive blocks of rows.

        They are on the CPU, wherever the model is.

        Args:
            x: Rows of features.
            k: Classes per row.
            indexed: Score only the classes that the index returns; otherwise all classes.

        Raises:
            DataError: if `x` has another number of features than the model.
            ConfigError: if `indexed` is asked of a model without an index.
        """
        for ranked in self.ranked(x, k, indexed=indexed):
            yield ranked.scores_NK, ranked.ids_NK

    def ranked(
        self,
        x: CsrArrays,
        k: int,
        *,
        indexed: bool = False,
        totals: bool = False,
        estimator: PartitionEstimator | None = None,
    ) -> Iterator[Ranked]:
        """As `topk`, with the head's own logits and, if asked for, the softmax's partition function.

        Args:
            x: Rows of features.
            k: Classes per row.
            indexed: Score only the classes that the index returns; otherwise all classes.
            totals: Give the partition function: over all classes, or with `indexed` the estimate of
                `PartitionEstimator`, for which at least `PARTITION_CANDIDATES` classes are asked of the index (and
                ranked).
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
        wanted = self._wanted(k)
        scored = self.head.num_classes if totals or self.known is None else len(self.known.ids_M)
        scored = max(scored if index is None else self.candidates, _ROW_SCORES)
        for start in range(0, x.num_rows, PREDICT_ROWS):
            rows = x.take(np.arange(start, min(start + PREDICT_ROWS, x.num_rows)))
            # Nothing is yielded in here: whoever asked for the rows keeps their gradient mode.
            with torch.no_grad(), threads_for(rows.num_rows * scored):
                hidden_ND = self.encoder(rows)
                if index is not None:
                    found = self._best_of(index, hidden_ND, wanted, estimator if totals else None)
                else:
                    found = self._best(hidden_ND, wanted, totals=totals)
                logits_NK, ids_NK = found[0].cpu(), found[1].cpu()
                log_total_N = None if found[2] is None else found[2].cpu()
                best = logits_NK, ids_NK, logits_NK
                if self.ranker is not None:
                    more_NB = self.ranker.beside(rows, ids_NK)
                    logits_NB = self.head.logits(hidden_ND, more_NB.to(hidden_ND.device)).cpu()
                    logits_NK, ids_NK = torch.cat([logits_NK, logits_NB], 1), torch.cat([ids_NK, more_NB], 1)
                    best = self.ranker.rank(rows, logits_NK, ids_NK, k)
            yield Ranked(*best, log_total_N)

    def _wanted(self, k: int) -> int:
        """Classes that the head must give for `k` ranked ones."""
        return k if self.ranker is None else max(k, min(self.ranker.candidates, self.head.num_classes))

    def _proposing(self, k: int) -> KnownClasses | None:
        """The classes that k are to be proposed from; None for all, as where too few are known."""
        return None if self.known is None or k > len(self.known.ids_M) else self.known

    def _best(
        self, hidden_ND: torch.Tensor, k: int, *, totals: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The k best of the classes that the network is to propose from, and the partition function if asked for."""
        head, known = self.head, self._proposing(k)
        if known is None:
            if totals:
                return exact_topk_and_total(hidden_ND, head.weight, head.bias, k)
            return *head.topk(hidden_ND, k), None
        log_total_N = exact_topk_and_total(hidden_ND, head.weight, head.bias, 1)[2] if totals else None
        return *known.topk(hidden_ND, k), log_total_N

    def _best_of(
        self, index: CandidateIndex, hidden_ND: torch.Tensor, k: int, estimator: PartitionEstimator | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Likewise of those that the index proposes, of which a row may have fewer, and an estimate if asked for."""
        known = self._proposing(k)
        if estimator is None:
            ids_NA, log_total_N = index.query(hidden_ND, max(k, self.candidates)), None
        else:
            asked = self._partition_candidates(k)
            scores_NA, ids_NA = self.head.topk(hidden_ND, asked, candidates_NA=index.query(hidden_ND, asked))
            log_total_N = estimator.log_total(hidden_ND, ids_NA, scores_NA)
            if known is None:
                return scores_NA[:, :k], ids_NA[:, :k], log_total_N
        candidates_NA = ids_NA if known is None else known.only(ids_NA)
        return *self.head.topk(hidden_ND, k, candidates_NA=candidates_NA), log_total_N

    def scores(self, x: CsrArrays, ids_NA: torch.Tensor) -> torch.Tensor:
        """What `topk` would give the classes: float32 (N, A), -inf at pads.

        An index that misses a row's best class may give a ranker's scores another floor.

        Args:
            x: N rows of features.
            ids_NA: int64, padded with -1.
        """
        with torch.no_grad():
            hidden_ND = self.encoder(x)
            logits_NA = self.head.logits(hidden_ND, ids_NA.to(hidden_ND.device)).cpu()
            if self.ranker is None:
                return logits_NA
            best_N = self._best(hidden_ND, 1)[0][:, 0].cpu()
        return self.ranker.scores(x, logits_NA, ids_NA, best_N)

    def partition_estimator(self, k: int) -> PartitionEstimator:
        """The estimator for indexed prediction of k classes, over today's weights."""
        count = max(self.partition_classes, self._partition_candidates(self._wanted(k)) + 1)
        return PartitionEstimator(self.head.weight, self.head.bias, count, seed=0)

    def _partition_candidates(self, k: int) -> int:
        return max(k, self.candidates, PARTITION_CANDIDATES)
