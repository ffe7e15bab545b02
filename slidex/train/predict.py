"""Predictions of a trained model for new rows, as records that say names, not only numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy as np
    import torch

    from slidex.data import CsrArrays
    from slidex.nn.classifier import Classifier


def predict(
    model: Classifier,
    blocks: Iterable[CsrArrays],
    k: int,
    *,
    names: Sequence[str] | None = None,
    indexed: bool = False,
    probabilities: bool = False,
) -> Iterator[dict[str, Any]]:
    """The k best classes of every row, best first.

    Args:
        model: From `Run.model`.
        blocks: Rows of features, some at a time; predictions leave as blocks come in.
        k: Classes per row.
        names: Name of every class; without, a record has ids only.
        indexed: Score only the classes that the index proposes, instead of all.
        probabilities: Add a probability to every class: of a model trained with softmax loss its share of the softmax
            over all classes, whose partition function is estimated where `indexed`
            (`slidex.nn.partition.PartitionEstimator`); of one trained with logistic loss the sigmoid of its logit. They
            are the network's own, also where a ranker orders the classes.

    Yields:
        For every row: ``row`` (from 0), and ``classes``, a list of ``id``, ``score``, given `names` ``name``, and if
        asked for ``probability``. Scores are the model's logits, with a ranker's share where it has one.

    Raises:
        DataError: if a block has another number of features than the model.
    """
    row = 0
    totals = probabilities and model.head.loss == "softmax"
    estimator = model.partition_estimator(k) if totals and indexed else None
    for block in blocks:
        ranked = model.ranked(block, k, indexed=indexed, totals=totals, estimator=estimator)
        for best in ranked:
            shares_NK = (
                class_probabilities(best.logits_NK, best.log_total_N).numpy() if probabilities else None
            )
            for n, (scores, ids) in enumerate(zip(best.scores_NK.numpy(), best.ids_NK.numpy(), strict=True)):
                shares = [None] * len(ids) if shares_NK is None else shares_NK[n]
                classes = zip(ids, scores, shares, strict=True)
                yield {"row": row, "classes": [_record(*c, names) for c in classes if c[0] >= 0]}
                row += 1


def class_probabilities(logits_NK: torch.Tensor, log_total_N: torch.Tensor | None) -> torch.Tensor:
    """Probabilities float32 (N, K) of logits: their share of the partition function, at most 1; None for sigmoids."""
    if log_total_N is None:
        return logits_NK.sigmoid()
    return (logits_NK - log_total_N[:, None]).exp().clamp_(max=1.0)


def _record(
    class_id: np.int64, score: np.float32, share: np.float32 | None, names: Sequence[str] | None
) -> dict[str, Any]:
    record: dict[str, Any] = {"id": int(class_id), "score": round(float(score), 4)}
    if share is not None:
        record["probability"] = float(f"{float(share):.6g}")
    if names is not None:
        record["name"] = names[int(class_id)]
    return record
