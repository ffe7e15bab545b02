"""The linear ranker of a run, kept in the run directory.

ranker/ranker.json               step of the weights, number of features, what it was fitted on; its own checksum
ranker/state_HASH.safetensors    its weights, and the centroids where it has some. HASH begins its checksum
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from slidex.errors import CheckpointError, ConfigError
from slidex.kernels import Centroids, LinearWeights
from slidex.metrics import propensities
from slidex.nn.ranker import CentroidSearch, LinearRanker, known_classes
from slidex.train.records import load_tensors, read_record, write_record

if TYPE_CHECKING:
    from pathlib import Path

    from slidex.train.config import TrainConfig

FOLDER, FILE, KIND = "ranker", "ranker.json", ("slidex-ranker", 1)
CENTROIDS = "centroids."
"""Before the names of their tensors."""
_FIELDS = {"step": int, "rows": int, "pairs": int, "num_features": int}


@dataclass(frozen=True, slots=True)
class KeptRanker:
    """A ranker as it lies in a run directory.

    Args:
        step: Of the checkpoint whose weights it was fitted beside.
        rows: Training rows that it was fitted on.
        pairs: Of class and row.
        weights: Of its classes.
        centroids: That propose classes beside the network; None where none do.
    """

    step: int
    rows: int
    pairs: int
    weights: LinearWeights
    centroids: Centroids | None

    def describe(self) -> str:
        """One line for people."""
        size = f"{len(self.weights.values):,} weights ({self.weights.nbytes / 1e6:.1f} MB)"
        if self.centroids is not None:
            size += f", centroids ({self.centroids.nbytes / 1e6:.1f} MB)"
        return f"{size}, fitted on {self.pairs:,} pairs of class and row; step {self.step}"

    def ranker(self, config: TrainConfig, class_counts: np.ndarray, train_rows: int) -> LinearRanker:
        """With the settings of the run, and int64 (C,) how many of its training rows have each class."""
        prior_C = None
        if config.ranker_tail:
            log_propensity_C = np.log(propensities(class_counts, train_rows))
            prior_C = torch.from_numpy((-config.ranker_tail * log_propensity_C).astype(np.float32))
        search = known_M = None
        if self.centroids is not None:
            search = CentroidSearch(self.centroids, config.ranker_centroids)
            known_M = known_classes(class_counts, config.ranker_min_rows)
        return LinearRanker(
            self.weights,
            config.ranker_candidates,
            config.ranker_weight,
            config.ranker_floor,
            prior_C,
            search,
            known_M,
        )


def save_ranker(run: Path, kept: KeptRanker) -> None:
    """Writes a ranker into the run directory `run`, in place of an earlier one.

    Raises:
        CheckpointError: It cannot be written; an earlier one is then still there.
    """
    weights = kept.weights
    body = {"step": kept.step, "rows": kept.rows, "pairs": kept.pairs, "num_features": weights.num_features}
    tensors = {name: getattr(weights, name) for name in ("indptr", "features", "values", "bias")}
    if kept.centroids is not None:
        tensors |= {
            CENTROIDS + name: getattr(kept.centroids, name) for name in ("indptr", "classes", "values")
        }
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
    lists = {name.removeprefix(CENTROIDS): tensors.pop(name) for name in list(tensors) if CENTROIDS in name}
    try:
        weights = LinearWeights(**tensors, num_features=body["num_features"])
        centroids = Centroids(**lists, num_classes=len(weights.bias)) if lists else None
        if centroids is not None and centroids.num_features != weights.num_features:
            raise ConfigError(f"centroids of {centroids.num_features} features for {weights.num_features}")
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{file}: its weights are damaged: {error}") from error
    return KeptRanker(body["step"], body["rows"], body["pairs"], weights, centroids)
