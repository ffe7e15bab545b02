from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from slidex.errors import ConfigError, DivergedError
from slidex.lsh import make_index
from slidex.lsh.dwta import Dwta, _draw_bins, _draw_walks

WIDTH = 20


def vectors(kind: str, count: int = 70) -> torch.Tensor:
    """float32 (count, WIDTH + 1), the last coordinate 1 as in a query."""
    generator = torch.Generator().manual_seed(len(kind))
    rows = torch.randn(count, WIDTH, generator=generator)
    keep = torch.rand(rows.shape, generator=generator)
    rows = {
        "dense": rows,
        "relu": rows.relu(),
        "sparse": rows * (keep < 0.1),
        "ties": rows.round(),
        "one": torch.zeros_like(rows).scatter_(1, torch.arange(count)[:, None] % WIDTH, 0.5),
    }[kind]
    return torch.cat([rows, torch.ones(count, 1)], dim=1)


def reference(family: Dwta, row_E: np.ndarray, size: int) -> tuple[list[int], list[int], list[float]]:
    """Winners, runners-up and leads of every bin, an empty one's borrowed, by plain search."""
    bins_BS, starts_B, strides_B = family._functions
    ranked = []
    for bin_S in bins_BS:
        present = sorted((-row_E[e], s) for s, e in enumerate(bin_S) if row_E[e] != 0)
        absent = [(math.inf, s) for s in range(size) if row_E[bin_S[s]] == 0]
        ranked.append((present + absent, bool(present)))
    winners, seconds, leads = [], [], []
    for own, start, stride in zip(ranked, starts_B, strides_B, strict=True):
        walk = [ranked[(start + i * stride) % len(ranked)] for i in range(len(ranked))]
        order, filled = own if own[1] else next((donor for donor in walk if donor[1]), (own[0], False))
        (best, winner), (low, second) = order[:2]
        winners.append(winner)
        seconds.append(second)
        leads.append(float(np.float32(low - best)) if own[1] and filled and low < math.inf else math.inf)
    return winners, seconds, leads


def expected_versions(family: Dwta, row_E: np.ndarray, size: int, probes: int) -> list[list[int]]:
    digit_bits = size.bit_length() - 1
    digits, mask = -(-family.bits // digit_bits), (1 << family.bits) - 1
    winners, seconds, leads = reference(family, row_E, size)
    tables = []
    for first in range(0, len(winners), digits):
        own = range(first, first + digits)
        code = sum(winners[b] << (digit_bits * (b - first)) for b in own) & mask
        versions = [code]
        for b in sorted(own, key=lambda b: (leads[b], b))[:probes]:
            shift = digit_bits * (b - first)
            changed = code ^ (((winners[b] ^ seconds[b]) << shift) & mask)
            versions.append(changed if changed != code else code ^ (1 << shift))
        tables.append(versions)
    return tables


@pytest.mark.parametrize("kind", ["dense", "relu", "sparse", "ties", "one"])
@pytest.mark.parametrize(("bits", "size"), [(9, 8), (10, 8), (1, 2), (24, 8), (4, 16), (17, 4)])
def test_codes_and_probes_are_those_of_a_plain_search(kind: str, bits: int, size: int) -> None:
    digits = -(-bits // (size.bit_length() - 1))
    family = Dwta(WIDTH, bits=bits, tables=5, seed=3, bin_size=size, probes=digits)
    rows = vectors(kind)
    codes_NLV = family.hash_queries(rows[:, :-1])
    expected = [expected_versions(family, row, size, digits) for row in rows.numpy()]
    assert np.array_equal(codes_NLV, np.array(expected))
    assert np.array_equal(family.hash_rows(rows[:, :-1], rows[:, -1]), codes_NLV[:, :, 0].T)
    assert all(len(set(versions)) == 1 + digits for row in codes_NLV for versions in row.tolist())
    assert codes_NLV.min() >= 0
    assert codes_NLV.max() < 1 << bits


def test_a_row_of_zeros_has_the_code_of_first_positions() -> None:
    rows = torch.zeros(3, WIDTH)
    rows[1] = -0.0
    assert not Dwta(WIDTH, bits=9, tables=4, seed=0).hash_rows(rows, None).any()


def test_codes_follow_the_order_of_entries_and_not_their_size() -> None:
    rows = vectors("dense")
    family = Dwta(WIDTH, bits=12, tables=9, seed=1)
    codes = family.hash_rows(rows[:, :-1], rows[:, -1])
    for change in (lambda x: x * 2.0**100, lambda x: x * 2.0**-100, lambda x: 3 * x.double() ** 3):
        other = change(rows)
        assert np.array_equal(codes, family.hash_rows(other[:, :-1], other[:, -1]))


def test_a_negative_entry_wins_over_absent_ones() -> None:
    rows = torch.zeros(1, 8)
    rows[0, 5] = -1.0
    family = Dwta(7, bits=3, tables=6, seed=2)
    bins_BS = family._functions[0]
    codes = family.hash_rows(rows[:, :7], rows[:, 7])
    assert codes[:, 0].tolist() == [bin_S.tolist().index(5) for bin_S in bins_BS]


@pytest.mark.parametrize("count", [1, 2, 12, 150, 151])
def test_a_walk_reaches_every_bin(count: int) -> None:
    starts, strides = _draw_walks(np.random.default_rng(0), count)
    for start, stride in zip(starts, strides, strict=True):
        assert sorted((start + i * stride) % count for i in range(count)) == list(range(count))


def test_bins_are_cut_from_permutations() -> None:
    bins = _draw_bins(np.random.default_rng(0), 14, 27, 8)
    assert bins.shape == (14, 8)
    for first in range(0, 14, 3):
        coordinates = bins[first : first + 3].ravel().tolist()
        assert len(set(coordinates)) == len(coordinates)
    assert len(np.unique(bins[::3], axis=0)) == 5
    assert set(bins.ravel().tolist()) == set(range(27))


def test_the_first_of_several_bad_rows_is_named() -> None:
    rows = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(4))
    rows[[40, 45, 130], 3] = torch.tensor([math.inf, math.nan, -math.inf])
    family = Dwta(WIDTH, bits=6, tables=3, seed=1)
    with pytest.raises(DivergedError, match="class 40 "):
        family.hash_rows(rows, None)
    with pytest.raises(DivergedError, match="class 130 "):
        family.hash_rows(rows, None, torch.tensor([3, 130, 45]))
    with pytest.raises(DivergedError, match="Row 40 "):
        family.hash_queries(rows)


def test_chunks_subsets_layouts_and_types_give_the_same_codes(monkeypatch) -> None:
    weight = torch.randn(1_000, 40, generator=torch.Generator().manual_seed(4)).bfloat16()
    bias = torch.randn(1_000, generator=torch.Generator().manual_seed(5)).bfloat16()
    family, ids = Dwta(40, bits=17, tables=7, seed=1), torch.tensor([999, 0, 512, 3])
    codes = family.hash_rows(weight.float(), bias.float())
    assert codes.dtype == np.int32
    assert np.array_equal(codes, family.hash_rows(weight, bias))
    assert np.array_equal(codes, family.hash_rows(weight.T.contiguous().T.requires_grad_(), bias))
    assert np.array_equal(codes[:, ids.numpy()], family.hash_rows(weight, bias, ids))
    monkeypatch.setattr("slidex.lsh.dwta._CHUNK_VALUES", 41 * 100)
    assert np.array_equal(codes, family.hash_rows(weight, bias))
    reversed_ids = torch.arange(999, -1, -1)
    assert np.array_equal(codes[:, ::-1], family.hash_rows(weight, bias, reversed_ids))


@pytest.mark.parametrize(
    ("in_features", "settings", "parts"),
    [
        (WIDTH, {"bin_size": 6}, ["'bin_size'", "power of two from 2 to 21", "6"]),
        (WIDTH, {"bin_size": 32}, ["'bin_size'", "2 to 21", "32"]),
        (4, {}, ["'bin_size'", "2 to 5", "8"]),
        (1_000, {"bin_size": 512}, ["'bin_size'", "2 to 256", "512"]),
        (WIDTH, {"bin_size": 1}, ["'bin_size'", "2 to 21", "1"]),
        (WIDTH, {"bits": 25}, ["'bits'", "1 to 24", "25"]),
        (WIDTH, {"tables": 0}, ["'tables'", "at least 1", "0"]),
        (WIDTH, {"bits": 10, "probes": 5}, ["'probes'", "0 to 4", "5"]),
    ],
)
def test_bad_settings_name_the_setting_its_limits_and_the_value(in_features, settings, parts) -> None:
    with pytest.raises(ConfigError) as caught:
        make_index("dwta", in_features, 1_000, **settings)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_every_setting_changes_the_answer() -> None:
    weight = torch.randn(2_000, WIDTH, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1)).relu()

    def answer(seed: int = 0, **settings: int) -> torch.Tensor:
        index = make_index("dwta", WIDTH, 2_000, seed=seed, **{"bits": 6, "tables": 12} | settings)
        index.build(weight)
        return index.query(hidden, 1_000)

    base = answer()
    for change in ({"bits": 5}, {"tables": 11}, {"bin_size": 4}, {"probes": 1}, {"seed": 1}):
        assert not torch.equal(answer(**change), base), change
