from __future__ import annotations

import numpy as np
import pytest
import torch

from slidex.errors import ConfigError
from slidex.lsh import ClassSampler

DRAWS = 10_000


@pytest.mark.parametrize(
    ("power", "count"), [(0.0, 7), (0.0, 40), (0.5, 7), (0.75, 20), (1.0, 12), (1.0, 100)]
)
def test_inclusion_probability_is_exact(power: float, count: int) -> None:
    sampler = ClassSampler(40, np.array([1000, 0, 3, 17, 250, *range(35)]), power, seed=11)
    hits = np.zeros(40)
    for step in range(DRAWS):
        hits[sampler.sample(count, step).numpy()] += 1
    expected = sampler.inclusion_probability(torch.arange(40), count).numpy()
    spread = 5 * np.sqrt(expected * (1 - expected) / DRAWS)
    assert (np.abs(hits / DRAWS - expected) <= spread + 1e-12).all()


def test_frequent_classes_are_drawn_more_and_unseen_ones_still() -> None:
    sampler = ClassSampler(4, torch.tensor([100, 0, 1, 10]), 1.0, seed=0)
    probability = sampler.inclusion_probability(torch.arange(4), 1)
    assert probability.tolist() == pytest.approx([100 / 112, 1 / 112, 1 / 112, 10 / 112])


@pytest.mark.parametrize("power", [0.0, 0.75])
@pytest.mark.parametrize("count", [0, 1, 30, 1_000, 2_000])
def test_samples_are_distinct_and_in_range(power: float, count: int) -> None:
    ids = ClassSampler(1_000, np.arange(1_000), power, seed=1).sample(count, step=3)
    assert ids.dtype == torch.int64
    assert len(ids.unique()) == len(ids)
    assert all(0 <= c < 1_000 for c in ids.tolist())
    assert len(ids) == min(count, 1_000) if power == 0 else len(ids) <= count


@pytest.mark.parametrize("power", [0.0, 0.75])
def test_seed_step_and_stream_each_fix_the_draw(power: float) -> None:
    def draw(seed=1, step=2, stream=3):
        return tuple(
            ClassSampler(1_000, np.arange(1_000), power, seed=seed).sample(50, step, stream).tolist()
        )

    assert draw() == draw()
    draws = {draw(), draw(seed=4), draw(step=4), draw(stream=4), draw(step=3, stream=2)}
    assert len(draws) == 5


def test_a_uniform_draw_does_not_depend_on_the_number_of_classes_in_cost() -> None:
    assert len(ClassSampler(10**9, seed=0).sample(100, 0)) == 100


def test_sum_weighted_by_inverse_probability_is_unbiased() -> None:
    values = torch.linspace(0, 1, 60, dtype=torch.float64) ** 3
    sampler = ClassSampler(60, np.arange(60) ** 2, 0.5, seed=5)
    weights = values / sampler.inclusion_probability(torch.arange(60), 9)
    estimates = np.array([float(weights[sampler.sample(9, step)].sum()) for step in range(4_000)])
    assert abs(estimates.mean() - float(values.sum())) < 5 * estimates.std() / np.sqrt(len(estimates))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"num_classes": 0}, "num_classes"),
        ({"power": -0.5}, "power"),
        ({"power": float("nan")}, "power"),
        ({"power": "1"}, "power"),
        ({"power": 1.0}, "class_counts"),
        ({"power": 1.0, "class_counts": np.ones(3)}, "class_counts"),
        ({"power": 1.0, "class_counts": -np.ones(5)}, "class_counts"),
        ({"power": 1.0, "class_counts": np.full(5, np.nan)}, "class_counts"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_arguments_are_named(arguments, name) -> None:
    with pytest.raises(ConfigError, match=name):
        ClassSampler(**({"num_classes": 5, "seed": 0} | arguments))
