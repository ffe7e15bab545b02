"""Benchmarks run for long and on machines of their own; here they are imported, and their measuring is checked."""

from __future__ import annotations

import importlib
import itertools
import sys
from pathlib import Path

import pytest

from slidex.train.config import TrainConfig

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
