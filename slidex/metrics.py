"""Ranking quality of top-k predictions: P, nDCG, recall, PSP and PSnDCG at k, overall and by class frequency.

One pass over the rows feeds running sums in row order, so predictions may arrive in batches of any size and
the result is the same to the last bit. The definitions are those of the Extreme Classification Repository: a
rank left empty is a miss and k stays the divisor, and the propensity-scored metrics are a ratio of two sums
over all rows (reached over best reachable), not a mean of ratios. Results are fractions in [0, 1].

Shape suffixes: N rows, C classes, P true classes of a row, K ranks (the largest k asked for), G groups (all,
head, torso, tail), M sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numba
import numpy as np

from slidex.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slidex.data.csr import CsrArrays

GROUPS = ("head", "torso", "tail")
METRICS = ("P", "nDCG", "recall", "PSP", "PSnDCG")

# The sums kept: the five metrics in METRICS' order, then what the last two could at best have reached.
_P, _NDCG, _RECALL, _PSP, _PSNDCG, _BEST_PSP, _BEST_PSNDCG = range(7)


def propensities(class_counts: np.ndarray, num_rows: int, a: float = 0.55, b: float = 1.5) -> np.ndarray:
    """Probability that a relevant class was really annotated, from how often training data show it.

    ``p_c = 1 / (1 + S (n_c + b)^-a)`` with ``S = (log N - 1)(b + 1)^a`` (Jain, Prabhu and Varma, KDD 2016).
    The repository uses a, b = 0.5, 0.4 for the Wikipedia sets, 0.6, 2.6 for the Amazon sets, and the defaults
    elsewhere. Below three rows S would be negative and p above 1; S is then 0 and every propensity 1.

    Args:
        class_counts: (C,), training rows of each class; zeros are allowed.
        num_rows: Training rows, at least 1.
        a: Exponent, finite and >= 0.
        b: Offset, finite and > 0.

    Returns:
        float64 (C,), each in (0, 1].

    Raises:
        ConfigError: An argument is out of range.
    """
    counts = _checked_counts(class_counts, "propensities")
    _require(num_rows >= 1, "num_rows", "propensities", "an integer >= 1", num_rows)
    _require(math.isfinite(a) and a >= 0, "a", "propensities", "finite and >= 0", a)
    _require(math.isfinite(b) and b > 0, "b", "propensities", "finite and > 0", b)
    scale = max(math.log(num_rows) - 1, 0.0) * (b + 1) ** a
    return 1 / (1 + scale * (counts + b) ** -a)


def head_torso_tail(class_counts: np.ndarray, shares: tuple[float, float] = (1 / 3, 2 / 3)) -> np.ndarray:
    """Split the classes into head, torso and tail by the label mass they hold in training.

    With classes sorted from most to least frequent (equal counts by id), a class is *head* while the classes
    before it hold less than ``shares[0]`` of all training labels, *torso* while they hold less than
    ``shares[1]``, and *tail* after that. Classes without training rows are always tail. A group can be empty:
    one class with all the labels is the whole head.

    Args:
        class_counts: (C,), training rows of each class.
        shares: Where head and torso end, as fractions of the label mass, in ascending order.

    Returns:
        int8 (C,), the index of each class's group in `GROUPS`.

    Raises:
        ConfigError: An argument is out of range.
    """
    counts = _checked_counts(class_counts, "head_torso_tail")
    head_end, torso_end = shares
    _require(
        0 <= head_end <= torso_end <= 1,
        "shares",
        "head_torso_tail",
        "two fractions, 0 <= first <= second <= 1",
        shares,
    )
    order = np.argsort(-counts, kind="stable")
    sorted_counts = counts[order]
    mass_before = np.cumsum(sorted_counts) - sorted_counts
    total = counts.sum()
    groups = np.empty(len(counts), dtype=np.int8)
    groups[order] = (mass_before >= head_end * total).astype(np.int8) + (mass_before >= torso_end * total)
    return groups


@dataclass(frozen=True, slots=True, eq=False)
class MetricGroups:
    """A partition of the classes to report metrics for.

    Args:
        names: Of the groups.
        group_C: int8 (C,), place of each class's group in `names`.
    """

    names: tuple[str, ...]
    group_C: np.ndarray


class MetricAccumulator:
    """Collects top-k predictions batch by batch and computes every metric of `METRICS` at every k.

    With Y the true classes of a row, r_j its j-th prediction, q = 1 / propensity, and hit_j = [r_j in Y]:

    ======== ================================================= =========================================
    metric   per row                                           over rows
    ======== ================================================= =========================================
    P        sum_j hit_j / k                                   mean
    nDCG     sum_j hit_j / log2(j + 1), over the same sum      mean
             for min(k, abs(Y)) hits at the top
    recall   sum_j hit_j / abs(Y)                              mean
    PSP      sum_j q hit_j / k                                 sum, over the best k true classes' sum
    PSnDCG   sum_j q hit_j / log2(j + 1), over nDCG's divisor  sum, over the best k true classes' sum
    ======== ================================================= =========================================

    In a *group* (by default head, torso, tail) Y is cut down to the group's classes and only their hits count; ranks
    stay those of the full ranking and k stays the divisor. Rows with no true class of the group take no part
    in the group's mean, so P@k of the three groups does not add up to P@k.

    Args:
        class_counts: (C,), training rows of each class.
        num_train_rows: Rows of the training set, for the propensities.
        ks: The k to report; duplicates are dropped and the rest sorted.
        a: Propensity exponent.
        b: Propensity offset.
        shares: Bounds of head and torso, see `head_torso_tail`.
        groups: Other groups than head, torso and tail; `shares` then has no meaning.
        count_unlabelled: Rows without any true class count as 0 in the means of P, nDCG and recall, which is
            the repository's convention (napkinXC does so); False leaves them out. PSP and PSnDCG are
            the same either way.

    Raises:
        ConfigError: An argument is out of range.
    """

    def __init__(
        self,
        class_counts: np.ndarray,
        num_train_rows: int,
        ks: Sequence[int] = (1, 3, 5),
        a: float = 0.55,
        b: float = 1.5,
        *,
        shares: tuple[float, float] = (1 / 3, 2 / 3),
        groups: MetricGroups | None = None,
        count_unlabelled: bool = True,
    ) -> None:
        positive = len(ks) > 0 and all(isinstance(k, int | np.integer) and k >= 1 for k in ks)
        _require(positive, "ks", "MetricAccumulator", "a non-empty sequence of integers >= 1", ks)
        self._ks = sorted({int(k) for k in ks})
        self._count_unlabelled = count_unlabelled
        self._inverse_C = 1 / propensities(class_counts, num_train_rows, a, b)
        if groups is None:
            groups = MetricGroups(GROUPS, head_torso_tail(class_counts, shares))
        self._groups = _checked_groups(groups, len(self._inverse_C))
        self._group_C = groups.group_C + np.int8(1)  # 0 stands for all classes
        self._discount_K = 1 / np.log2(np.arange(2, self._ks[-1] + 2))
        self._sums_GMK = np.zeros((len(self._groups) + 1, _BEST_PSNDCG + 1, self._ks[-1]))
        self._rows_G = np.zeros(len(self._groups) + 1, dtype=np.int64)
        self._rows = 0

    def update(self, topk_ids: np.ndarray, labels: CsrArrays) -> None:
        """Add a batch of rows.

        Args:
            topk_ids: integer (N, at least min(max(ks), C)), predicted classes, best first, distinct within a
                row; -1 where a row has fewer predictions. Columns past max(ks) are ignored.
            labels: N rows by C columns, the true classes; every stored entry counts, whatever its value.

        Raises:
            ConfigError: A shape or dtype does not fit.
            DataError: A class id is out of range, or predicted twice in a row.
        """
        num_classes, K = len(self._group_C), self._ks[-1]
        caller = "MetricAccumulator.update"
        narrowest = min(K, num_classes)
        fits = topk_ids.ndim == 2 and topk_ids.dtype.kind == "i" and topk_ids.shape[1] >= narrowest
        got = (str(topk_ids.dtype), *topk_ids.shape)
        constraint = f"a signed integer array (N, {narrowest} or more), padded with -1"
        _require(fits, "topk_ids", caller, constraint, got)
        expected = (len(topk_ids), num_classes)
        got = (labels.num_rows, labels.num_columns)
        _require(got == expected, "labels", caller, f"{expected[0]} rows by {expected[1]} columns", got)
        topk_NK = np.full((len(topk_ids), K), -1, dtype=np.int64)
        topk_NK[:, : topk_ids.shape[1]] = topk_ids[:, :K]
        _check_range(topk_NK, -1, num_classes, "predicted class")
        _check_range(labels.indices, 0, num_classes, "true class")
        repeated = _first_repeat(topk_NK)
        if repeated >= 0:
            raise DataError(
                f"Row {repeated} predicts a class twice: {topk_NK[repeated].tolist()}. "
                "The ids of a row must be distinct, apart from -1."
            )
        _accumulate(
            topk_NK,
            np.asarray(labels.indptr),
            np.asarray(labels.indices),
            self._inverse_C,
            self._group_C,
            self._discount_K,
            self._sums_GMK,
            self._rows_G,
        )
        self._rows += len(topk_NK)

    def compute(self) -> dict[str, Any]:
        """The metrics over all rows so far, as plain numbers that JSON can hold.

        Returns:
            ``{"rows", "rows_without_labels", "P@1", ..., "groups": {"head": {"classes", "rows", "P@1", ...},
            "torso": ..., "tail": ...}}``. Metrics are fractions in [0, 1], or None where no row takes part.
        """
        labelled = int(self._rows_G[0])
        result: dict[str, Any] = {"rows": self._rows, "rows_without_labels": self._rows - labelled}
        result |= self._metrics(0, self._rows if self._count_unlabelled else labelled)
        sizes = np.bincount(self._group_C, minlength=len(self._groups) + 1)
        result["groups"] = {
            name: {"classes": int(sizes[g]), "rows": int(self._rows_G[g])}
            | self._metrics(g, int(self._rows_G[g]))
            for g, name in enumerate(self._groups, start=1)
        }
        return result

    def _metrics(self, group: int, rows: int) -> dict[str, float | None]:
        sums_MK = self._sums_GMK[group]
        over_K = {"PSP": sums_MK[_BEST_PSP], "PSnDCG": sums_MK[_BEST_PSNDCG]}
        metrics: dict[str, float | None] = {}
        for m, name in enumerate(METRICS):
            for k in self._ks:
                divisor = float(over_K[name][k - 1]) if name in over_K else rows
                metrics[f"{name}@{k}"] = float(sums_MK[m, k - 1]) / divisor if divisor else None
        return metrics


def first_is_true(first_N: np.ndarray, labels: CsrArrays) -> np.ndarray:
    """Whether each row's first prediction is one of its true classes: bool (N,).

    Args:
        first_N: integer (N,), -1 for none.
        labels: N rows, the true classes.
    """
    hit_N = np.zeros(len(first_N), dtype=bool)
    rows_P = labels.row_ids()
    hit_N[rows_P[np.asarray(labels.indices) == first_N[rows_P]]] = True
    return hit_N


def format_metrics(result: dict[str, Any]) -> str:
    """A table for a terminal, in percent: one line a metric, one column each for all classes and the groups.

    Args:
        result: What `MetricAccumulator.compute` returned.

    Returns:
        Lines without a final newline; "-" where a metric is undefined.
    """
    groups = result["groups"]
    keys = [key for key in result if "@" in key]
    lines = [
        _table_line("percent", ["all", *groups]),
        *(_table_line(key, [_percent(part[key]) for part in (result, *groups.values())]) for key in keys),
        _table_line(
            "classes",
            [str(sum(part["classes"] for part in groups.values()))]
            + [str(part["classes"]) for part in groups.values()],
        ),
        _table_line("rows", [str(result["rows"])] + [str(part["rows"]) for part in groups.values()]),
    ]
    if result["rows_without_labels"]:
        lines.append(f"{result['rows_without_labels']} of {result['rows']} rows have no true class.")
    return "\n".join(lines)


def _table_line(name: str, cells: Sequence[str]) -> str:
    return f"{name:<10}" + "".join(f"{cell:>11}" for cell in cells)


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.2f}"


def _require(holds: bool, name: str, caller: str, constraint: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"The {name!r} parameter of {caller} must be {constraint}. Got {value!r} instead.")


def _checked_counts(class_counts: np.ndarray, caller: str) -> np.ndarray:
    """`class_counts` as int64 (C,)."""
    counts = np.asarray(class_counts)
    integral = counts.ndim == 1 and counts.dtype.kind in "iu" and counts.size > 0 and counts.min() >= 0
    constraint = "a non-empty integer array (C,) without negative values"
    _require(integral, "class_counts", caller, constraint, (str(counts.dtype), *counts.shape))
    return counts.astype(np.int64)


def _checked_groups(groups: MetricGroups, num_classes: int) -> tuple[str, ...]:
    """The names, if every class is in one of the groups."""
    group_C = groups.group_C
    fits = group_C.dtype == np.int8 and group_C.shape == (num_classes,)
    fits = fits and group_C.min() >= 0 and group_C.max() < len(groups.names)
    constraint = f"int8 ({num_classes},) with places in {groups.names}"
    _require(fits, "groups", "MetricAccumulator", constraint, (str(group_C.dtype), *group_C.shape))
    return groups.names


def _check_range(ids: np.ndarray, low: int, high: int, what: str) -> None:
    if ids.size and not (low <= ids.min() and ids.max() < high):
        bad = ids.min() if ids.min() < low else ids.max()
        raise DataError(f"A {what} must be in [{low}, {high}). Got {int(bad)} instead.")


@numba.njit(cache=True, nogil=True)
def _first_repeat(topk_NK):
    """The first row that holds an id other than -1 twice, or -1."""
    for n in range(topk_NK.shape[0]):
        for k in range(topk_NK.shape[1]):
            for j in range(k):
                if topk_NK[n, k] >= 0 and topk_NK[n, k] == topk_NK[n, j]:
                    return n
    return -1


@numba.njit(cache=True, nogil=True)
def _insert_descending(best_K, value):
    """Put `value` in its place in the descending `best_K`; the smallest falls off the end."""
    at = len(best_K)
    while at > 0 and best_K[at - 1] < value:
        at -= 1
        if at + 1 < len(best_K):
            best_K[at + 1] = best_K[at]
    if at < len(best_K):
        best_K[at] = value


@numba.njit(cache=True, nogil=True)
def _accumulate(topk_NK, indptr, indices, inverse_C, group_C, discount_K, sums_GMK, rows_G):
    """Add every row to `sums_GMK` (G, M, K) and `rows_G` (G,), in row order."""
    G, _, K = sums_GMK.shape
    best_GK = np.empty((G, K))  # the largest inverse propensities among the row's true classes
    positives_G = np.empty(G, dtype=np.int64)
    hit_K = np.empty(K, dtype=np.bool_)
    for n in range(topk_NK.shape[0]):
        true_P = indices[indptr[n] : indptr[n + 1]]
        best_GK[:] = 0
        positives_G[:] = 0
        for c in true_P:
            for g in (np.int8(0), group_C[c]):
                positives_G[g] += 1
                _insert_descending(best_GK[g], inverse_C[c])
        for k in range(K):
            at = np.searchsorted(true_P, topk_NK[n, k])
            hit_K[k] = at < len(true_P) and true_P[at] == topk_NK[n, k]
        for g in range(G):
            if positives_G[g] == 0:
                continue
            rows_G[g] += 1
            hits, dcg, ideal, gain, gain_dcg, best, best_dcg = 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
            for k in range(K):
                c, discount = topk_NK[n, k], discount_K[k]
                if hit_K[k] and (g == 0 or group_C[c] == g):
                    hits += 1
                    dcg += discount
                    gain += inverse_C[c]
                    gain_dcg += inverse_C[c] * discount
                if k < positives_G[g]:
                    ideal += discount
                    best += best_GK[g, k]
                    best_dcg += best_GK[g, k] * discount
                sums_GMK[g, _P, k] += hits / (k + 1)
                sums_GMK[g, _NDCG, k] += dcg / ideal
                sums_GMK[g, _RECALL, k] += hits / positives_G[g]
                sums_GMK[g, _PSP, k] += gain / (k + 1)
                sums_GMK[g, _PSNDCG, k] += gain_dcg / ideal
                sums_GMK[g, _BEST_PSP, k] += best / (k + 1)
                sums_GMK[g, _BEST_PSNDCG, k] += best_dcg / ideal
