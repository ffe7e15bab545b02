"""A linear classifier over the input's own features that ranks a row's best classes anew.

A network of one hidden layer cannot keep what each of some hundred thousand features says of each class; a linear
classifier for every class can, but to score them all is slow. So the network proposes classes, and linear classifiers,
each fitted on just the rows that its class was proposed for, judge beside it (the "matcher" and "ranker" of PECOS, Yu
et al., JMLR 2022). A network learns next to nothing of a class with a few rows; those are proposed by the features
themselves, as classes of the training rows most like a row.

Legend: N rows, C classes, F features, A and B candidates per row, K neighbours, P pairs of class and row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numba
import numpy as np
import torch

from slidex.errors import ConfigError
from slidex.kernels import RowLabels
from slidex.kernels.cpu import inverted_index, linear_scores, nearest_rows, neighbor_classes

if TYPE_CHECKING:
    from slidex.data import CsrArrays
    from slidex.kernels import InvertedIndex, LinearWeights
    from slidex.nn.class_groups import ClassGroups

NEIGHBORS, POWER = 50, 4
"""Training rows that vote for their classes, each with this power of its cosine."""
LONGEST = 1_000
"""Training rows that are kept of a feature."""
SHARE = 0.8
"""Of a row's squared values: what is left out finds frequent classes, and those are the network's."""
MIN_KNOWN = 1 << 10
"""Where fewer classes have enough rows for the network to know them, it proposes from all."""


@dataclass(frozen=True, slots=True)
class NeighborSearch:
    """Proposes the classes of the training rows that look most like a row.

    Args:
        index: Of N training rows of unit L2 norm over the F input features.
        labels: Their true classes.

    Raises:
        ConfigError: The labels are of another number of rows.
    """

    index: InvertedIndex
    labels: RowLabels

    def __post_init__(self) -> None:
        if self.index.num_rows != self.labels.num_rows:
            rows = self.labels.num_rows
            raise ConfigError(
                f"The 'labels' parameter of NeighborSearch must be of {self.index.num_rows} rows. Got {rows} instead."
            )

    def classes(self, x: CsrArrays, count: int, own_N: torch.Tensor | None = None) -> torch.Tensor:
        """The classes with the most votes of a row's neighbours, best first: int64 (N, count), padded with -1.

        Args:
            x: N rows of features.
            count: Classes for each.
            own_N: int64, the training row that each row is, which is no neighbour of its own; None for none.
        """
        rows = row_tensors(x.unit_rows())
        near_NK, cosine_NK = nearest_rows(self.index, *rows, NEIGHBORS, share=SHARE, own_Q=own_N)
        return neighbor_classes(near_NK, cosine_NK**POWER, self.labels, count)[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.index.nbytes + self.labels.nbytes


@dataclass(frozen=True, slots=True)
class LinearRanker:
    """Adds a linear score of the input to the logits of candidates.

    A network's logits say a lot about its best classes and little about the others: of a class with a few rows it knows
    only that it is rare. So logits far below a row's best one count alike, and the linear scores decide among them.

    Args:
        weights: Of C classes over the F input features, for rows of unit L2 norm.
        candidates: How many of a row's best classes it is to rank.
        factor: Of the linear score, which is around 1 for true classes and -1 for others; the logit counts 1.
        floor: Logits count as at least the row's best one less this.
        prior_C: float32, added to every score of a class; None for nothing.
        known_M: int64, the classes that the network is to propose from; None for all.
        search: Proposes more classes; None leaves those of the network.
        proposed: How many.
        groups: Of the classes, whose scores are added; None for none.
    """

    weights: LinearWeights
    candidates: int
    factor: float
    floor: float = math.inf
    prior_C: torch.Tensor | None = None
    known_M: torch.Tensor | None = None
    search: NeighborSearch | None = None
    proposed: int = 0
    groups: ClassGroups | None = None

    def beside(self, x: CsrArrays, ids_NA: torch.Tensor) -> torch.Tensor:
        """The classes that neighbours propose and the row does not have yet: int64 (N, B), padded with -1.

        Args:
            x: N rows of features.
            ids_NA: int64, classes that the rows have, padded with -1.
        """
        if self.search is None:
            return ids_NA.new_empty(len(ids_NA), 0)
        return without(self.search.classes(x, self.proposed), ids_NA)

    def scores(
        self, x: CsrArrays, logits_NA: torch.Tensor, ids_NA: torch.Tensor, best_N: torch.Tensor
    ) -> torch.Tensor:
        """``max(logit, best - floor) + factor * (w_c . x / |x| + b_c) + prior_c``: float32 (N, A), -inf at pads.

        With `groups`, and the score of the class's group.

        Args:
            x: N rows of features.
            logits_NA: float32, the head's scores.
            ids_NA: int64, their classes, padded with -1.
            best_N: float32, the highest logit of each row.
        """
        x_rows = row_tensors(x.unit_rows())
        linear_NA = linear_scores(self.weights, *x_rows, ids_NA)
        scores_NA = logits_NA.maximum(best_N[:, None] - self.floor) + self.factor * linear_NA
        if self.groups is not None:
            scores_NA += self.groups.scores(x_rows, ids_NA)
        if self.prior_C is not None:
            scores_NA += self.prior_C[ids_NA.clamp(min=0)]
        return scores_NA.masked_fill_(ids_NA < 0, -torch.inf)

    def rank(
        self, x: CsrArrays, logits_NA: torch.Tensor, ids_NA: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores, classes and logits, each (N, k), of the candidates with the k highest scores, best first.

        The highest logit of each row must be among those given.
        """
        scores_NK, best_NK = self.scores(x, logits_NA, ids_NA, logits_NA.amax(1)).topk(k)
        return scores_NK, ids_NA.gather(1, best_NK), logits_NA.gather(1, best_NK)


def row_tensors(x: CsrArrays) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Offsets, features and values of rows that have values, as kernels take them."""
    return _tensor(x.indptr), _tensor(x.indices), _tensor(x.values)


def _tensor(array: np.ndarray | None) -> torch.Tensor:
    """The same memory, but a copy of an array that is only to be read, as of a mapped file: torch warns of those."""
    return torch.from_numpy(np.require(array, requirements="W"))


def neighbor_search(x: CsrArrays, labels: CsrArrays) -> NeighborSearch:
    """A search over these training rows and their true classes."""
    index = inverted_index(*row_tensors(x.unit_rows()), x.num_columns, longest=LONGEST)
    kept = RowLabels(_tensor(labels.indptr), _tensor(labels.indices), labels.num_columns)
    return NeighborSearch(index, kept)


def without(found_NB: torch.Tensor, ids_NA: torch.Tensor) -> torch.Tensor:
    """The classes found, with -1 for each that the row has in `ids_NA`."""
    left_NB = found_NB.clone()
    _leave_out(ids_NA.numpy(), left_NB.numpy())
    return left_NB


def known_classes(class_counts: np.ndarray, min_rows: int) -> torch.Tensor | None:
    """The classes with at least `min_rows` training rows, int64 (M,), or None where they are too few or all.

    Args:
        class_counts: int64 (C,), training rows of every class.
        min_rows: At least 0.
    """
    known_M = np.flatnonzero(class_counts >= min_rows)
    few = len(known_M) < MIN_KNOWN or len(known_M) == len(class_counts)
    return None if few else torch.from_numpy(known_M)


class ClassPairs(NamedTuple):
    """Which rows each class is fitted on.

    Args:
        indptr: int64 (C + 1,), class c has the pairs ``indptr[c]:indptr[c + 1]``.
        rows: int32 (P,), rising within a class.
        positive: bool (P,), whether the class is true for the row.
    """

    indptr: torch.Tensor
    rows: torch.Tensor
    positive: torch.Tensor


def class_pairs(labels: CsrArrays, candidates_NA: np.ndarray) -> ClassPairs:
    """Every class's true rows, and the other rows that it is a candidate for.

    Args:
        labels: True classes of N rows.
        candidates_NA: int32 (N, A), distinct within a row; -1 for none.
    """
    counts_C = np.zeros(labels.num_columns + 1, dtype=np.int64)
    arrays = labels.indptr, labels.indices, candidates_NA
    _count_pairs(*arrays, counts_C)
    indptr = np.cumsum(counts_C)
    rows, positive = np.empty(indptr[-1], dtype=np.int32), np.empty(indptr[-1], dtype=np.bool_)
    _write_pairs(*arrays, indptr[:-1].copy(), rows, positive)
    return ClassPairs(*(torch.from_numpy(array) for array in (indptr, rows, positive)))


@numba.njit(cache=True, nogil=True)
def _count_pairs(indptr, labels, candidates_NA, counts_C):
    for n in range(len(candidates_NA)):
        own = labels[indptr[n] : indptr[n + 1]]
        for c in own:
            counts_C[c + 1] += 1
        for c in candidates_NA[n]:
            counts_C[c + 1] += c >= 0 and not _holds(own, c)


@numba.njit(cache=True, nogil=True)
def _write_pairs(indptr, labels, candidates_NA, next_C, rows, positive):
    for n in range(len(candidates_NA)):
        own = labels[indptr[n] : indptr[n + 1]]
        for c in own:
            rows[next_C[c]], positive[next_C[c]] = n, True
            next_C[c] += 1
        for c in candidates_NA[n]:
            if c >= 0 and not _holds(own, c):
                rows[next_C[c]], positive[next_C[c]] = n, False
                next_C[c] += 1


@numba.njit(nogil=True)
def _holds(rising, value):
    at = np.searchsorted(rising, value)
    return at < len(rising) and rising[at] == value


@numba.njit(cache=True, nogil=True)
def _leave_out(ids_NA, found_NB):
    """Puts -1 for every class that the row has in `ids_NA`."""
    for n in range(len(ids_NA)):
        for b in range(found_NB.shape[1]):
            for a in range(ids_NA.shape[1]):
                if ids_NA[n, a] == found_NB[n, b]:
                    found_NB[n, b] = -1
                    break
