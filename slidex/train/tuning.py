"""Choosing the index of prediction: the fastest that keeps what exact scoring finds on rows it has not learned from.

Every kind of index and setting is built over the trained rows, given hidden vectors of training rows where it learns
from them, and asked for the candidates of held-out rows; the candidates are scored exactly. Half of the held-out rows
choose, the other half report: a winner of many trials looks better on the rows that made it the winner. None of them
are among the training rows that an index learns from.

Recall is one of two shares. ``hits``: of the rows whose first class exact scoring gets right, those the index gets
right too; rows that only the index gets right do not make up for lost ones, so P@1 kept is at least as high.
``top-k``: of exact scoring's k best classes, those that the index's k best have.

Legend: N rows, A candidates per row, C classes, D hidden width, K classes wanted per row.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from slidex.errors import ConfigError, SlidexError
from slidex.kernels import cpu as kernels
from slidex.lsh import exact_topk_and_total, index_names, make_index, recall_at_k
from slidex.metrics import first_is_true
from slidex.nn.classifier import PREDICT_ROWS
from slidex.nn.partition import PARTITION_CLASSES
from slidex.train.held_out import held_out, hidden_vectors, training_queries
from slidex.train.search_space import search_space
from slidex.train.tuned import TunedIndex, learned_state, save_tuned

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from slidex.data import CsrArrays, Dataset
    from slidex.lsh import CandidateIndex, QuerySample
    from slidex.nn.classifier import Classifier
    from slidex.train.run import Run

MEASURES = ("hits", "top-k")
CANDIDATES = (16, 32, 64, 128, 256, 512, 1024)
"""Candidates per row that are tried."""
_PASSES = 3
_EXACT_ROWS, _LATENCY_ROWS = 512, 300


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneSettings:
    """What is asked of the index.

    Args:
        recall: The least share to be kept, above 0, at most 1.
        measure: Of what, one of `MEASURES`.
        k: Classes per row that prediction is for.
        rows: Held-out rows, half to choose and half to report; at least 2.
        split: Whose rows; None for the run's validation rows, or else training rows.
        indexes: Kinds to try; None for all that are installed.
        train_rows: The most training rows given to an index that learns from them; None for all that fit in 1 GiB.
        partition_classes: Random classes for the partition function.

    Raises:
        ConfigError: a value is out of range.
    """

    recall: float = 0.99
    measure: str = "hits"
    k: int = 5
    rows: int = 4096
    split: str | None = None
    indexes: tuple[str, ...] | None = None
    train_rows: int | None = None
    partition_classes: int = PARTITION_CLASSES

    def __post_init__(self) -> None:
        """Checks the values."""
        for name, holds, wanted in (
            ("recall", 0 < self.recall <= 1, "above 0 and at most 1"),
            ("measure", self.measure in MEASURES, f"one of {MEASURES}"),
            ("k", 1 <= self.k <= CANDIDATES[-1], f"from 1 to {CANDIDATES[-1]}"),
            ("rows", self.rows >= 2, "at least 2"),
            ("train_rows", self.train_rows is None or self.train_rows >= 1, "at least 1"),
            ("partition_classes", self.partition_classes >= 1, "at least 1"),
            (
                "indexes",
                self.indexes is None or set(self.indexes) <= set(index_names()),
                f"of {index_names()}",
            ),
        ):
            if not holds:
                raise ConfigError(
                    f"The {name!r} parameter of tune-index must be {wanted}. Got {getattr(self, name)!r} instead."
                )


@dataclass(frozen=True, slots=True)
class Exact:
    """What exact scoring says of some rows: `ids_NK`, `log_total_N`, and whether the first class is true."""

    hidden_ND: torch.Tensor
    y: CsrArrays
    ids_NK: torch.Tensor
    log_total_N: torch.Tensor
    hit_N: np.ndarray

    @classmethod
    def of(cls, model: Classifier, x: CsrArrays, y: CsrArrays, k: int) -> Exact:
        """Scores all classes for the rows."""
        hidden_ND = hidden_vectors(model, x)
        head = model.head
        _, ids_NK, log_total_N = exact_topk_and_total(hidden_ND, head.weight, head.bias, k)
        return cls(hidden_ND, y, ids_NK, log_total_N, first_is_true(ids_NK[:, 0].numpy(), y))

    def shares(self, ids_NK: torch.Tensor) -> dict[str, float | None]:
        """``hits`` and ``top-k``, and P@1 of these predictions over exact's; None where exact has nothing to keep."""
        hit_N = first_is_true(ids_NK[:, 0].numpy(), self.y)
        right = int(self.hit_N.sum())
        return {
            "hits": float((hit_N & self.hit_N).sum() / right) if right else None,
            "P@1 kept": float(hit_N.sum() / right) if right else None,
            "top-k": recall_at_k(ids_NK, self.ids_NK),
        }


def tune(
    run: Run,
    dataset: Dataset,
    settings: TuneSettings,
    notify: Callable[[dict[str, Any]], None] = lambda _: None,
) -> TunedIndex:
    """Chooses an index for prediction, measures it, and keeps it in the run directory.

    Args:
        run: A trained run; the weights of its best checkpoint are used, or the last.
        dataset: The one it was trained on.
        settings: What is asked.
        notify: Told of each trial: its record.

    Raises:
        DataError: the data set has other sizes than the model, no such split, or too few labelled rows.
        SlidexError: no setting keeps the recall asked for; an earlier choice is kept as it was.
    """
    run.check_sizes(dataset)
    checkpoint = run.checkpoint()
    model = run.network(checkpoint)
    held = held_out(run, dataset, settings.split, settings.rows)
    chooses = Exact.of(model, *held.half(False), settings.k)
    if settings.measure == "hits" and not chooses.hit_N.any():
        raise ConfigError(
            "The 'measure' parameter of tune-index must be top-k where exact scoring gets no first class right: "
            f"there are no hits to keep. Got 'hits' instead, with {len(chooses.hit_N)} rows of {held.source}."
        )
    queries = training_queries(model, dataset, held.excluded, settings.train_rows)
    trials, best, best_index = _try_all(run, model, chooses, queries, settings, notify)
    tuned = TunedIndex(
        index=best["index"],
        options=best["options"],
        seed=run.config.seed,
        candidates=best["candidates"],
        partition_classes=settings.partition_classes,
        step=checkpoint.step,
        rows={
            "source": held.source,
            "chosen_on": len(chooses.hit_N),
            "reported_on": held.x.num_rows - len(chooses.hit_N),
            "learned_from": len(queries.hidden_ND),
            "goal": settings.recall,
            "measure": settings.measure,
        },
        report={},
        trials=trials,
    )
    with_index = replace(
        model, index=best_index, candidates=tuned.candidates, partition_classes=tuned.partition_classes
    )
    tuned = replace(tuned, report=report(with_index, *held.half(True), settings.k))
    save_tuned(run.path, tuned, learned_state(best_index))
    return tuned


def _try_all(
    run: Run,
    model: Classifier,
    chooses: Exact,
    queries: QuerySample,
    settings: TuneSettings,
    notify: Callable[[dict[str, Any]], None],
) -> tuple[list[dict[str, Any]], dict[str, Any], CandidateIndex]:
    """Every trial, the fastest that meets the goal, and its index."""
    trials, best, best_index = [], None, None
    for name, options in search_space(model.head.num_classes, settings.indexes):
        trial, index = try_index(model, name, options, chooses, queries, settings, run.config.seed)
        trials.append(trial)
        notify(trial)
        if trial["meets"] and (best is None or trial["microseconds_per_row"] < best["microseconds_per_row"]):
            best, best_index = trial, index
    if best is None or best_index is None:
        nearest = max(trials, key=lambda trial: trial[settings.measure])
        raise SlidexError(
            f"no index keeps {settings.recall:g} of {settings.measure}; the nearest is {nearest['index']} "
            f"{nearest['options']} with {nearest[settings.measure]:.4f}. Lower --recall, or use exact scoring."
        )
    return trials, best, best_index


def try_index(
    model: Classifier,
    name: str,
    options: dict[str, Any],
    exact: Exact,
    queries: QuerySample,
    settings: TuneSettings,
    seed: int,
) -> tuple[dict[str, Any], CandidateIndex]:
    """Builds an index and looks for the fewest candidates that keep the recall.

    Returns:
        The trial: ``index``, ``options``, ``build_seconds`` and what `fewest_candidates` returns; and the index.
    """
    head = model.head
    started = time.perf_counter()
    index = make_index(name, head.in_features, head.num_classes, seed=seed, **options)
    index.build(head.weight, head.bias, queries=queries if index.uses_queries else None)
    trial = {"index": name, "options": options, "build_seconds": time.perf_counter() - started}
    return trial | fewest_candidates(model, index, exact, settings), index


def fewest_candidates(
    model: Classifier,
    index: CandidateIndex,
    exact: Exact,
    settings: TuneSettings,
    tried: Sequence[int] = CANDIDATES,
) -> dict[str, Any]:
    """The fewest candidates of those `tried` that keep the recall, or the most where none do.

    Returns:
        ``candidates``, ``hits``, ``P@1 kept``, ``top-k``, ``microseconds_per_row`` of asking and scoring, and whether
        it ``meets`` the goal.
    """
    counts = sorted({min(max(count, settings.k), model.head.num_classes) for count in tried})
    shares = _prefix_shares(model, index, exact, counts, settings)
    first = next((i for i, found in enumerate(shares) if found >= settings.recall), len(counts) - 1)
    trial: dict[str, Any] = {}
    for count in counts[first:]:  # an index need not give the same classes when asked for fewer
        ids_NK, seconds = _timed(model, index, exact, count, settings.k)
        found = exact.shares(ids_NK)
        micros = 1e6 * seconds / len(exact.hidden_ND)
        meets = (found[settings.measure] or 0.0) >= settings.recall
        trial = {"candidates": count, **found, "microseconds_per_row": micros, "meets": meets}
        if meets:
            break
    return trial


def _prefix_shares(
    model: Classifier, index: CandidateIndex, exact: Exact, counts: list[int], settings: TuneSettings
) -> list[float]:
    """What the first of `counts[-1]` candidates would keep, for each count."""
    kept: list[list[torch.Tensor]] = [[] for _ in counts]
    for hidden_ND in exact.hidden_ND.split(PREDICT_ROWS):
        candidates_NA = index.query(hidden_ND, counts[-1])
        logits_NA = kernels.pair_logits(hidden_ND, model.head.weight, model.head.bias, candidates_NA)
        for ids, count in zip(kept, counts, strict=True):
            best_NK = logits_NA[:, :count].topk(min(settings.k, count)).indices
            ids.append(candidates_NA.gather(1, best_NK))
    return [exact.shares(torch.cat(ids))[settings.measure] or 0.0 for ids in kept]


def _timed(
    model: Classifier, index: CandidateIndex, exact: Exact, count: int, k: int
) -> tuple[torch.Tensor, float]:
    """Predictions from `count` candidates, int64 (N, K), and the median seconds of some passes over the rows."""
    seconds, found = [], torch.empty(0)
    for _ in range(_PASSES):
        started = time.perf_counter()
        blocks = [
            model.head.topk(hidden_ND, k, candidates_NA=index.query(hidden_ND, count))[1]
            for hidden_ND in exact.hidden_ND.split(PREDICT_ROWS)
        ]
        seconds.append(time.perf_counter() - started)
        found = torch.cat(blocks)
    return found, statistics.median(seconds)


def report(model: Classifier, x: CsrArrays, y: CsrArrays, k: int) -> dict[str, Any]:
    """What prediction with the model's index costs and keeps, encoder included, on rows that did not choose it."""
    exact = Exact.of(model, x, y, k)
    some = x.slice(0, min(_EXACT_ROWS, x.num_rows))
    exact_seconds = min(_seconds(model, some, k, indexed=False) for _ in range(2))
    seconds = statistics.median(_seconds(model, x, k, indexed=True) for _ in range(_PASSES))
    ids_NK = torch.cat([ids for _, ids in model.topk(x, k, indexed=True)])
    shares = exact.shares(ids_NK)
    right, hits = int(exact.hit_N.sum()), shares["hits"]
    latencies = _latencies(model, x, k)
    micros, exact_micros = 1e6 * seconds / x.num_rows, 1e6 * exact_seconds / some.num_rows
    return {
        "rows": x.num_rows,
        "k": k,
        "exact P@1": right / x.num_rows,
        "index P@1": float(first_is_true(ids_NK[:, 0].numpy(), y).mean()),
        **shares,
        "standard error of hits": math.sqrt(hits * (1 - hits) / right) if hits is not None else None,
        "microseconds_per_row": micros,
        "exact_microseconds_per_row": exact_micros,
        "times_faster": exact_micros / micros,
        "latency_p50_microseconds": float(np.percentile(latencies, 50)),
        "latency_p99_microseconds": float(np.percentile(latencies, 99)),
        "threads": torch.get_num_threads(),
        "index_bytes": 0 if model.index is None else model.index.stats().bytes,
        "partition": partition_report(model, x, exact) if model.head.loss == "softmax" else None,
    }


def _seconds(model: Classifier, x: CsrArrays, k: int, *, indexed: bool) -> float:
    started = time.perf_counter()
    for _ in model.topk(x, k, indexed=indexed):
        pass
    return time.perf_counter() - started


def _latencies(model: Classifier, x: CsrArrays, k: int) -> list[float]:
    """Microseconds for one row at a time, after some to warm up."""
    rows = [x.slice(n, n + 1) for n in range(min(_LATENCY_ROWS, x.num_rows))]
    for row in rows[:10]:
        _seconds(model, row, k, indexed=True)
    return [1e6 * _seconds(model, row, k, indexed=True) for row in rows]


def partition_report(model: Classifier, x: CsrArrays, exact: Exact) -> dict[str, Any]:
    """The error of the estimated partition function Z, relative to Z, and how well first probabilities fit."""
    k = exact.ids_NK.shape[1]
    ranked = list(model.ranked(x, k, indexed=True, totals=True))
    estimate_N = torch.cat([best.log_total_N for best in ranked if best.log_total_N is not None])
    error_N = (estimate_N.double() - exact.log_total_N.double()).exp() - 1
    first_N = torch.cat([best.logits_NK[:, 0] for best in ranked])
    return {
        "classes": len(model.partition_estimator(k).ids_S),
        "mean_error": float(error_N.mean()),
        "rms_error": float(error_N.square().mean().sqrt()),
        "p95_error": float(error_N.abs().quantile(0.95)),
        "mean_first_probability": float((first_N - estimate_N).exp().mean()),
        "mean_first_probability_exact_total": float((first_N - exact.log_total_N).exp().mean()),
    }
