"""Brute-force top k: the oracle that other indexes' recall is measured against, and an index itself.

Scores are computed over chunks of classes and merged, so memory stays bounded and no (N, C) matrix is ever
made. The index keeps references to the weights, not copies: it always answers for their current values, so
nothing goes stale and an update is free. Legend: N rows in a batch, C classes, D hidden width, K candidates
per row here.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from slidex.errors import ConfigError
from slidex.lsh.index import (
    IndexStats,
    QuerySample,
    check_class_ids,
    check_hidden,
    check_integer,
    check_queries,
    check_weights,
    padded,
    register_index,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

_CHUNK_SCORES, _DEVICE_CHUNK_SCORES = 1 << 22, 1 << 26
"""Scores computed at once: 16 MiB in float32 for the cache of a CPU, 256 MiB elsewhere, where each takes a launch."""


def exact_topk(
    hidden_ND: torch.Tensor, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest ``h·w_c + b_c`` of each row, in float32 or better; never holds an (N, C) matrix.

    Args:
        hidden_ND: floating (N, D).
        weight_CD: floating (C, D).
        bias_C: floating (C,), or None.
        k: Candidates per row, at least 1.

    Returns:
        Scores (N, k) and class ids int64 (N, k), best first; -inf and -1 beyond C.
    """
    return _scan(hidden_ND, weight_CD, bias_C, k, None)


def exact_topk_and_total(
    hidden_ND: torch.Tensor, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `exact_topk` returns, and the softmax's log of the sum of exp over all classes, from the same scores.

    Returns:
        Scores (N, k), class ids int64 (N, k), and ``log Σ_c exp(h·w_c + b_c)``, (N,).
    """
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    log_total_N = hidden_ND.new_full((hidden_ND.shape[0],), -torch.inf, dtype=dtype)
    return *_scan(hidden_ND, weight_CD, bias_C, k, log_total_N), log_total_N


def _scan(
    hidden_ND: torch.Tensor,
    weight_CD: torch.Tensor,
    bias_C: torch.Tensor | None,
    k: int,
    log_total_N: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`exact_topk`; adds exp of every score to `log_total_N`, in logs, where it is given."""
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    best_scores = hidden_ND.new_full((hidden_ND.shape[0], k), -torch.inf, dtype=dtype)
    num_rows, num_classes = hidden_ND.shape[0], weight_CD.shape[0]
    out = hidden_ND.new_full((num_rows, k), -1, dtype=torch.int64)
    keep = min(k, num_classes)
    row_step = max(1, min(num_rows, 256))
    chunk = _CHUNK_SCORES if hidden_ND.device.type == "cpu" else _DEVICE_CHUNK_SCORES
    class_step = max(keep, _class_step(chunk, row_step, weight_CD, dtype))
    for row in range(0, num_rows, row_step):
        hidden = hidden_ND[row : row + row_step].to(dtype)
        best = hidden.new_empty((len(hidden), 0))
        best_ids = out.new_empty((len(hidden), 0))
        for first in range(0, num_classes, class_step):
            scores = hidden @ weight_CD[first : first + class_step].to(dtype).T
            if bias_C is not None:
                scores += bias_C[first : first + class_step].to(dtype)
            values, ids = scores.topk(min(keep, scores.shape[1]), dim=1)
            best, order = torch.cat([best, values], dim=1).topk(
                min(keep, best.shape[1] + values.shape[1]), dim=1
            )
            best_ids = torch.cat([best_ids, ids + first], dim=1).gather(1, order)
            if log_total_N is not None:
                total = log_total_N[row : row + row_step]
                torch.logaddexp(total, scores.logsumexp(dim=1), out=total)
        best_scores[row : row + row_step, :keep] = best
        out[row : row + row_step, :keep] = best_ids
    return best_scores, out


def _class_step(chunk: int, num_rows: int, weight_CD: torch.Tensor, dtype: torch.dtype) -> int:
    """Classes scored at once: no more than `chunk` scores, nor numbers of rows that are widened for it."""
    width = weight_CD.shape[1] if weight_CD.dtype != dtype else 1
    return max(1, chunk // max(num_rows, width))


def recall_at_k(index_ids_NK: torch.Tensor, exact_ids_NK: torch.Tensor) -> float:
    """Share of the exact ids that the index also returned, in [0, 1]; NaN where there are none.

    Args:
        index_ids_NK: int64 (N, any width), no id twice in a row, -1 for none.
        exact_ids_NK: int64 (N, K), no id twice in a row, -1 for none.
    """
    if index_ids_NK.ndim != 2 or exact_ids_NK.ndim != 2 or len(index_ids_NK) != len(exact_ids_NK):
        raise ConfigError(
            "The 'index_ids_NK' parameter of recall_at_k must have as many rows as 'exact_ids_NK'. "
            f"Got {tuple(index_ids_NK.shape)} and {tuple(exact_ids_NK.shape)} instead."
        )
    wanted = int((exact_ids_NK >= 0).sum())
    found = sum(
        int(torch.isin(exact[exact >= 0], ours).sum())
        for exact, ours in zip(exact_ids_NK, index_ids_NK, strict=True)
    )
    return found / wanted if wanted else float("nan")


@register_index("exact")
class ExactIndex:
    """The `CandidateIndex` that scores every class; ``N C D`` multiply-adds per query.

    Ties in score fall as `torch.topk` leaves them; ``step`` and ``seed`` change nothing.
    """

    uses_queries, runs_on_cuda = False, True
    bytes_on_device = 8 * _DEVICE_CHUNK_SCORES

    def __init__(self, in_features: int, num_classes: int, *, seed: int) -> None:
        del seed
        self.in_features = in_features
        self.num_classes = num_classes
        self._weights: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._stats = IndexStats()

    def build(
        self,
        weight_CD: torch.Tensor,
        bias_C: torch.Tensor | None = None,
        *,
        queries: QuerySample | None = None,
    ) -> None:
        """Remember the weights by reference; see `CandidateIndex.build`."""
        started = time.perf_counter()
        check_weights("ExactIndex.build", weight_CD, bias_C, self.num_classes, self.in_features)
        check_queries("ExactIndex.build", queries, self.num_classes, self.in_features)
        self._weights = (weight_CD.detach(), None if bias_C is None else bias_C.detach())
        self._stats = IndexStats(
            built=True,
            rows=self.num_classes,
            builds=self._stats.builds + 1,
            updates=self._stats.updates,
            last_build_seconds=time.perf_counter() - started,
        )

    def update(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, changed_ids: torch.Tensor) -> None:
        """Remember the weights by reference; see `CandidateIndex.update`."""
        self._built("update")
        started = time.perf_counter()
        check_weights("ExactIndex.update", weight_CD, bias_C, self.num_classes, self.in_features)
        check_class_ids("changed_ids", "ExactIndex.update", changed_ids, self.num_classes)
        self._weights = (weight_CD.detach(), None if bias_C is None else bias_C.detach())
        self._stats = IndexStats(
            built=True,
            rows=self.num_classes,
            builds=self._stats.builds,
            updates=self._stats.updates + 1,
            last_build_seconds=self._stats.last_build_seconds,
            last_update_seconds=time.perf_counter() - started,
        )

    def query(self, hidden_ND: torch.Tensor, k: int, *, step: int = 0) -> torch.Tensor:
        """The k largest scores of each row; see `CandidateIndex.query`."""
        del step
        weight_CD, bias_C = self._built("query")
        check_hidden("ExactIndex.query", hidden_ND, self.in_features)
        check_integer("k", "ExactIndex.query", k, 1)
        return exact_topk(hidden_ND.detach(), weight_CD, bias_C, k)[1]

    def pool(self, hidden_ND: torch.Tensor, budget: int, *, step: int = 0) -> torch.Tensor:
        """The `budget` classes with the largest score over the rows; see `CandidateIndex.pool`."""
        del step
        weight_CD, bias_C = self._built("pool")
        check_hidden("ExactIndex.pool", hidden_ND, self.in_features)
        check_integer("budget", "ExactIndex.pool", budget, 1)
        num_rows = len(hidden_ND)
        if num_rows == 0:
            return torch.empty(0, dtype=torch.int64, device=hidden_ND.device)
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        hidden = hidden_ND.detach().to(dtype)
        chunk = _CHUNK_SCORES if hidden.device.type == "cpu" else _DEVICE_CHUNK_SCORES
        class_step = _class_step(chunk, num_rows, weight_CD, dtype)
        best_C = hidden.new_empty(self.num_classes)
        for first in range(0, self.num_classes, class_step):
            rows = slice(first, first + class_step)
            best_C[rows] = (hidden @ weight_CD[rows].to(dtype).T).amax(dim=0)
        if bias_C is not None:
            best_C += bias_C.to(dtype)
        return best_C.topk(min(budget, self.num_classes)).indices.sort().values

    def require_cuda(self) -> None:
        """Nothing of it works on the CPU alone."""

    def padded_pool(self, hidden_ND: torch.Tensor, budget: int, *, step: int = 0) -> torch.Tensor:
        """As `pool`; only a batch without rows needs padding."""
        return padded(self.pool(hidden_ND, budget, step=step), min(budget, self.num_classes))

    def drift(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, sample_ids: torch.Tensor) -> float:
        """Always 0: live weights never go stale."""
        self._built("drift")
        check_weights("ExactIndex.drift", weight_CD, bias_C, self.num_classes, self.in_features)
        check_class_ids("sample_ids", "ExactIndex.drift", sample_ids, self.num_classes)
        return 0.0

    def stats(self) -> IndexStats:
        """See `CandidateIndex.stats`; nothing is stored, so ``bytes`` and ``tables`` are 0."""
        return self._stats

    def state(self) -> dict[str, torch.Tensor]:
        """Empty: the weights themselves are the state."""
        self._built("state")
        return {}

    def load_state(
        self,
        state: Mapping[str, torch.Tensor],
        weight_CD: torch.Tensor,
        bias_C: torch.Tensor | None = None,
    ) -> None:
        """Build on the current weights; see `CandidateIndex.load_state`."""
        if state:
            raise ConfigError(
                f"The 'state' parameter of ExactIndex.load_state must be empty. Got {sorted(state)} instead."
            )
        self.build(weight_CD, bias_C)

    def _built(self, method: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self._weights is None:
            raise ConfigError(f"ExactIndex.{method} was called before build; build the index first.")
        return self._weights
