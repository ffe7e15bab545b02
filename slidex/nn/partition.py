"""The softmax's partition function from some of the classes: those the index retrieved, and random ones.

``Z(h) = Σ_c exp(h·w_c + b_c)`` over all C classes is what turns scores into probabilities, and costs what exact
scoring costs. The estimate is stratified, as in training: classes that the index retrieved for a row count once, and
m uniformly drawn classes outside them stand for all the others, each for (C - retrieved) / m. Whatever the index
returns it is unbiased for Z; its spread comes from the classes that were not retrieved, so a better index narrows it.

The random classes are the same for all rows, so that a row's probability does not depend on the rows beside it, and
their weight rows are gathered once. Rows therefore share their luck: the mean error over rows does not shrink with
their number. What `slidex.train.tuning` reports is the error of this very sample.

Legend: N rows, A retrieved classes per row, S random classes, C classes, D hidden width.
"""

from __future__ import annotations

import math

import torch

from slidex.lsh import ClassSampler
from slidex.lsh.index import check_integer

PARTITION_CLASSES = 4096
"""Random classes by default."""
PARTITION_CANDIDATES = 256
"""The fewest classes retrieved for a row where its partition function is estimated: a few are enough to rank, but leave
too much of Z to chance (docs/performance.md)."""
_STREAM = 0x9A27


class PartitionEstimator:
    """Estimates ``log Z`` of hidden vectors whose best classes an index has retrieved.

    Args:
        weight_CD: float32 or of 16 bits (C, D).
        bias_C: float32 (C,).
        count: Random classes S, at least 1, C where there are fewer; it must be above the number of classes
            retrieved for a row, so that some are left whatever was retrieved.
        seed: Fixes the sample.

    Raises:
        ConfigError: `count` is below 1.
    """

    def __init__(self, weight_CD: torch.Tensor, bias_C: torch.Tensor, count: int, *, seed: int) -> None:
        check_integer("count", "PartitionEstimator", count, 1)
        self.num_classes = len(weight_CD)
        ids_S = ClassSampler(self.num_classes, seed=seed).sample(count, 0, _STREAM).sort().values
        self.ids_S = ids_S.to(weight_CD.device)
        self._rows_SD, self._bias_S = (
            weight_CD.detach()[self.ids_S].to(bias_C.dtype),
            bias_C.detach()[self.ids_S],
        )
        self._place_C = torch.full((self.num_classes,), -1, dtype=torch.int32, device=ids_S.device)
        self._place_C[ids_S] = torch.arange(len(ids_S), dtype=torch.int32)
        self._place_C = self._place_C.to(weight_CD.device)

    def log_total(
        self, hidden_ND: torch.Tensor, candidates_NA: torch.Tensor, logits_NA: torch.Tensor
    ) -> torch.Tensor:
        """The estimate of ``log Z`` for each row: float32 (N,).

        Args:
            hidden_ND: float32 (N, D).
            candidates_NA: int64 (N, A), distinct within a row, -1 for none.
            logits_NA: float32 (N, A), their scores, -inf where there is none.

        Raises:
            ConfigError: there are no more random classes than retrieved ones, and not all classes are among them.
        """
        most = len(self.ids_S)
        if most < self.num_classes:
            check_integer("A", "PartitionEstimator.log_total", candidates_NA.shape[1], 0, most - 1)
        logits_NS = torch.addmm(self._bias_S, hidden_ND, self._rows_SD.T)
        place_NA = self._place_C[candidates_NA.clamp(min=0)].masked_fill_(candidates_NA < 0, -1)
        rows_P, slots_P = (place_NA >= 0).nonzero(as_tuple=True)
        logits_NS[rows_P, place_NA[rows_P, slots_P].long()] = -math.inf  # counted already
        sampled_N = most - torch.bincount(rows_P, minlength=len(hidden_ND))
        others_N = self.num_classes - (candidates_NA >= 0).sum(dim=1)
        stands_for_N = (others_N / sampled_N.clamp(min=1)).log()  # -inf where all were retrieved
        return torch.logaddexp(logits_NA.logsumexp(dim=1), logits_NS.logsumexp(dim=1) + stands_for_N)
