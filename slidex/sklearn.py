"""`SlidexClassifier`: the trainer of `slidex.fit` as a scikit-learn estimator.

The rows go through a data set in a temporary directory (``TMPDIR`` says where), so training is that of `slidex.fit` to
the last bit; what stays in the estimator is the weights. Legend: N rows, F input features, C classes, k ranks.
"""

from __future__ import annotations

import numbers
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numba
import numpy as np
import torch
from scipy.sparse import csr_matrix, issparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data  # pyrefly: ignore[missing-module-attribute]

from slidex.data import CsrArrays, DatasetWriter
from slidex.errors import ConfigError, DataError, InterruptedRunError
from slidex.nn.classifier import PREDICT_ROWS, Classifier
from slidex.train.config import TrainConfig
from slidex.train.loop import fit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from slidex.train.run import Run

NOT_SETTINGS = {
    "seed": "'random_state' has its place",
    "checkpoint_every": "an estimator keeps one state",
    "keep_last": "an estimator keeps one state",
    **{
        f"ranker_{name}": "decision_function scores all classes, and a ranker only some"
        for name in ("candidates", "neighbors", "min_rows", "weight", "floor", "tail", "cost", "threshold")
    },
}
"""Settings of `slidex.TrainConfig` that an estimator does not take, and why."""
ONE_CHECKPOINT = {"checkpoint_every": 2**31, "keep_last": 1}


class SlidexClassifier(ClassifierMixin, BaseEstimator):
    """Embedding bag and a large output layer, trained on an active set of classes.

    The defaults are those of `slidex.TrainConfig`, whose settings mean the same here, and are made for very many rows
    and classes; small data want more epochs and smaller batches.

    Args:
        mode: How classes are scored in training: ``exact``, ``shared``, ``per_sample``, or ``auto``.
        loss: ``softmax`` or ``logistic``.
        hidden_width: Width of the embedding bag.
        normalize: Scale input rows to unit L2 norm, which suits bags of words.
        epochs: Passes over the training rows.
        batch_size: Rows in a step.
        learning_rate: Step size.
        pool_size: Negative classes in a batch's pool, in shared mode.
        index: What proposes classes: docs/indexes.md lists the names.
        random_state: Seed of every random choice, as it is if it is an integer.
        settings: Further settings of `slidex.TrainConfig` by name. With ``valid_fraction`` the weights of the best
            validation are kept, and ``patience`` stops early.

    Attributes:
        classes_: The labels (C,), sorted; for indicator targets 0 to C - 1.
        n_features_in_: F.
        feature_names_in_: Names of the features, where X had some.
        multilabel_: Whether the target was an indicator matrix.
        config_: The settings of the training, as they were decided for these data.
        history_: Reports, epochs, validations and warnings of the training, oldest first.
        model_: The trained `slidex.nn.classifier.Classifier`.
    """

    model_: Classifier
    config_: TrainConfig
    history_: list[dict[str, Any]]
    classes_: np.ndarray
    n_features_in_: int

    def __init__(
        self,
        *,
        mode: str = "auto",
        loss: str = "softmax",
        hidden_width: int = 128,
        normalize: bool = True,
        epochs: int = 5,
        batch_size: int = 256,
        learning_rate: float = 6e-3,
        pool_size: int = 4096,
        index: str = "simhash",
        random_state: int | np.random.RandomState | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.mode = mode
        self.loss = loss
        self.hidden_width = hidden_width
        self.normalize = normalize
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.pool_size = pool_size
        self.index = index
        self.random_state = random_state
        self.settings = settings

    def fit(self, X: Any, y: Any) -> Self:
        """Trains from new weights.

        Args:
            X: CSR or dense (N, F).
            y: One label for each row (N,), numbers or strings; or an indicator matrix of 0 and 1 (N, C), CSR or dense,
                for any number of labels a row.

        Raises:
            ConfigError: A parameter is out of its range, or the target is of neither form.
            DataError: No row has a label.
            DivergedError: The loss became non-finite.
        """
        config = self._config()
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=np.float32, multi_output=True)
        labels = self._encode(y)
        with tempfile.TemporaryDirectory(prefix="slidex-") as folder, _same_threads():
            with DatasetWriter(Path(folder, "data")) as writer:
                writer.append("train", _rows(X), labels)
                dataset = writer.finish(
                    num_features=X.shape[1],
                    num_classes=len(self.classes_),
                    source={"format": "memory", "files": [], "options": {}},
                )
            try:
                self._keep(fit(dataset, Path(folder, "run"), config))
            except InterruptedRunError:  # what it saved goes with the folder
                raise KeyboardInterrupt from None
        return self

    def predict(self, X: Any) -> np.ndarray | csr_matrix:
        """The best label of every row (N,); for indicator targets an indicator matrix (N, C), sparse if `y` was.

        A row's indicators are, with ``loss="logistic"``, the classes with a score above 0, at most as many as a
        training row had; with softmax, whose scores have no such bound, as many of the best as a training row had on
        average.
        """
        check_is_fitted(self)
        if not self.multilabel_:
            return self.classes_[self._topk(X, 1)[0][:, 0]]
        ids_NK, scores_NK = self._topk(X, self._predicted_labels)
        kept_NK = scores_NK > (0 if self.config_.loss == "logistic" else -np.inf)
        indptr = np.concatenate([[0], np.cumsum(kept_NK.sum(1))])
        ones = np.ones(indptr[-1], dtype=np.int64)
        indicator = csr_matrix((ones, ids_NK[kept_NK], indptr), shape=(len(ids_NK), len(self.classes_)))
        indicator.sort_indices()
        return indicator if self._sparse_target else indicator.toarray()

    def predict_topk(self, X: Any, k: int = 5) -> tuple[np.ndarray, np.ndarray]:
        """The k best classes of every row, best first; never holds an (N, C) matrix.

        Args:
            X: CSR or dense (N, F).
            k: At most C.

        Returns:
            Labels (N, k), of `classes_`, and scores float32 (N, k), the logits.
        """
        check_is_fitted(self)
        if isinstance(k, bool) or not isinstance(k, numbers.Integral) or not 1 <= k <= len(self.classes_):
            raise ConfigError(
                f"The 'k' parameter of predict_topk must be a whole number from 1 to {len(self.classes_)}, the number "
                f"of classes. Got {k!r} instead."
            )
        ids_NK, scores_NK = self._topk(X, int(k))
        return self.classes_[ids_NK], scores_NK

    def decision_function(self, X: Any) -> np.ndarray:
        """The logits of all classes, float32 (N, C): 4 NC bytes, for tools that want them and moderate C.

        Two classes have one number, as scikit-learn wants: the second one's logit above the first one's, (N,).
        `predict_topk` is the way with many classes.
        """
        check_is_fitted(self)
        x, head = self._validated(X), self.model_.head
        out_NC = np.empty((x.num_rows, len(self.classes_)), dtype=np.float32)
        for first, rows in _blocks(x):
            with torch.no_grad():
                logits = torch.nn.functional.linear(self.model_.encoder(rows), head.weight, head.bias)
            out_NC[first : first + rows.num_rows] = logits.numpy()
        return out_NC[:, 1] - out_NC[:, 0] if len(self.classes_) == 2 and not self.multilabel_ else out_NC

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()  # pyrefly: ignore[missing-attribute]
        tags.input_tags.sparse = True
        tags.classifier_tags.multi_label = True
        return tags

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        if "model_" in state:  # arrays say it all, and joblib can map them
            model = state.pop("model_")
            state["_tensors"] = {
                name: {key: tensor.numpy() for key, tensor in module.state_dict().items()}
                for name, module in (("encoder", model.encoder), ("head", model.head))
            }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = state.pop("_tensors", None)
        super().__setstate__(state)
        if tensors is not None:
            self.model_ = self._exact_model(
                {
                    name: {key: torch.tensor(array) for key, array in arrays.items()}
                    for name, arrays in tensors.items()
                }
            )

    def _config(self) -> TrainConfig:
        """The settings of all parameters.

        Raises:
            ConfigError: A value is out of its range, or `settings` has a name twice or an unknown one.
        """
        settings = {name: _plain(value) for name, value in (self.settings or {}).items()}
        own = {name: _plain(value) for name, value in self.get_params(deep=False).items()}
        own.pop("settings"), own.pop("random_state")
        for name, value in settings.items():
            reason = "it is a parameter of its own" if name in own else NOT_SETTINGS.get(name)
            if reason is not None:
                raise ConfigError(
                    f"The 'settings' parameter of SlidexClassifier must not have {name!r}: {reason}. "
                    f"Got {value!r} instead."
                )
        state = self.random_state
        seed = (
            int(state)
            if isinstance(state, numbers.Integral)
            else int(check_random_state(state).randint(2**31 - 1))
        )
        return TrainConfig.from_mapping({**ONE_CHECKPOINT, **settings, **own, "seed": seed})

    def _encode(self, y: Any) -> CsrArrays:
        """Class ids of every row; sets what describes the target."""
        check_classification_targets(y)
        self._sparse_target = issparse(y)
        self.multilabel_ = type_of_target(y, input_name="y") == "multilabel-indicator"
        if self.multilabel_:
            indicator = csr_matrix(y)
            indicator.eliminate_zeros()
            self.classes_ = np.arange(indicator.shape[1])
            labels = CsrArrays.from_scipy(indicator, binary=True)
            counts = np.diff(labels.indptr)
            if labels.nnz == 0:
                raise DataError("no row of 'y' has a label.")
            usual = counts.max() if self.loss == "logistic" else round(counts[counts > 0].mean())
            self._predicted_labels = max(1, int(usual))
            return labels
        if np.ndim(y) != 1 and (np.ndim(y) != 2 or np.shape(y)[1] != 1):
            raise ConfigError(
                "The 'y' parameter of SlidexClassifier.fit must be labels (N,) or an indicator matrix (N, C) of 0 and "
                f"1. Got {type_of_target(y)} of shape {np.shape(y)} instead."
            )
        self.classes_, ids = np.unique(column_or_1d(y, warn=True), return_inverse=True)
        return CsrArrays(np.arange(len(ids) + 1), ids.astype(np.int32), None, len(self.classes_))

    def _keep(self, run: Run) -> None:
        """What stays of a run."""
        self.config_, self.history_ = run.config, run.log()
        checkpoint = run.checkpoint()
        self.model_ = self._exact_model({name: checkpoint.tensors(name) for name in ("encoder", "head")})

    def _exact_model(self, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> Classifier:
        """A model that predicts with these weights; without an index, which exact scores do not need."""
        no_counts = np.zeros(0, dtype=np.int64)  # they are for sampling
        config = replace(self.config_, mode="exact", weight_dtype="float32")
        model = Classifier.from_config(config, self.n_features_in_, len(self.classes_), no_counts)
        model.encoder.load_state_dict(tensors["encoder"])
        model.head.load_state_dict(tensors["head"])
        return model

    def _validated(self, X: Any) -> CsrArrays:
        return _rows(validate_data(self, X, accept_sparse="csr", dtype=np.float32, reset=False))

    def _topk(self, X: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Class ids int64 (N, k) and scores float32 (N, k)."""
        blocks = list(self.model_.topk(self._validated(X), k))
        scores, ids = (torch.cat([block[part] for block in blocks]).numpy() for part in (0, 1))
        return ids, scores


def _rows(X: Any) -> CsrArrays:
    return CsrArrays.from_scipy(csr_matrix(X))


def _blocks(x: CsrArrays) -> Iterator[tuple[int, CsrArrays]]:
    for first in range(0, x.num_rows, PREDICT_ROWS):
        yield first, x.take(np.arange(first, min(first + PREDICT_ROWS, x.num_rows)))


def _plain(value: Any) -> Any:
    """The Python value of a number from numpy, as searches over parameters give them."""
    return value.item() if isinstance(value, np.generic) else value


@contextmanager
def _same_threads() -> Iterator[None]:
    """Sets the sizes of torch's and Numba's pools back to what they were."""
    before = torch.get_num_threads(), numba.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])
