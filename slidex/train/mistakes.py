"""The worst mistakes of a model, with names, for people to read.

A row is a mistake where its first prediction is none of its true classes. How bad it is is the margin: the first
prediction's score less the best true class's. Scores are logits, so that in a softmax the margin is the log of how
many times as probable the model holds the wrong class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from slidex.errors import ConfigError
from slidex.metrics import first_is_true

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slidex.data.csr import CsrArrays
    from slidex.nn.classifier import Classifier

SHOWN_FEATURES = 12
"""Features of a row that are named: those of largest magnitude."""


class MistakeKeeper:
    """Keeps the rows with the largest margins; equal margins by row.

    Args:
        model: Whose predictions they are.
        count: Rows to keep, at least 1.
        class_counts: int64 (C,), training rows of each class.
        label_names: Name of every class, or None.
        feature_names: Name of every feature, or None.

    Raises:
        ConfigError: `count` is below 1.
    """

    def __init__(
        self,
        model: Classifier,
        count: int,
        class_counts: np.ndarray,
        *,
        label_names: Sequence[str] | None = None,
        feature_names: Sequence[str] | None = None,
    ) -> None:
        if count < 1:
            raise ConfigError(
                f"The 'count' parameter of MistakeKeeper must be at least 1. Got {count!r} instead."
            )
        self._model, self._count, self._counts = model, count, class_counts
        self._label_names, self._feature_names = label_names, feature_names
        self._kept: list[tuple[float, int, dict[str, Any]]] = []

    def update(
        self, first_row: int, x: CsrArrays, y: CsrArrays, scores_NK: torch.Tensor, ids_NK: torch.Tensor
    ) -> None:
        """Look at the predictions for some rows.

        Args:
            first_row: Number of the first of them in the split.
            x: Their features, N rows.
            y: Their true classes; rows without any are passed over.
            scores_NK: float (N, K), best first.
            ids_NK: int64 (N, K), -1 where a row has fewer; a row without predictions is passed over.
        """
        top_N, labels_N = ids_NK[:, 0].numpy(), np.diff(y.indptr)
        missed = np.flatnonzero((top_N >= 0) & (labels_N > 0) & ~first_is_true(top_N, y))
        if len(missed) == 0:
            return
        own_y = y.take(missed)
        true_MP = _padded(own_y)
        true_scores_MP = self._model.scores(x.take(missed), true_MP)
        margins_M = (scores_NK[missed, 0] - true_scores_MP.amax(dim=1)).numpy()
        least = self._kept[-1][0] if len(self._kept) == self._count else -np.inf
        for m in np.argsort(-margins_M, kind="stable")[: self._count]:
            margin, n = float(margins_M[m]), int(missed[m])
            if margin > least:
                record = {
                    "row": first_row + n,
                    "margin": round(margin, 4),
                    "features": self._features(x, n),
                    "true": self._classes(true_MP[m], true_scores_MP[m]),
                    "predicted": self._classes(ids_NK[n], scores_NK[n]),
                }
                self._kept.append((margin, first_row + n, record))
        self._kept = sorted(self._kept, key=lambda kept: (-kept[0], kept[1]))[: self._count]

    def worst(self) -> list[dict[str, Any]]:
        """The kept rows, worst first.

        Returns:
            For each ``row``, ``margin``, ``features`` (at most `SHOWN_FEATURES`, with ``id``, ``value`` and, where
            features have names, ``name``), ``true`` and ``predicted`` classes, best score first (``id``, ``score``,
            ``training_rows`` and, where classes have names, ``name``).
        """
        return [record for _, _, record in self._kept]

    def _features(self, x: CsrArrays, row: int) -> list[dict[str, Any]]:
        part = slice(int(x.indptr[row]), int(x.indptr[row + 1]))
        ids = np.asarray(x.indices[part])
        values = np.ones(len(ids)) if x.values is None else np.asarray(x.values[part])
        order = np.argsort(-np.abs(values), kind="stable")[:SHOWN_FEATURES]
        return [
            {"id": int(ids[i]), "value": round(float(values[i]), 4)}
            | ({"name": self._feature_names[int(ids[i])]} if self._feature_names is not None else {})
            for i in order
        ]

    def _classes(self, ids_P: torch.Tensor, scores_P: torch.Tensor) -> list[dict[str, Any]]:
        order = torch.argsort(scores_P, descending=True, stable=True)
        return [
            {"id": c, "score": round(float(scores_P[i]), 4), "training_rows": int(self._counts[c])}
            | ({"name": self._label_names[c]} if self._label_names is not None else {})
            for i, c in ((int(i), int(ids_P[i])) for i in order)
            if c >= 0
        ]


def _padded(y: CsrArrays) -> torch.Tensor:
    """True classes as int64 (N, most of any row), padded with -1."""
    counts_N = np.diff(y.indptr)
    ids_NP = np.full((y.num_rows, int(counts_N.max())), -1, dtype=np.int64)
    ids_NP[np.arange(ids_NP.shape[1]) < counts_N[:, None]] = y.indices
    return torch.from_numpy(ids_NP)


def format_mistakes(mistakes: Sequence[dict[str, Any]]) -> str:
    """Some lines for each mistake, to read on a terminal.

    Args:
        mistakes: What `MistakeKeeper.worst` returned.

    Returns:
        Lines without a final newline.
    """
    lines = []
    for mistake in mistakes:
        lines.append(f"row {mistake['row']}: margin {mistake['margin']:.2f}")
        features = ", ".join(item.get("name", f"#{item['id']}") for item in mistake["features"])
        lines.append(f"  features   {features or '-'}")
        lines += [
            f"  {name:<9}" + "".join(f"  {_shown(item)}" for item in mistake[name][:5])
            for name in ("true", "predicted")
        ]
    return "\n".join(lines)


def _shown(item: dict[str, Any]) -> str:
    name = item.get("name", f"#{item['id']}")
    return f"{name} {item['score']:.2f} ({item['training_rows']:,} rows)"
