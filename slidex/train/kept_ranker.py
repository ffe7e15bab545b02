"""The linear ranker of a run, kept in the run directory.

ranker/ranker.json               step of the weights, number of features, what it was fitted on; its own checksum
ranker/state_HASH.safetensors    its weights, and the index of training rows and the groups of classes where it has
                                 them. HASH begins its checksum
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from slidex.errors import CheckpointError, ConfigError
from slidex.kernels import InvertedIndex, LinearWeights, RowLabels
from slidex.metrics import propensities
from slidex.nn.class_groups import ClassGroups
from slidex.nn.ranker import LinearRanker, NeighborSearch, known_classes
from slidex.train.records import load_tensors, read_record, write_record

if TYPE_CHECKING:
    from pathlib import Path

    from slidex.train.config import TrainConfig

FOLDER, FILE, KIND = "ranker", "ranker.json", ("slidex-ranker", 2)
NEIGHBORS, GROUPS = "neighbors.", "groups."
"""Before the names of their tensors."""
_WEIGHTS = ("indptr", "features", "values", "bias")
_FIELDS = {"step": int, "rows": int, "pairs": int, "num_features": int}


@dataclass(frozen=True, slots=True)
class KeptRanker:
    """A ranker as it lies in a run directory.

    Args:
        step: Of the checkpoint whose weights it was fitted beside.
        rows: Training rows that it was fitted on.
        pairs: Of class and row.
        weights: Of its classes.
        search: That proposes classes beside the network; None where none does.
        groups: Of classes; None where there are none.
    """

    step: int
    rows: int
    pairs: int
    weights: LinearWeights
    search: NeighborSearch | None
    groups: ClassGroups | None

    def describe(self) -> str:
        """One line for people."""
        size = f"{len(self.weights.values):,} weights ({self.weights.nbytes / 1e6:.1f} MB)"
        if self.search is not None:
            size += f", index of training rows ({self.search.nbytes / 1e6:.1f} MB)"
        if self.groups is not None:
            size += f", {self.groups.num_groups:,} groups of classes ({self.groups.nbytes / 1e6:.1f} MB)"
        return f"{size}, fitted on {self.pairs:,} pairs of class and row; step {self.step}"

    def ranker(self, config: TrainConfig, class_counts: np.ndarray, train_rows: int) -> LinearRanker:
        """With the settings of the run, and int64 (C,) how many of its training rows have each class."""
        prior_C = None
        if config.ranker_tail:
            log_propensity_C = np.log(propensities(class_counts, train_rows))
            prior_C = torch.from_numpy((-config.ranker_tail * log_propensity_C).astype(np.float32))
        known_M = None if self.search is None else known_classes(class_counts, config.ranker_min_rows)
        return LinearRanker(
            self.weights,
            config.ranker_candidates,
            config.ranker_weight,
            config.ranker_floor,
            prior_C,
            known_M,
            self.search,
            config.ranker_neighbors,
            self.groups,
        )


def save_ranker(run: Path, kept: KeptRanker) -> None:
    """Writes a ranker into the run directory `run`, in place of an earlier one.

    Raises:
        CheckpointError: It cannot be written; an earlier one is then still there.
    """
    weights = kept.weights
    body = {"step": kept.step, "rows": kept.rows, "pairs": kept.pairs, "num_features": weights.num_features}
    tensors = {name: getattr(weights, name) for name in _WEIGHTS}
    if kept.search is not None:
        index, labels = kept.search.index, kept.search.labels
        lists = {"indptr": index.indptr, "rows": index.rows, "values": index.values}
        lists |= {"label_indptr": labels.indptr, "labels": labels.classes}
        tensors |= {NEIGHBORS + name: tensor for name, tensor in lists.items()}
    if kept.groups is not None:
        lists = {name: getattr(kept.groups.weights, name) for name in _WEIGHTS}
        lists["group_C"] = kept.groups.group_C
        tensors |= {GROUPS + name: tensor for name, tensor in lists.items()}
    write_record(run / FOLDER / FILE, KIND, body, tensors)


def load_ranker(run: Path) -> KeptRanker | None:
    """The ranker in the run directory `run`, or None if there is none.

    Raises:
        CheckpointError: It is damaged, of another version, or its weights are missing or altered.
    """
    file = run / FOLDER / FILE
    body = read_record(file, KIND, _FIELDS)
    if body is None:
        return None
    tensors = load_tensors(file, body["files"])
    lists, grouped = (
        {name.removeprefix(start): tensors.pop(name) for name in list(tensors) if name.startswith(start)}
        for start in (NEIGHBORS, GROUPS)
    )
    num_features = body["num_features"]
    try:
        weights, search, groups = LinearWeights(**tensors, num_features=num_features), None, None
        if lists:
            labels = RowLabels(lists.pop("label_indptr"), lists.pop("labels"), len(weights.bias))
            search = NeighborSearch(InvertedIndex(**lists, num_rows=body["rows"]), labels)
            if search.index.num_features != num_features:
                raise ConfigError(f"an index of {search.index.num_features} features for {num_features}")
        if grouped:
            groups = ClassGroups(grouped.pop("group_C"), LinearWeights(**grouped, num_features=num_features))
            if len(groups.group_C) != len(weights.bias):
                raise ConfigError(f"groups of {len(groups.group_C)} classes for {len(weights.bias)}")
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: its weights are damaged: {error}") from error
    return KeptRanker(body["step"], body["rows"], body["pairs"], weights, search, groups)
