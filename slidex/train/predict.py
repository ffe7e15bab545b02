"""Predictions of a trained model for new rows, as records that say names, not only numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy as np

    from slidex.data import CsrArrays
    from slidex.nn.classifier import Classifier


def predict(
    model: Classifier,
    blocks: Iterable[CsrArrays],
    k: int,
    *,
    names: Sequence[str] | None = None,
    indexed: bool = False,
) -> Iterator[dict[str, Any]]:
    """The k best classes of every row, best first.

    Args:
        model: From `Run.model`.
        blocks: Rows of features, some at a time; predictions leave as blocks come in.
        k: Classes per row.
        names: Name of every class; without, a record has ids only.
        indexed: Score only the classes that the index proposes, instead of all.

    Yields:
        For every row: ``row`` (from 0), and ``classes``, a list of ``id``, ``score`` and, given `names`, ``name``.
        Scores are the model's logits.

    Raises:
        DataError: if a block has another number of features than the model.
    """
    row = 0
    for block in blocks:
        for scores_NK, ids_NK in model.topk(block, k, indexed=indexed):
            for scores, ids in zip(scores_NK.numpy(), ids_NK.numpy(), strict=True):
                yield {
                    "row": row,
                    "classes": [_record(c, s, names) for c, s in zip(ids, scores, strict=True) if c >= 0],
                }
                row += 1


def _record(class_id: np.int64, score: np.float32, names: Sequence[str] | None) -> dict[str, Any]:
    record: dict[str, Any] = {"id": int(class_id), "score": round(float(score), 4)}
    if names is not None:
        record["name"] = names[int(class_id)]
    return record
