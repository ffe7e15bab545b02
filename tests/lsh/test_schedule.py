from __future__ import annotations

import json

import pytest
import torch

from slidex.errors import ConfigError
from slidex.lsh import DriftSchedule, ExponentialSchedule, FixedSchedule

MAKERS = [
    lambda: FixedSchedule(7),
    lambda: ExponentialSchedule(3, 1.5, 20),
    lambda: DriftSchedule(0.2, 5, 10, 5, 40),
]


def no_drift() -> float:
    pytest.fail("this schedule must not measure")


def run(schedule, steps, drift=no_drift, *, start=1):
    """Steps at which a trainer rehashes."""
    done = []
    for step in range(start, steps):
        if schedule.due(step, drift):
            schedule.rehashed(step)
            done.append(step)
    return done


def started(schedule):
    schedule.rehashed(0)
    return schedule


def test_fixed_gaps() -> None:
    assert run(started(FixedSchedule(5)), 21) == [5, 10, 15, 20]


def test_exponential_gaps_grow_to_the_maximum() -> None:
    assert run(started(ExponentialSchedule(4, 2.0, 20)), 90) == [4, 12, 28, 48, 68, 88]


def test_exponential_with_growth_one_is_fixed() -> None:
    assert run(started(ExponentialSchedule(4, 1.0, 4)), 13) == [4, 8, 12]


def test_drift_measures_only_at_checks_and_obeys_both_bounds() -> None:
    level = iter([0.1, 0.3, 0.0, 0.0, 0.0, 1.0])
    measured = []

    def drift() -> float:
        measured.append(1)
        return next(level)

    schedule = DriftSchedule(threshold=0.3, check_every=10, sample_rows=5, min_gap=20, max_gap=50)
    # 20: 0.1; 30: 0.3, rehash; 50, 60, 70: 0.0; 80: 50 steps, no measurement; 100: 1.0.
    assert run(started(schedule), 101, drift) == [30, 80, 100]
    assert len(measured) == 6


def test_drift_sample_is_fixed_distinct_and_bounded() -> None:
    schedule = MAKERS[2]()
    ids = schedule.sample_ids(1_000, seed=4)
    assert torch.equal(ids, schedule.sample_ids(1_000, seed=4))
    assert len(ids.unique()) == 10
    assert schedule.sample_ids(6, seed=4).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("cut", [1, 23, 41])
def test_resumed_schedule_rehashes_at_the_same_steps(make, cut: int) -> None:
    def drift() -> float:
        return 0.1

    expected = run(started(make()), 150, drift)
    first, second = started(make()), make()
    done = run(first, cut, drift)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert done + run(second, 150, drift, start=cut) == expected
    assert expected


@pytest.mark.parametrize("make", MAKERS)
def test_foreign_state_is_refused(make) -> None:
    schedule = make()
    good = schedule.state_dict()
    for state in ({}, {"other": 1}, good | {"other": 1}, good | {"last": -1}, good | {"last": "3"}):
        with pytest.raises(ConfigError):
            schedule.load_state_dict(state)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: FixedSchedule(0), "every"),
        (lambda: ExponentialSchedule(0, 2.0, 5), "first"),
        (lambda: ExponentialSchedule(5, 0.9, 9), "growth"),
        (lambda: ExponentialSchedule(5, float("inf"), 9), "growth"),
        (lambda: ExponentialSchedule(5, 2.0, 4), "maximum"),
        (lambda: DriftSchedule(0.0, 1, 1, 1, 1), "threshold"),
        (lambda: DriftSchedule(1.1, 1, 1, 1, 1), "threshold"),
        (lambda: DriftSchedule(0.5, 0, 1, 1, 1), "check_every"),
        (lambda: DriftSchedule(0.5, 1, 0, 1, 1), "sample_rows"),
        (lambda: DriftSchedule(0.5, 1, 1, 0, 1), "min_gap"),
        (lambda: DriftSchedule(0.5, 1, 1, 5, 4), "max_gap"),
    ],
)
def test_bad_settings_are_named(make, name) -> None:
    with pytest.raises(ConfigError, match=name):
        make()
