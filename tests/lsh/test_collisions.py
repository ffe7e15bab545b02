"""Collision rates against theory, 10^5 pairs for each angle.

Pairs hashed with the same functions are not independent trials, and neither are the functions that one pair is
hashed with. So every rate is the mean over 50 families of hash functions, each drawn from a seed of its own and
asked about 2,000 pairs of its own: the families' rates are independent, and their spread gives the standard error.
A rate may be 5 standard errors from theory.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numba
import numpy as np
import pytest
import torch

from slidex.lsh.dwta import Dwta
from slidex.lsh.simhash import SimHash

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FAMILIES, PAIRS_EACH = 50, 2_000
WIDTH = 32
ANGLES = [0.1, 0.6, 1.2, math.pi / 2, 2.5]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Waking threads costs more than these many small calls; codes are the same for any number of them."""
    ours, torchs = numba.get_num_threads(), torch.get_num_threads()
    numba.set_num_threads(1)
    torch.set_num_threads(1)
    yield
    numba.set_num_threads(ours)
    torch.set_num_threads(torchs)


def assert_rate(rates: np.ndarray, expected: np.ndarray | float, slack: float = 0.0) -> None:
    """`rates` and, where it depends on the pairs, `expected`: one for each family."""
    differences = rates - expected
    error = float(differences.std(ddof=1)) / math.sqrt(len(rates))
    assert error < 0.005, "the test is too weak to see anything"
    assert abs(float(differences.mean())) < 5 * error + slack


def family_rates(make: Callable[[int], object], pairs: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
    """Share of whole codes that agree, for each family; the last coordinate of a pair is the bias."""
    rates = []
    for seed, first, second in zip(range(FAMILIES), *(side.split(PAIRS_EACH) for side in pairs), strict=True):
        family = make(seed)
        codes = [family.hash_rows(side[:, :-1], side[:, -1]) for side in (first, second)]
        rates.append(np.mean(codes[0] == codes[1]))
    return np.array(rates)


def pairs_at_angle(angle: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors at exactly this angle, in every direction alike: a fixed hyperplane splits them at theory's rate."""
    generator = torch.Generator().manual_seed(int(1000 * angle))
    shape = (FAMILIES * PAIRS_EACH, WIDTH)
    first = torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=1)
    other = torch.randn(shape, generator=generator)
    other = torch.nn.functional.normalize(other - (other * first).sum(1, keepdim=True) * first, dim=1)
    return first, math.cos(angle) * first + math.sin(angle) * other


def correlated_pairs(correlation: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard normal coordinates, each correlated with its twin alone."""
    generator = torch.Generator().manual_seed(int(1000 * correlation) + 5000)
    first, noise = torch.randn(2, FAMILIES * PAIRS_EACH, WIDTH, generator=generator)
    return first, correlation * first + math.sqrt(1 - correlation**2) * noise


def quantised_angles(pairs: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
    """Angles between the vectors as SimHash rounds them: to 255ths of the largest entry."""
    first, second = (
        np.rint(side.numpy() / np.abs(side.numpy()).max(axis=1, keepdims=True) * 255).astype(np.float64)
        for side in pairs
    )
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return np.arccos(np.clip((first * second).sum(axis=1) / norms, -1, 1)).reshape(FAMILIES, PAIRS_EACH)


@pytest.mark.parametrize("bits", [1, 5])
@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("projection", ["gaussian", "sparse"])
def test_simhash_codes_agree_as_one_minus_angle_over_pi_to_the_k(projection, angle, bits) -> None:
    pairs = pairs_at_angle(angle)
    angles = quantised_angles(pairs)
    assert abs(float(angles.mean()) - angle) < 0.005
    expected = ((1 - angles / math.pi) ** bits).mean(axis=1)
    # One hyperplane of any kind splits isotropic pairs at the exact rate. How K hyperplanes lie to each other
    # is a little different for sparse ones: that is what the slack is for.
    slack = 0.002 if projection == "sparse" and bits > 1 else 0.0

    def make(seed: int) -> SimHash:
        return SimHash(WIDTH - 1, bits=bits, tables=8, seed=seed, projection=projection)

    assert_rate(family_rates(make, pairs), expected, slack)


@pytest.mark.parametrize("correlation", [-0.8, 0.0, 0.5, 0.95])
def test_winner_of_two_agrees_as_the_sign_of_a_difference(correlation: float) -> None:
    # The larger of two coordinates is the side of the hyperplane e_i - e_j, and differences of pairs keep their
    # correlation: 1 - arccos(rho) / pi, as for SimHash.
    def make(seed: int) -> Dwta:
        return Dwta(WIDTH - 1, bits=1, tables=16, seed=seed, bin_size=2)

    assert_rate(family_rates(make, correlated_pairs(correlation)), 1 - math.acos(correlation) / math.pi)


@pytest.mark.parametrize("digits", [1, 3])
@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.95])
def test_winners_of_eight_agree_as_by_their_definition(correlation: float, digits: int) -> None:
    generator = np.random.default_rng(7)
    first, noise = generator.standard_normal((2, 400_000, 8))
    second = correlation * first + math.sqrt(1 - correlation**2) * noise
    agree = float(np.mean(first.argmax(axis=1) == second.argmax(axis=1)))

    # The bins of one table lie in one permutation here, so they share no coordinate: digits are independent.
    def make(seed: int) -> Dwta:
        return Dwta(WIDTH - 1, bits=3 * digits, tables=1, seed=seed, bin_size=8)

    sampled = 5 * digits * math.sqrt(agree * (1 - agree) / 400_000)
    assert_rate(family_rates(make, correlated_pairs(correlation)), agree**digits, slack=sampled)


def densified_digits(
    order: np.ndarray, supports: list[set[int]], draw: np.random.Generator
) -> list[list[int]]:
    """Digits of vectors of zeros and ones, from the paper: 8 to a bin, an empty bin tries random ones in turn."""
    bins = order.reshape(-1, 8)
    tries = draw.integers(0, len(bins), (len(bins), 400))
    digits = []
    for support in supports:
        own = [next((s for s, c in enumerate(coordinates) if c in support), None) for coordinates in bins]
        digits.append(
            [
                digit if digit is not None else next(own[t] for t in row if own[t] is not None)
                for digit, row in zip(own, tries, strict=True)
            ]
        )
    return digits


@pytest.mark.parametrize("shared", [0, 2, 5])
def test_densified_digits_of_sparse_vectors_agree_as_by_their_definition(shared: int) -> None:
    width, size, trials = 128, 6, 1_500
    supports = [set(range(size)), set(range(size - shared, 2 * size - shared))]
    rows = torch.zeros(2, width)
    for row, support in zip(rows, supports, strict=True):
        row[list(support)] = 1.0
    draw = np.random.default_rng(3)
    ours, definition = [], []
    for seed in range(trials):
        codes = Dwta(width - 1, bits=3, tables=width // 8, seed=seed).hash_rows(rows[:, :-1], rows[:, -1])
        ours.append(np.mean(codes[:, 0] == codes[:, 1]))
        first, second = densified_digits(draw.permutation(width), supports, draw)
        definition.append(np.mean(np.array(first) == np.array(second)))
    assert_rate(np.array(ours), np.array(definition))
