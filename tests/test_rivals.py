"""What slidex is compared with must do the same work: the rivals' losses and weights are slidex's own after a step."""

from __future__ import annotations

import importlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from slidex.kernels import StepSettings
from slidex.train.config import TrainConfig
from slidex.train.loop import Trainer
from slidex.train.settle import settle

LEARNING_RATE = 0.01


@pytest.fixture(autouse=True)
def _importable(monkeypatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1])


def trainer_of(dataset, mode: str) -> Trainer:
    config = TrainConfig(
        mode=mode, hidden_width=32, batch_size=64, pool_size=60, active_size=40, precision="float32"
    )
    trainer = Trainer(dataset, settle(config, dataset), lambda *_: None)
    if trainer.rehasher:
        trainer.rehasher.rehash_if_due(0)
    return trainer


def our_step(trainer: Trainer, x, y) -> float:
    model, settings = trainer.model, StepSettings(learning_rate=LEARNING_RATE, step=1)
    hidden_ND, graph = model.encoder.forward_train(x, 1)
    scored = model.head.score(hidden_ND, y, 1)
    model.encoder.backward(graph, model.head.update(scored, settings), settings)
    trainer.dense_optimizer.step(LEARNING_RATE)
    return float(scored.loss_N.mean())


def assert_same(trainer: Trainer, weight, bias, encoder) -> None:
    """Adam's first step is the gradient's sign, so only entries whose gradient is no rounding error are compared."""
    head, own = trainer.model.head, trainer.model.encoder
    for ours, theirs in (
        (head.weight, weight),
        (head.bias, bias),
        (own.bag, encoder.bag.weight),
        (own.bias, encoder.bias),
    ):
        close = torch.isclose(
            ours.detach(), theirs.detach().reshape(ours.shape), rtol=0, atol=LEARNING_RATE / 20
        )
        assert close.float().mean() > 0.995


def test_the_dense_softmax_takes_the_step_of_exact_mode(easy_data) -> None:
    rivals = importlib.import_module("benchmarks.rivals")
    trainer = trainer_of(easy_data, "exact")
    rival = rivals.DenseSoftmax(trainer.model, 64, "float32")
    x, y = next(trainer.batches())
    before = trainer.model.head.weight.detach().clone()
    loss = rival.step(x, y, LEARNING_RATE)
    assert loss == pytest.approx(our_step(trainer, x, y), rel=1e-5)
    assert (trainer.model.head.weight - before).abs().mean() > LEARNING_RATE / 2
    assert_same(trainer, rival.weight, rival.bias, rival.encoder)
    best = rival.best_classes(x, rows_at_once=10)
    (scores_ids,) = trainer.model.topk(x, 1)
    assert (best == scores_ids[1][:, 0]).float().mean() > 0.9


@pytest.mark.parametrize("mode", ["shared", "per_sample"])
def test_the_sparse_softmax_takes_slidex_step_on_slidex_candidates(easy_data, mode) -> None:
    rivals = importlib.import_module("benchmarks.rivals")
    trainer = trainer_of(easy_data, mode)
    model = trainer.model
    rival = rivals.SparseSoftmax(model, "float32")
    x, y = next(trainer.batches())
    selector = model.head.selector
    select = selector.pool if mode == "shared" else selector.active_sets
    loss = rival.step(x, y, select(model.encoder(x), y, 1), LEARNING_RATE)
    assert loss == pytest.approx(our_step(trainer, x, y), rel=1e-5)
    assert_same(trainer, rival.rows.weight, rival.biases.weight, rival.encoder)


def test_a_wrong_rival_is_noticed(easy_data) -> None:
    rivals = importlib.import_module("benchmarks.rivals")
    trainer = trainer_of(easy_data, "exact")
    rival = rivals.DenseSoftmax(trainer.model, 64, "float32")
    x, y = next(trainer.batches())
    rival.step(x, y, 2 * LEARNING_RATE)
    our_step(trainer, x, y)
    with pytest.raises(AssertionError):
        assert_same(trainer, rival.weight, rival.bias, rival.encoder)


def test_a_line_shows_medians_and_the_ratio_of_each_repeat() -> None:
    report = importlib.import_module("benchmarks.report")
    line = report.Comparison("work", "rival", "ms", [1.0, 2.0, 4.0], [10.0, 30.0, 20.0], "note")
    assert line.ratios() == [10.0, 15.0, 5.0]
    assert line.cells() == ["work", "rival", "ms", "2", "20", "10", "5 to 15", "3", "note"]
    assert line.facts()["ratio"] == 10.0
    table = report.markdown([report.HEADINGS, line.cells()]).splitlines()
    assert len({row.count("|") for row in table}) == 1


def test_what_was_not_reached_is_said_and_is_json() -> None:
    report = importlib.import_module("benchmarks.report")
    line = report.Comparison("work", "rival", "s", [float("inf")], [10.0])
    assert line.cells()[3:6] == ["not reached", "10", "0"]
    assert json.loads(json.dumps(line.facts(), allow_nan=False))["ours"] == [None]


@pytest.mark.parametrize("quick", [False, True])
def test_every_part_has_jobs_that_a_child_process_can_take(quick) -> None:
    command = importlib.import_module("benchmarks.__main__")
    for part in command.PARTS:
        jobs = command.jobs(part, Path(), quick=quick)
        assert jobs
        assert all(callable(job[0]) and pickle.dumps(job) for job in jobs)


def test_the_synthetic_set_has_distinct_sorted_ids(tmp_path) -> None:
    datasets = importlib.import_module("benchmarks.datasets")
    datasets.make_synthetic(tmp_path / "set", 5000, rows=2000)
    split = datasets.Dataset.open(tmp_path / "set").split("train")
    for rows in (split.x, split.y):
        same_row = np.diff(rows.row_ids()) == 0
        assert (np.diff(rows.indices)[same_row] > 0).all()
    assert 4 < split.y.nnz / 2000 <= 5
    assert 25 < split.x.nnz / 2000 <= 30
