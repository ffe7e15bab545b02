"""Benchmarks run for long and on machines of their own; here they are imported, and their measuring is checked."""

from __future__ import annotations

import importlib
import itertools
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from slidex.kernels import cpu as kernels
from slidex.nn import products
from slidex.train.config import TrainConfig
from slidex.train.loop import Trainer
from slidex.train.settle import settle

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py"))


@pytest.fixture(autouse=True)
def _importable(monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_can_be_imported(name) -> None:
    importlib.import_module(f"benchmarks.{name}")
    assert f"benchmarks.{name}" in sys.modules


def test_a_learning_curve_rises_and_its_seconds_are_read_off_it(easy_data) -> None:
    training = importlib.import_module("benchmarks.training")
    config = TrainConfig(
        mode="shared", hidden_width=32, batch_size=64, epochs=10, pool_size=100, learning_rate=0.02
    )
    curve = training.learning_curve(easy_data, config, points=4, test_rows=100)
    assert [point.step for point in curve] == sorted({point.step for point in curve})
    assert all(a.wall < b.wall and a.rehash <= b.rehash for a, b in itertools.pairwise(curve))
    assert curve[-1].p1 > max(50.0, curve[0].p1)
    assert training.seconds_to(curve, 101.0) is None
    line = [training.Point(10, 2.0, 4.0, 0.0, 20.0), training.Point(20, 4.0, 8.0, 0.0, 60.0)]
    assert training.seconds_to(line, 40.0) == pytest.approx(3.0)
    assert training.seconds_to(line, 10.0, what="cpu") == pytest.approx(2.0)


SMALL = {
    "rows": 2,
    "features": 6,
    "feature_bytes": 8,
    "distinct_features": 5,
    "labels": 3,
    "bag_width": 8,
    "width": 4,
    "dense": 40,
    "retrieved": 10,
    "random": 7,
    "slots": 0,
    "pairs": 0,
    "classes": 20,
    "bits": 6,
    "tables": 3,
    "entries": 30,
    "code_bytes": 2,
    "all_classes": 100,
    "rehashed": 10,
    "class_bytes": 60,
    "bag_bytes": 96,
}
"""Sizes of a step that can be checked by hand: rows of 4 or 8 floats, with two moments of as many."""
WORK = {
    "data": {"stream": 120},
    "bag sum": {"rows": 160, "cached": 112, "flops": 96},
    "encoder layers": {"cached": 176, "flops": 160},
    "hashing": {"cached": 184, "flops": 120},
    "voting": {"stream": 200, "counts": 30},
    "random draw": {"cached": 56, "counts": 7},
    "selection": {"cached": 308, "counts": 20},
    "gather": {"rows": 400, "cached": 400},
    "score product": {"cached": 512, "flops": 320},
    "score passes": {},
    "softmax": {"cached": 320, "flops": 1000},
    "gradient passes": {},
    "gradient products": {"cached": 864, "flops": 640},
    "row update": {"updates": 2400, "cached": 400, "flops": 1100},
    "encoder backward": {"cached": 192, "flops": 320},
    "bag grouping": {"cached": 72, "counts": 6},
    "bag update": {"updates": 960, "cached": 136, "flops": 536},
    "dense update": {"cached": 1120, "flops": 440},
    "rehash": {"rows": 200, "stream": 2460, "flops": 600},
    "class record": {"cached": 160, "counts": 20},
    "other": {},
}
PAIR_WORK = WORK | {
    "selection": {"cached": 288, "counts": 24},
    "score product": {"rows": 400, "cached": 320, "flops": 168},
    "softmax": {"cached": 288, "flops": 525},
    "gradient products": {"rows": 320, "cached": 320, "flops": 168},
    "pair grouping": {"cached": 336, "counts": 21},
    "row update": {"updates": 2400, "cached": 284, "flops": 1268},
    "class record": {"cached": 192, "counts": 24},
}
del PAIR_WORK["gather"]


@pytest.mark.parametrize(
    ("mode", "sizes", "expected"),
    [("shared", {}, WORK), ("per_sample", {"slots": 12, "pairs": 21}, PAIR_WORK)],
)
def test_the_work_of_every_stage_is_what_one_counts_by_hand(mode, sizes, expected) -> None:
    roofline = importlib.import_module("benchmarks.roofline")
    batch = roofline.Batch(**SMALL | sizes)
    works = {name: stage.work(batch) for name, stage in roofline.stages_of(mode).items()}
    assert works == {name: roofline.Work(**work) for name, work in expected.items()}


def test_a_step_without_a_rehash_moves_nothing_for_it() -> None:
    roofline = importlib.import_module("benchmarks.roofline")
    stage = roofline.stages_of("shared")["rehash"]
    assert stage.work(roofline.Batch(**SMALL | {"rehashed": 0})) == roofline.Work()


def test_the_floor_is_the_longest_of_moving_computing_and_counting() -> None:
    roofline = importlib.import_module("benchmarks.roofline")
    rates = roofline.Ceilings(stream=10, cached=20, rows=5, updates=4, flops=100, counts=8)
    moved = {"stream": 10, "cached": 20, "rows": 5, "updates": 4}
    assert rates.floor(roofline.Work(**moved, flops=300, counts=8)) == pytest.approx(4)
    assert rates.floor(roofline.Work(**moved, flops=500, counts=8)) == pytest.approx(5)
    assert rates.floor(roofline.Work(**moved, flops=500, counts=80)) == pytest.approx(10)
    assert rates.stream_floor(roofline.Work(**moved, flops=300, counts=80)) == pytest.approx(3.9)
    assert rates.stream_floor(roofline.Work(**moved, flops=500)) == pytest.approx(5)


def test_the_loops_behind_the_rates_do_what_is_counted() -> None:
    ceilings = importlib.import_module("benchmarks.ceilings")
    values = np.arange(1000, dtype=np.float32)
    other = np.zeros_like(values)
    assert ceilings.read(values, 3) == values.sum()
    ceilings.copy(values, other)
    assert np.array_equal(values, other)
    ceilings.scale(other, 3)
    assert other == pytest.approx(values * 0.999**3, rel=1e-5)
    table, ids = np.arange(60, dtype=np.float32).reshape(10, 6), np.array([7, 0, 3, 9, 1])
    for ahead in (0, 2):
        assert np.array_equal(ceilings.read_rows(table, ids, ahead, 2).sum(0), table[ids].sum(0))
        updated = table.copy()
        ceilings.update_rows(updated, ids, ahead, 2)
        assert np.array_equal(updated - table, np.isin(np.arange(10), ids)[:, None] * np.ones(6))
    counters = np.zeros((2, 5), dtype=np.int32)
    ceilings.count(counters, np.array([4, 1, 4], dtype=np.int32))
    assert counters.tolist() == [[0, 1, 0, 0, 2]] * 2


def test_time_within_a_stage_inside_another_counts_once() -> None:
    stages = importlib.import_module("benchmarks.stages")
    clock = stages.Clock(iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0]).__next__)
    inner = clock.wrap("within outer", len, keep=lambda size: 2 * size)
    with clock.running("outer"):
        assert inner([1, 2]) == 2
    spent, kept = clock.take()
    seconds = {stage: time for stage, (time, _) in spent.items()}
    assert seconds == {"idle": 1.0 + 16.0, "outer": 2.0 + 8.0, "within outer": 4.0}
    assert kept == {"len": 4}
    assert not clock.kept
    assert not clock.spent


def test_the_bytes_of_a_row_follow_what_its_optimiser_keeps() -> None:
    stages = importlib.import_module("benchmarks.stages")
    weight_CD, moments_CD, root_C1 = torch.zeros(10, 4), torch.zeros(10, 4), torch.zeros(10, 1)
    assert stages._row_bytes(weight_CD, moments_CD, moments_CD) == 48
    assert stages._row_bytes(weight_CD, moments_CD, root_C1) == 36
    assert stages._row_bytes(weight_CD, moments_CD[:0], root_C1) == 20


@pytest.mark.parametrize("mode", ["shared", "per_sample"])
def test_the_stages_are_all_of_a_step(easy_data, mode) -> None:
    stages = importlib.import_module("benchmarks.stages")
    roofline = importlib.import_module("benchmarks.roofline")
    config = TrainConfig(
        mode=mode,
        hidden_width=16,
        batch_size=32,
        pool_size=60,
        active_size=40,
        threads=1,
        rehash="fixed",
        rehash_every=8,
    )
    trainer = Trainer(easy_data, settle(config, easy_data), lambda *_: None)
    original, multiply = kernels.embedding_bag, products.class_scores
    batches, spent = stages.observe(trainer, 10, time.perf_counter)
    assert kernels.embedding_bag is original
    assert products.class_scores is multiply
    names = list(roofline.stages_of(mode))
    assert all(set(step) - {"idle"} == set(names) for step in spent)
    assert len(batches) == trainer.step - stages.WARM_UP == 10
    for batch in batches:
        assert (batch.rows, batch.features, batch.labels) == (32, 128, 64)
        assert (batch.bag_width, batch.width, batch.dense, batch.all_classes) == (16, 16, 16, 300)
        assert (batch.class_bytes, batch.bag_bytes) == (3 * 4 * 17, 3 * 4 * 16)
        assert 20 < batch.distinct_features < 128
        if mode == "shared":
            assert 0 < batch.classes - batch.retrieved <= batch.labels + batch.random
            assert batch.scores == 32 * batch.classes
            assert batch.retrieved <= batch.entries <= batch.tables * 300
        else:
            assert batch.classes <= batch.pairs <= batch.scores == 32 * batch.slots
            assert batch.entries >= batch.retrieved
    assert [batch.rehashed > 0 for batch in batches] == [step == 8 for step in range(stages.WARM_UP, 15)]
    rates = roofline.Ceilings(stream=1e10, cached=1e10, rows=1e9, updates=1e9, flops=1e10, counts=1e9)
    lines = stages.table(mode, batches, spent, rates)
    assert [line["stage"] for line in lines] == [*names, "step"]
    by_name = {line["stage"]: line for line in lines}
    assert by_name["step"]["ms"] == pytest.approx(sum(line["ms"] for line in lines[:-1]))
    assert by_name["rehash"]["ms"] == pytest.approx(1e3 * sum(step["rehash"][0] for step in spent) / 10)
    update = by_name["row update"]
    assert update["ms / floor"] == pytest.approx(update["ms"] / update["floor ms"])
    assert update["floor ms"] >= 1e3 * min(2 * batch.classes * batch.class_bytes / 1e9 for batch in batches)
