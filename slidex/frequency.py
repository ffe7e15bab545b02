"""Metrics by how frequent the true classes are: one line for each tenth of the training labels.

The deciles are of label mass, not of classes: with classes sorted from most to least frequent, each decile holds a
tenth of all training labels. So is the long tail usually drawn (bins of equal numbers of training points), and each
line stands for as many labels. Deciles of classes would say less: where most classes have one or two training rows,
the border between two such deciles falls among classes of equal frequency, and nine of ten say "rare".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from slidex.errors import ConfigError
from slidex.metrics import MetricAccumulator, MetricGroups

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slidex.data.csr import CsrArrays

DECILES = 10
UNSEEN = "unseen"
"""Name of the group of classes without training rows."""


def frequency_groups(class_counts: np.ndarray) -> MetricGroups:
    """Deciles of the training label mass, ``"1"`` the most frequent classes, and `UNSEEN`.

    With classes sorted from most to least frequent (equal counts by id), a class is in decile d where the classes
    before it hold at least (d - 1) tenths of all training labels and less than d tenths. A class that holds more than
    a tenth by itself leaves the next decile empty. Classes without training rows are in no decile.

    Args:
        class_counts: integer (C,), training rows of each class, not negative.

    Raises:
        ConfigError: `class_counts` is no such array.
    """
    counts = np.asarray(class_counts)
    if counts.ndim != 1 or counts.dtype.kind not in "iu" or len(counts) == 0 or int(counts.min()) < 0:
        raise ConfigError(
            "The 'class_counts' parameter of frequency_groups must be a non-empty integer array (C,) without "
            f"negative values. Got {counts.dtype} {counts.shape} instead."
        )
    counts = counts.astype(np.int64)
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    group_C = np.full(len(counts), DECILES, dtype=np.int8)
    seen = counts[order] > 0
    group_C[order[seen]] = DECILES * before[seen] // max(1, int(counts.sum()))
    return MetricGroups((*(str(d) for d in range(1, DECILES + 1)), UNSEEN), group_C)


class FrequencyAccumulator:
    """Collects top-k predictions batch by batch for P, recall and share of P at k of every decile.

    Args:
        class_counts: integer (C,), training rows of each class.
        num_train_rows: Rows of the training set.
        ks: The k to report.

    Raises:
        ConfigError: An argument is out of range.
    """

    def __init__(self, class_counts: np.ndarray, num_train_rows: int, ks: Sequence[int]) -> None:
        self._groups = frequency_groups(class_counts)
        self._counts = np.asarray(class_counts)
        self._ks = sorted(set(ks))
        self._metrics = MetricAccumulator(class_counts, num_train_rows, ks, groups=self._groups)

    def update(self, topk_ids: np.ndarray, labels: CsrArrays) -> None:
        """Add a batch of rows; see `MetricAccumulator.update`."""
        self._metrics.update(topk_ids, labels)

    def compute(self) -> list[dict[str, Any]]:
        """A record for each decile, most frequent classes first, then for classes without training rows.

        Returns:
            ``decile`` ("1" to "10" or "unseen"), ``classes``, ``fewest`` and ``most`` training rows of a class of it
            (None where it is empty), ``rows`` (with a true class of the decile), and for every k ``P@k``,
            ``recall@k`` (means over these rows, of the decile's true classes alone; None without rows) and
            ``share of P@k``: the decile's hits over k, over all rows. The shares add up to P@k of all classes.
        """
        result = self._metrics.compute()
        return [
            {"decile": name, **self._sizes(g), **self._line(result["groups"][name], result["rows"])}
            for g, name in enumerate(self._groups.names)
        ]

    def _sizes(self, group: int) -> dict[str, int | None]:
        counts = self._counts[self._groups.group_C == group]
        return {
            "classes": len(counts),
            "fewest": int(counts.min()) if len(counts) else None,
            "most": int(counts.max()) if len(counts) else None,
        }

    def _line(self, part: dict[str, Any], rows: int) -> dict[str, Any]:
        line = {"rows": part["rows"]}
        line |= {f"{name}@{k}": part[f"{name}@{k}"] for name in ("P", "recall") for k in self._ks}
        for k in self._ks:
            hits = (part[f"P@{k}"] or 0.0) * part["rows"]
            line[f"share of P@{k}"] = hits / rows if rows else None
        return line


def format_frequency(deciles: Sequence[dict[str, Any]]) -> str:
    """A table for a terminal, metrics in percent: one line a decile; "-" where a value is undefined.

    Args:
        deciles: What `FrequencyAccumulator.compute` returned.

    Returns:
        Lines without a final newline.
    """
    keys = [key for key in deciles[0] if "@" in key]
    heads = ("decile", "classes", "frequency", "rows", *(key.replace("share of", "of") for key in keys))
    lines = [heads]
    for line in deciles:
        most = line["most"]
        frequency = "-" if most is None else f"{line['fewest']:,}" + (f"-{most:,}" if most else "")
        cells = ["-" if line[key] is None else f"{100 * line[key]:.2f}" for key in keys]
        lines.append((line["decile"], f"{line['classes']:,}", frequency, f"{line['rows']:,}", *cells))
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )
