"""`SlidexClassifier`: scikit-learn's own checks, and what they do not ask: the model is that of `slidex.fit`."""

from __future__ import annotations

import pickle
import tempfile
from typing import TYPE_CHECKING, Any

import joblib
import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix, issparse, vstack
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import parametrize_with_checks

import slidex
from slidex import SlidexClassifier, TrainConfig
from slidex.data import CsrArrays, DatasetWriter
from slidex.errors import ConfigError, DataError, InterruptedRunError
from tests.conftest import checkerboard

if TYPE_CHECKING:
    from pathlib import Path

EXPECTED_FAILURES: dict[str, str] = {}
"""Checks of scikit-learn's that may fail, with the reason: none."""
ONE_THREAD = {"threads": 1}
F, C = 60, 40


@parametrize_with_checks(
    [SlidexClassifier(random_state=0, settings=ONE_THREAD)],
    expected_failed_checks=lambda _: EXPECTED_FAILURES,
)
def test_scikit_learns_checks(estimator: SlidexClassifier, check: Any) -> None:
    check(estimator)


def small(**changes: Any) -> SlidexClassifier:
    parameters = {"hidden_width": 16, "batch_size": 50, "epochs": 6, "learning_rate": 0.03, "random_state": 3}
    return SlidexClassifier(**{**parameters, "settings": ONE_THREAD, **changes})


def rows(seed: int = 1, labels_per_row: int = 1, count: int = 600) -> tuple[csr_matrix, csr_matrix]:
    """CSR inputs (N, 60) and indicators (N, 40)."""
    x, y = checkerboard(count, C, seed, labels_per_row)
    return x.to_scipy(), y.to_scipy()


def named_rows(seed: int = 1) -> tuple[csr_matrix, np.ndarray]:
    """The same with one label a row, as text that sorts unlike the numbers."""
    x, y = rows(seed)
    return x, np.array([f"class {c}" for c in y.indices], dtype=object)


def test_the_model_is_that_of_fit(tmp_path: Path) -> None:
    x, y = rows(labels_per_row=2)
    with DatasetWriter(tmp_path / "data") as writer:
        writer.append("train", CsrArrays.from_scipy(x), CsrArrays.from_scipy(y, binary=True))
        data = writer.finish(
            num_features=F, num_classes=C, source={"format": "test", "files": [], "options": {}}
        )
    config = TrainConfig(hidden_width=16, batch_size=50, epochs=6, learning_rate=0.03, seed=3, threads=1)
    run = slidex.fit(data, tmp_path / "run", config)
    ((scores, ids),) = run.model().topk(CsrArrays.from_scipy(x[:100]), 4)
    found_ids, found_scores = small().fit(x, y).predict_topk(x[:100], 4)
    np.testing.assert_array_equal(found_ids, ids.numpy())
    np.testing.assert_array_equal(found_scores, scores.numpy())


def test_names_are_learned_and_ranked() -> None:
    x, y = named_rows()
    test_x, test_y = named_rows(seed=2)
    model = small().fit(x, y)
    assert list(model.classes_) == sorted(set(y))
    assert model.score(test_x, test_y) > 0.95
    labels, scores = model.predict_topk(test_x, 3)
    assert labels.shape == scores.shape == (600, 3)
    assert (np.diff(scores, axis=1) <= 0).all()
    np.testing.assert_array_equal(labels[:, 0], model.predict(test_x))
    logits = model.decision_function(test_x)
    np.testing.assert_allclose(np.sort(logits, axis=1)[:, :-4:-1], scores, rtol=1e-5)
    np.testing.assert_array_equal(model.predict(test_x.toarray()), model.predict(test_x))


def test_two_classes_have_one_score() -> None:
    x, y = named_rows()
    halves = np.where(np.char.str_len(y.astype(str)) > 7, "long", "short")
    model = small().fit(x, halves)
    labels, scores = model.predict_topk(x, 2)
    gap = np.where(labels[:, 0] == "short", 1, -1) * (scores[:, 0] - scores[:, 1])
    np.testing.assert_allclose(model.decision_function(x), gap, rtol=1e-4, atol=1e-5)
    assert model.score(x, halves) > 0.95


@pytest.mark.parametrize("sparse", [True, False])
def test_several_labels_a_row_come_back_in_the_targets_form(sparse: bool) -> None:
    x, y = rows(labels_per_row=2)
    test_x, test_y = rows(2, labels_per_row=2)
    found = small().fit(x, y if sparse else y.toarray()).predict(test_x)
    assert issparse(found) is sparse
    found = csr_matrix(found)
    assert (np.diff(found.indptr) == 2).all()
    assert found.multiply(test_y).sum() > 0.9 * test_y.nnz


def test_logistic_scores_say_how_many_labels() -> None:
    x, y = map(vstack, zip(rows(labels_per_row=1), rows(2, labels_per_row=3), strict=True))
    model = small(loss="logistic", epochs=15).fit(x, y)
    found = model.predict(x)
    np.testing.assert_array_equal(found.toarray(), model.decision_function(x) > 0)
    assert abs(found - y).sum() < 0.1 * y.nnz
    assert {1, 3} <= set(np.diff(found.indptr))


def test_stored_zeros_are_no_labels() -> None:
    x, y = rows()
    y.data[:300] = 0
    model = small().fit(x, y)
    only_labelled = small().fit(x[300:], y[300:])
    np.testing.assert_array_equal(model.predict(x).toarray(), only_labelled.predict(x).toarray())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", "per_sample"),
        ("loss", "logistic"),
        ("hidden_width", np.int64(8)),
        ("normalize", False),
        ("epochs", 2),
        ("batch_size", 20),
        ("learning_rate", np.float32(0.01)),
        ("pool_size", 4),
        ("index", "none"),
        ("random_state", 4),
        ("settings", {**ONE_THREAD, "hidden_dropout": 0.5}),
    ],
)
def test_every_parameter_counts(name: str, value: Any) -> None:
    x, y = named_rows()
    base = {"mode": "shared", "pool_size": 16}
    scores = [
        model.fit(x, y).decision_function(x[:20]) for model in (small(**base), small(**{**base, name: value}))
    ]
    assert not np.allclose(*scores)
    assert set(SlidexClassifier().get_params()) == {
        "mode", "loss", "hidden_width", "normalize", "epochs", "batch_size", "learning_rate", "pool_size", "index",
        "random_state", "settings",
    }  # fmt: skip


def test_defaults_are_those_of_the_trainer() -> None:
    own = SlidexClassifier().get_params()
    del own["random_state"], own["settings"]
    assert own == {name: getattr(TrainConfig(), name) for name in own}


def test_random_state_is_a_seed_or_gives_one() -> None:
    x, y = named_rows()
    assert small(random_state=7).fit(x, y).config_.seed == 7
    seeds = [small(random_state=np.random.RandomState(5)).fit(x, y).config_.seed for _ in range(2)]
    assert seeds[0] == seeds[1] != 5


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"mode": "fast"}, "The 'mode' setting must be one of auto, exact, shared, per_sample. Got 'fast'"),
        ({"epochs": 0}, "The 'epochs' setting"),
        ({"random_state": -1}, "The 'seed' setting"),
        ({"settings": {"epochs": 3}}, "must not have 'epochs': it is a parameter of its own. Got 3 instead"),
        ({"settings": {"seed": 3}}, "must not have 'seed': 'random_state' has its place"),
        ({"settings": {"checkpoint_every": 3}}, "must not have 'checkpoint_every'"),
        ({"settings": {"keep_last": 3}}, "must not have 'keep_last'"),
        ({"settings": {"warm_up": 0.1}}, "There is no setting 'warm_up'. Did you mean 'warmup'"),
    ],
)
def test_bad_parameters_are_named_in_fit(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        small(**changes).fit(*named_rows())


def test_bad_targets_are_refused() -> None:
    x, y = rows()
    with pytest.raises(
        ConfigError, match=r"The 'y' parameter .* Got multiclass-multioutput of shape \(600, 2\)"
    ):
        small().fit(x, np.arange(1200).reshape(600, 2) % 7)
    with pytest.raises(DataError, match="no row of 'y' has a label"):
        small().fit(x, csr_matrix(y.shape))


@pytest.mark.parametrize("k", [0, C + 1, 2.0, True])
def test_a_bad_k_is_refused(k: Any) -> None:
    model = small(epochs=1).fit(*named_rows())
    with pytest.raises(
        ConfigError, match=f"'k' parameter of predict_topk .* from 1 to {C}.* Got {k!r} instead"
    ):
        model.predict_topk(rows()[0], k)
    assert model.predict_topk(rows()[0], np.int64(C))[0].shape == (600, C)


def test_the_best_validation_is_kept() -> None:
    x, y = named_rows()
    settings = {**ONE_THREAD, "valid_fraction": 0.2, "patience": 2}
    model = small(epochs=200, learning_rate=0.05, settings=settings).fit(x, y)
    validations = [event for event in model.history_ if event["event"] == "validation"]
    assert len(validations) < 200
    assert [event["best"] for event in validations[-2:]] == [False, False]
    assert max(event["P@1"] for event in validations) == validations[-3]["P@1"]


def test_a_pickle_holds_the_weights_alone(tmp_path: Path) -> None:
    x, y = named_rows()
    model = small(mode="shared").fit(x, y)
    copy = pickle.loads(pickle.dumps(model))  # noqa: S301
    np.testing.assert_array_equal(copy.decision_function(x), model.decision_function(x))
    weights = sum(t.nbytes for part in (model.model_.encoder, model.model_.head) for t in part.parameters())
    assert len(pickle.dumps(model)) - len(pickle.dumps(clone(model))) < 1.5 * weights + 6000
    joblib.dump(model, tmp_path / "model")
    mapped = joblib.load(tmp_path / "model", mmap_mode="r")
    np.testing.assert_array_equal(mapped.predict(x), model.predict(x))


def test_nothing_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        small().fit(*named_rows())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert not any(tmp_path.iterdir())

    def interrupted(*_: object) -> None:
        assert any(tmp_path.iterdir())
        raise InterruptedRunError("stopped")

    monkeypatch.setattr("slidex.sklearn.fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small().fit(*named_rows())
    assert not any(tmp_path.iterdir())


def test_it_takes_part_in_a_search() -> None:
    x, y = named_rows()
    search = GridSearchCV(small(), {"epochs": np.array([1, 6])}, cv=2).fit(x, y)
    assert search.best_params_ == {"epochs": 6}
