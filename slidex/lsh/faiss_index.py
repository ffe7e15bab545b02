"""Candidate indexes made by FAISS (Douze et al. 2024), from an exact scan to graphs, under one class.

Where a kind of index compares compressed rows, a multiple of k candidates is taken from it and ranked by the
exact score. The ranking reads the classifier's own weights and keeps no second copy of them, as FAISS's
refining indexes do: no memory, nothing to update, and scores of today's rows. Legend: N rows in a batch, C
classes, D hidden width, E = D + 1 and padding, K candidates per row.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from slidex import kernels
from slidex.errors import ConfigError
from slidex.lsh.index import (
    IndexStats,
    QuerySample,
    check_class_ids,
    check_hidden,
    check_integer,
    check_queries,
    check_weights,
    is_cuda,
)
from slidex.lsh.voting import mix_ids

if TYPE_CHECKING:
    from collections.abc import Mapping

    from slidex.lsh.faiss_store import FaissStore

POOL_CANDIDATES = 8
"""`FaissIndex.pool` asks for this many candidates in all per class of its budget: as rows name the same classes,
about what fills it. With more, votes for classes that are in nobody's front ranks drown the others (measured)."""
_RANK_CHUNK_ELEMENTS = 1 << 24


class FaissIndex:
    """A `CandidateIndex` over a `FaissStore`.

    Same seed, weights and history, same answers, for any number of threads, but for two things FAISS leaves
    open: its matrix products round differently in batches of other sizes, which can swap two classes of all
    but equal score (and, in k-means, a row between two cells); and candidates of equal compressed score are
    kept in the order in which they entered their cell, so that after an `update` they may be others than after
    a rebuild.

    Args:
        in_features: Hidden width D.
        num_classes: C.
        store: The FAISS index.
        seed: Keys ties between equally voted classes in `pool`.
        k_factor: Candidates taken per candidate wanted, the rest dropped by exact score; 1 for FAISS's own
            order, which needs no weights.
    """

    uses_queries = False

    def __init__(
        self, in_features: int, num_classes: int, store: FaissStore, *, seed: int, k_factor: int = 1
    ) -> None:
        check_integer("k_factor", "make_index", k_factor, 1)
        self.in_features, self.num_classes = in_features, num_classes
        self._store, self._seed, self._k_factor = store, seed, k_factor
        self._live: tuple[torch.Tensor, torch.Tensor] | None = None
        self._builds = self._updates = 0
        self._build_seconds = self._update_seconds = 0.0

    @property
    def trainings(self) -> int:
        """How often the quantisers were trained."""
        return self._store.trainings

    def build(
        self,
        weight_CD: torch.Tensor,
        bias_C: torch.Tensor | None = None,
        *,
        queries: QuerySample | None = None,
    ) -> None:
        """Index all rows; see `CandidateIndex.build` and `FaissStore` for when quantisers are trained anew."""
        started = time.perf_counter()
        check_weights("FaissIndex.build", weight_CD, bias_C, self.num_classes, self.in_features)
        check_queries("FaissIndex.build", queries, self.num_classes, self.in_features)
        self._check_device(weight_CD.device)
        self._store.build(weight_CD, bias_C)
        self._see(weight_CD, bias_C)
        self._builds += 1
        self._build_seconds = time.perf_counter() - started

    def update(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, changed_ids: torch.Tensor) -> None:
        """Bring rows up to date at the price of the kind of index, see `FaissStore.update`.

        Equals a rebuild with the same quantisers but for the order of classes in a cell. Where FAISS cannot
        change rows everything is filled anew, and `stats` counts all rows as rehashed.
        """
        self._require_built("update")
        started = time.perf_counter()
        check_weights("FaissIndex.update", weight_CD, bias_C, self.num_classes, self.in_features)
        check_class_ids("changed_ids", "FaissIndex.update", changed_ids, self.num_classes)
        self._store.update(weight_CD, bias_C, torch.unique(changed_ids))
        self._see(weight_CD, bias_C)
        self._updates += 1
        self._update_seconds = time.perf_counter() - started

    def query(self, hidden_ND: torch.Tensor, k: int, *, step: int = 0) -> torch.Tensor:
        """The k nearest classes of each row, best first; see `CandidateIndex.query`. `step` changes nothing."""
        self._require_built("query")
        check_hidden("FaissIndex.query", hidden_ND, self.in_features)
        check_integer("k", "FaissIndex.query", k, 1)
        check_integer("step", "FaissIndex.query", step, 0)
        found_NK = self._search(hidden_ND, k)
        out_NK = torch.full((len(hidden_ND), k), -1, dtype=torch.int64)
        out_NK[:, : found_NK.shape[1]] = found_NK
        return out_NK.to(hidden_ND.device)

    def pool(self, hidden_ND: torch.Tensor, budget: int, *, step: int = 0) -> torch.Tensor:
        """The classes that most rows have among their nearest; see `CandidateIndex.pool`.

        Each row names its ``POOL_CANDIDATES * budget / N`` nearest classes. More votes win, then the better
        best place in a row's list, then chance, keyed by (seed, step).
        """
        self._require_built("pool")
        check_hidden("FaissIndex.pool", hidden_ND, self.in_features)
        check_integer("budget", "FaissIndex.pool", budget, 1)
        check_integer("step", "FaissIndex.pool", step, 0)
        num_rows = len(hidden_ND)
        if num_rows == 0:
            return torch.empty(0, dtype=torch.int64, device=hidden_ND.device)
        named_NK = self._search(hidden_ND, math.ceil(POOL_CANDIDATES * budget / num_rows)).numpy()
        # Column by column, so that the first mention of a class is at its best place in any row.
        by_place = named_NK.T.ravel()
        ids, first, votes = np.unique(by_place, return_index=True, return_counts=True)
        kept = ids >= 0
        ids, place, votes = ids[kept], first[kept] // num_rows, votes[kept]
        key = mix_ids(np.array([self._seed]), np.uint64(step))[0]
        order = np.lexsort((mix_ids(ids, key), place, -votes))
        return torch.from_numpy(np.sort(ids[order[:budget]])).to(hidden_ND.device)

    def drift(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, sample_ids: torch.Tensor) -> float:
        """Share of the rows whose cell changed, or that moved too far; see `FaissStore.drift`."""
        self._require_built("drift")
        check_weights("FaissIndex.drift", weight_CD, bias_C, self.num_classes, self.in_features)
        check_class_ids("sample_ids", "FaissIndex.drift", sample_ids, self.num_classes)
        return self._store.drift(weight_CD, bias_C, sample_ids)

    def stats(self) -> IndexStats:
        """See `CandidateIndex.stats`; buckets are the cells of an IVF index, ``rows_rehashed`` rows written."""
        loads = self._store.loads()
        return IndexStats(
            built=self._store.ready,
            rows=self.num_classes if self._store.ready else 0,
            tables=int(len(loads) > 0),
            mean_bucket_load=float(loads.mean()) if len(loads) else 0.0,
            max_bucket_load=int(loads.max(initial=0)),
            empty_bucket_share=float(np.mean(loads == 0)) if len(loads) else 0.0,
            last_build_seconds=self._build_seconds,
            last_update_seconds=self._update_seconds,
            rows_rehashed=self._store.rows_written,
            bytes=self._store.bytes,
            builds=self._builds,
            updates=self._updates,
        )

    def state(self) -> dict[str, torch.Tensor]:
        """The FAISS index as bytes, with its trained quantisers; see `FaissStore.state`."""
        self._require_built("state")
        return self._store.state()

    def load_state(
        self,
        state: Mapping[str, torch.Tensor],
        weight_CD: torch.Tensor,
        bias_C: torch.Tensor | None = None,
    ) -> None:
        """Restore index and quantisers; the weights are what candidates are ranked by where `k_factor` > 1.

        FAISS reads the bytes: take them only from where you would take a program.
        """
        check_weights("FaissIndex.load_state", weight_CD, bias_C, self.num_classes, self.in_features)
        self._check_device(weight_CD.device)
        self._store.load_state(state)
        self._see(weight_CD, bias_C)

    def _check_device(self, device: torch.device) -> None:
        if is_cuda(device) and self._store.device == "cpu":
            raise ConfigError(
                f"The 'device' parameter of a FAISS index must be 'cuda' for weights on {device}. Got 'cpu' instead. "
                "Use 'cuda' with a build of FAISS for GPUs, the index 'simhash' or 'dwta', or weights on the CPU."
            )

    def _see(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None) -> None:
        if self._k_factor > 1:
            bias_C = weight_CD.new_zeros(self.num_classes) if bias_C is None else bias_C
            self._live = weight_CD.detach(), bias_C.detach()

    def _search(self, hidden_ND: torch.Tensor, k: int) -> torch.Tensor:
        """int64 (N, at most k) on the CPU, -1 where there are no more."""
        found_NK = torch.from_numpy(self._store.search(hidden_ND, k * self._k_factor))
        if self._live is None or len(found_NK) == 0:
            return found_NK[:, :k]
        scores_NK = _scores(hidden_ND.detach(), *self._live, found_NK)
        best_NK = scores_NK.topk(min(k, found_NK.shape[1]), dim=1).indices
        return found_NK.gather(1, best_NK)

    def _require_built(self, method: str) -> None:
        if not self._store.ready:
            raise ConfigError(f"FaissIndex.{method} was called before build; build the index first.")


def _scores(
    hidden_ND: torch.Tensor, weight_CD: torch.Tensor, bias_C: torch.Tensor, ids_NK: torch.Tensor
) -> torch.Tensor:
    """``h·w_c + b_c`` of each row's own classes: floating (N, K) on the CPU, -inf where the id is -1."""
    dtype = weight_CD.dtype
    if (
        weight_CD.device.type == "cpu"
        and dtype in (torch.float32, torch.float64)
        and weight_CD.is_contiguous()
    ):
        hidden_ND = hidden_ND.to(device="cpu", dtype=dtype).contiguous()
        return kernels.get("cpu").pair_logits(hidden_ND, weight_CD, bias_C.to(dtype).contiguous(), ids_NK)
    scores_NK = torch.empty(ids_NK.shape)
    step = max(1, _RANK_CHUNK_ELEMENTS // max(1, ids_NK.shape[1] * weight_CD.shape[1]))
    for first in range(0, len(ids_NK), step):
        rows = slice(first, first + step)
        ids = ids_NK[rows].clamp(min=0).to(weight_CD.device)
        hidden = hidden_ND[rows].to(weight_CD.device, torch.float32)
        scores_NK[rows] = torch.einsum("nd,nkd->nk", hidden, weight_CD[ids].float()) + bias_C[ids].float()
    return scores_NK.masked_fill_(ids_NK < 0, -torch.inf)
