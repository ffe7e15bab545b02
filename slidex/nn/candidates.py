"""Which classes a batch computes on: true classes, classes the index retrieves, and random classes.

Hard negatives alone collapse (classes the index never returns are never pushed down), so every active set mixes
in random classes; a correction then says how much each sampled class counts in the softmax's denominator. A shared
pool has the true classes of all rows; rows with sets of their own can be given those of other rows as well.

Legend: N rows in a batch, C classes, D hidden width, A active classes per row, U classes in a shared pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numba
import numpy as np
import torch

from slidex.errors import ConfigError
from slidex.lsh.mixing import hash_key, mix_ids

if TYPE_CHECKING:
    from slidex.data.csr import CsrArrays
    from slidex.lsh import CandidateIndex, ClassSampler

CORRECTIONS = ("none", "logq", "stratified")


@dataclass(frozen=True, slots=True)
class Pool:
    """The classes a whole batch is scored on (shared mode).

    Args:
        ids_U: int64 (U,), unique: the batch's true classes, then retrieved, then random ones; on a device with -1 in
            places without a class.
        offset_U: float (U,), log of the weight each class has in the softmax's denominator; None means all 0.
        target_indptr: int64 (N + 1,), rows of `target_positions`.
        target_positions: int64 (P_total,), position in `ids_U` of every true class of every row.
        target_weights: float64 (P_total,), share of the row's target mass: 1 / (true classes of the row).
        retrieved: How many of `ids_U` came from the index; on a device a number there, as the next.
        random: How many of `ids_U` are random classes.
        target_rows: int64 (P_total,), row of every true class; None where `target_indptr` is to be asked.
    """

    ids_U: torch.Tensor
    offset_U: torch.Tensor | None
    target_indptr: torch.Tensor
    target_positions: torch.Tensor
    target_weights: torch.Tensor
    retrieved: int | torch.Tensor
    random: int | torch.Tensor
    target_rows: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class ActiveSets:
    """Each row's own active classes (per-sample mode).

    Args:
        active_NA: int64 (N, A), unique within a row, padded with -1.
        target_NA: float (N, A), target mass of each slot; a row sums to 1, or to 0 if it has no true class.
        offset_NA: float (N, A), log weight of each slot in the softmax's denominator; None means all 0.
        count: Slots that are no padding; on a device a number there.
    """

    active_NA: torch.Tensor
    target_NA: torch.Tensor
    offset_NA: torch.Tensor | None
    count: int | torch.Tensor


class CandidateSelector:
    """Mixes true, retrieved and random classes into the active set of a batch.

    Args:
        num_classes: C.
        index: Proposes classes for hidden vectors; None leaves only true and random classes.
        sampler: Draws random classes with known inclusion probabilities.
        retrieved: Classes asked of the index: per batch in shared mode, per row in per-sample mode.
        random: Random classes, drawn once per batch in both modes (so that rows share their cache lines).
        batch: Per-sample mode: true classes of the batch that every row gets as negatives, beside its own; drawn
            once per batch where it has more distinct ones. A shared pool always has them all.
        correction: How the softmax's denominator is estimated from the active set.

            * ``none``: every active class counts once, as in SLIDE.
            * ``stratified``: true and retrieved classes count once, the random ones stand for all others, with
              weight 1 / (inclusion probability outside the exact set). Unbiased whatever the index returns.
            * ``logq``: as stratified, but true classes, a row's own included, count by their inverse probability
              of being in the batch (Yi et al., RecSys 2019), which stops in-batch negatives from punishing
              frequent classes.
        class_counts: int64 (C,), training frequency; needed by ``logq`` in shared mode.
        seed: Keys the draw of `batch` classes.

    Attributes:
        label_share: float64 (C,), share of all labels that each class has, for ``logq``; else None.

    Raises:
        ConfigError: if `correction` is unknown, if nothing but true classes would be active, or for ``logq`` with
            `batch` classes: drawn from those of the batch, they have no inclusion probability in closed form.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        index: CandidateIndex | None,
        sampler: ClassSampler,
        retrieved: int,
        random: int,
        batch: int = 0,
        correction: str = "none",
        class_counts: np.ndarray | None = None,
        seed: int = 0,
    ) -> None:
        if correction not in CORRECTIONS:
            raise ConfigError(
                f"The 'correction' parameter must be one of {CORRECTIONS}. Got {correction!r} instead."
            )
        if index is None:
            retrieved = 0
        if retrieved + random + batch < 1:
            raise ConfigError("No negative classes: set 'random_share' above 0, or give an index.")
        if correction == "logq" and batch > 0:
            raise ConfigError(
                "The 'correction' parameter must be none or stratified where rows get true classes of the batch "
                "('batch_share' above 0). Got 'logq' instead."
            )
        self.num_classes = num_classes
        self.index, self.sampler = index, sampler
        self.retrieved, self.random = min(retrieved, num_classes), min(random, num_classes)
        self.batch, self.correction, self._seed = batch, correction, seed
        self.label_share = None
        if correction == "logq" and class_counts is not None:
            self.label_share = class_counts / max(1, class_counts.sum())
        self._slot_C = np.full(num_classes, -1, dtype=np.int32)

    def pool(self, hidden_ND: torch.Tensor, labels: CsrArrays, step: int) -> Pool:
        """The batch's shared pool. `labels` are the rows' true classes; `step` keys all randomness.

        Raises:
            ConfigError: if the selector was made with `batch` classes, which are for per-sample mode.
        """
        no_batch_in_a_pool(self)
        retrieved = np.empty(0, dtype=np.int64)
        if self.index is not None and self.retrieved:
            retrieved = self.index.pool(hidden_ND, self.retrieved, step=step).numpy()
        random = self.sampler.sample(self.random, step).numpy()
        ids_U, positions, counts = _merge_pool(labels.indices, retrieved, random, self._slot_C)
        offset_U = self._pool_offset(ids_U, counts, len(labels.indices))
        return Pool(
            torch.from_numpy(ids_U),
            None if offset_U is None else torch.from_numpy(offset_U).to(hidden_ND.dtype),
            torch.from_numpy(labels.indptr),
            torch.from_numpy(positions),
            label_weights(labels),
            int(counts[1]),
            int(counts[2]),
        )

    def active_sets(self, hidden_ND: torch.Tensor, labels: CsrArrays, step: int) -> ActiveSets:
        """Each row's own active classes; arguments as in `pool`."""
        num_rows = hidden_ND.shape[0]
        retrieved_NK = np.empty((num_rows, 0), dtype=np.int64)
        if self.index is not None and self.retrieved:
            retrieved_NK = self.index.query(hidden_ND, self.retrieved, step=step).numpy()
        batch, random = self._batch_classes(labels, step), self.sampler.sample(self.random, step).numpy()
        widest = int(np.diff(labels.indptr).max(initial=0))
        width = widest + retrieved_NK.shape[1] + len(batch) + len(random)
        active_NA = np.empty((num_rows, width), dtype=np.int64)
        target_NA = torch.zeros((num_rows, width), dtype=hidden_ND.dtype)
        exact_N, tail_N = _fill_active_sets(
            labels.indptr, labels.indices, retrieved_NK, batch, random, active_NA, target_NA.numpy()
        )
        offset_NA = None
        if self.correction != "none":
            slot_A = np.arange(width)
            in_tail = (slot_A >= exact_N[:, None]) & (slot_A < (exact_N + tail_N)[:, None])
            weight = self._tail_log_weight(active_NA, exact_N[:, None], tail_N[:, None])
            offset_NA = torch.from_numpy(np.where(in_tail, weight, 0.0)).to(hidden_ND.dtype)
        count = int(exact_N.sum() + tail_N.sum())
        return ActiveSets(torch.from_numpy(active_NA), target_NA, offset_NA, count)

    def _batch_classes(self, labels: CsrArrays, step: int) -> np.ndarray:
        """Distinct true classes of the batch, a uniform draw where there are more than wanted: int64 (<= batch,)."""
        if not self.batch:
            return np.empty(0, dtype=np.int64)
        classes = np.unique(labels.indices).astype(np.int64)
        if len(classes) > self.batch:
            hashes = mix_ids(torch.from_numpy(classes), self.batch_key(step)).numpy()
            classes = classes[np.argpartition(hashes, self.batch)[: self.batch]]
        return classes

    def batch_key(self, step: int) -> int:
        """Settles the draw of `batch` classes: those of the smallest hashes with this key."""
        return hash_key(self._seed ^ step)

    def _tail_log_weight(
        self, ids: np.ndarray, exact: np.ndarray | int, tail: np.ndarray | int
    ) -> np.ndarray:
        """Log weight of a random class, given how many classes are exact and how many random ones were drawn.

        Uniform: the `tail` classes are a uniform draw from the C - exact others, so each stands for
        (C - exact) / tail of them. Otherwise: Horvitz-Thompson, 1 / inclusion probability.
        """
        if self.sampler.power == 0:
            return np.log(np.maximum(self.num_classes - exact, 1) / np.maximum(tail, 1))
        return -np.log(self._inclusion(np.maximum(ids, 0)))

    def _inclusion(self, ids: np.ndarray) -> np.ndarray:
        flat = torch.from_numpy(np.ascontiguousarray(ids).reshape(-1))
        return self.sampler.inclusion_probability(flat, self.random).numpy().reshape(ids.shape)

    def _pool_offset(self, ids_U: np.ndarray, counts: np.ndarray, num_labels: int) -> np.ndarray | None:
        if self.correction == "none":
            return None
        exact = int(counts[0] + counts[1])
        offset_U = np.zeros(len(ids_U))
        if self.correction == "logq" and self.label_share is not None:
            true_U = ids_U[: counts[0]]
            missed = (1.0 - self.label_share[true_U]) ** num_labels
            missed *= 1.0 - self._inclusion(true_U)
            offset_U[: counts[0]] = -np.log1p(-np.minimum(missed, 1.0 - 1e-9))
        offset_U[exact:] = self._tail_log_weight(ids_U[exact:], exact, len(ids_U) - exact)
        return offset_U


def no_batch_in_a_pool(selector: CandidateSelector) -> None:
    """ConfigError if the selector was made with `batch` classes, which a shared pool has anyway."""
    if selector.batch:
        raise ConfigError(
            "The 'batch' parameter of CandidateSelector must be 0 for a shared pool, which has all true classes "
            f"of the batch. Got {selector.batch} instead."
        )


def label_weights(labels: CsrArrays) -> torch.Tensor:
    """Target mass of every stored label, 1 / (labels of its row): float64 (labels.nnz,)."""
    counts = np.diff(labels.indptr)
    return torch.from_numpy(np.repeat(1.0 / np.maximum(counts, 1), counts))


@numba.njit(cache=True, nogil=True)
def _merge_pool(labels, retrieved, random, slot_C):
    """Union of the three parts in that order, and each label's place in it; `slot_C` is -1 before and after."""
    ids_U = np.empty(len(labels) + len(retrieved) + len(random), dtype=np.int64)
    counts = np.zeros(3, dtype=np.int64)
    size = 0
    for i in range(len(labels)):
        if slot_C[labels[i]] < 0:
            slot_C[labels[i]] = size
            ids_U[size] = labels[i]
            size += 1
    counts[0] = size
    for i in range(len(retrieved)):
        if slot_C[retrieved[i]] < 0:
            slot_C[retrieved[i]] = size
            ids_U[size] = retrieved[i]
            size += 1
    counts[1] = size - counts[0]
    for i in range(len(random)):
        if slot_C[random[i]] < 0:
            slot_C[random[i]] = size
            ids_U[size] = random[i]
            size += 1
    counts[2] = size - counts[0] - counts[1]
    positions = np.empty(len(labels), dtype=np.int64)
    for i in range(len(labels)):
        positions[i] = slot_C[labels[i]]
    for i in range(size):
        slot_C[ids_U[i]] = -1
    return ids_U[:size].copy(), positions, counts


@numba.njit(cache=True, nogil=True)
def _fill_active_sets(indptr, labels, retrieved_NK, batch, random, active_NA, target_NA):
    """Writes every row's union of its true, its retrieved, the batch's and the random classes, in that order.

    The true ones share the target mass, all else in `target_NA` stays. Returns the counts per row of what the first
    three put there, and of what the random ones added.

    A row's classes are told apart with an open-addressing hash table of at least twice their number.
    """
    num_rows, width = active_NA.shape
    bits = 1
    while (1 << bits) < 2 * width + 2:
        bits += 1
    mask = (1 << bits) - 1
    table = np.empty(1 << bits, dtype=np.int64)
    exact_N = np.zeros(num_rows, dtype=np.int64)
    tail_N = np.zeros(num_rows, dtype=np.int64)
    for row in range(num_rows):
        table[:] = -1
        size = 0
        target_NA[row, : indptr[row + 1] - indptr[row]] = 1.0 / max(1, indptr[row + 1] - indptr[row])
        first = indptr[row]
        end_true = indptr[row + 1] - first
        end_retrieved = end_true + retrieved_NK.shape[1]
        end_batch = end_retrieved + len(batch)
        for i in range(end_batch + len(random)):
            if i < end_true:
                candidate = np.int64(labels[first + i])
            elif i < end_retrieved:
                candidate = retrieved_NK[row, i - end_true]
            elif i < end_batch:
                candidate = batch[i - end_retrieved]
            else:
                candidate = random[i - end_batch]
            if i == end_batch:
                exact_N[row] = size
            if candidate < 0:
                continue
            place = (candidate * 0x9E3779B1 >> 7) & mask
            while table[place] >= 0 and table[place] != candidate:
                place = (place + 1) & mask
            if table[place] < 0:
                table[place] = candidate
                active_NA[row, size] = candidate
                size += 1
        if len(random) == 0:
            exact_N[row] = size
        tail_N[row] = size - exact_N[row]
        active_NA[row, size:] = -1
    return exact_N, tail_N
