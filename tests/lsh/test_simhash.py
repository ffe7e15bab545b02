from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from slidex.errors import DivergedError
from slidex.lsh import HashIndex, make_index
from slidex.lsh.family import automatic_bits
from slidex.lsh.simhash import SimHash, draw_projections, squared_norms


def assert_rate(hits: int, trials: int, expected: float) -> None:
    assert abs(hits / trials - expected) < 5 * math.sqrt(expected * (1 - expected) / trials)


def levels_of(rows: np.ndarray) -> np.ndarray:
    largest = np.abs(rows).max(axis=1, keepdims=True)
    return np.rint(rows / largest * np.float32(255)).astype(np.int64)


def test_queries_and_rows_collide_as_h1_and_wb_do() -> None:
    tables = 40_000
    weight, bias = torch.tensor([[0.5, -1.0, 2.0, 0.25]]), torch.tensor([1.5])
    hidden = torch.tensor([[1.0, 0.5, 0.75, -2.0]])
    family = SimHash(4, bits=1, tables=tables, seed=5)
    same = family.hash_rows(weight, bias)[:, 0] == family.hash_queries(hidden)[0, :, 0]
    row, query = torch.cat([weight[0], bias]), torch.cat([hidden[0], torch.ones(1)])
    cosine = float(row @ query / row.norm() / query.norm())
    assert_rate(int(same.sum()), tables, 1 - math.acos(cosine) / math.pi)


def test_norm_augmentation_makes_collisions_follow_the_inner_product() -> None:
    tables = 40_000
    weight = torch.tensor([[0.5, -1.0, 2.0], [0.1, -0.2, 0.4], [3.0, 0.0, 0.1]])
    bias, hidden = torch.tensor([0.5, 0.1, -1.0]), torch.tensor([[1.0, -0.5, 0.75]])
    family = SimHash(3, bits=1, tables=tables, seed=5, norm_augmentation=True)
    family.fit(weight, bias)
    query_codes = family.hash_queries(hidden)[0, :, 0]
    rows, query = torch.cat([weight, bias[:, None]], dim=1), torch.cat([hidden[0], torch.ones(1)])
    for codes, row in zip(family.hash_rows(weight, bias).T, rows, strict=True):
        cosine = float(row @ query / query.norm() / rows.norm(dim=1).max())
        assert_rate(int((codes == query_codes).sum()), tables, 1 - math.acos(cosine) / math.pi)


def test_rows_that_outgrow_the_fitted_norm_get_no_augmentation() -> None:
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    family = SimHash(3, bits=8, tables=4, seed=5, norm_augmentation=True)
    family.fit(weight, None)
    plain = SimHash(4, bits=8, tables=4, seed=5)
    expected = plain.hash_rows(torch.cat([weight, torch.zeros(5, 1)], dim=1), None)
    assert np.array_equal(family.hash_rows(100 * weight, None), expected)


def test_centering_hashes_rows_less_their_mean() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, bias = 3 + torch.randn(64, 6, generator=generator), torch.randn(64, generator=generator)
    family = SimHash(6, bits=7, tables=5, seed=2, center=True)
    family.fit(weight, bias)
    plain = SimHash(6, bits=7, tables=5, seed=2)
    expected = plain.hash_rows(weight - weight.mean(dim=0), bias - bias.mean())
    # The two means may round differently, which a value on a rounding boundary can show.
    assert np.mean(family.hash_rows(weight, bias) != expected) < 0.01
    assert np.mean(plain.hash_rows(weight, bias) != expected) > 0.3


@pytest.mark.parametrize("bits", [1, 9, 16, 17, 24])
def test_codes_are_the_signs_of_exact_integer_projections(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight, bias = torch.randn(200, 33, generator=generator), torch.randn(200, generator=generator)
    family = SimHash(33, bits=bits, tables=6, seed=9)
    projections = draw_projections(6 * bits, 34, 9).astype(np.int64)
    ones = torch.ones(200, 1)
    for extra, codes_NL in (
        (bias[:, None], family.hash_rows(weight, bias).T),
        (ones, family.hash_queries(weight)[:, :, 0]),
    ):
        levels = levels_of(torch.cat([weight, extra], dim=1).numpy())
        signs = (levels @ projections.T > 0).reshape(200, 6, bits)
        assert np.array_equal(codes_NL, (signs << np.arange(bits)).sum(axis=2))


def test_product_type_chunks_and_subsets_give_the_same_codes(monkeypatch) -> None:
    weight = torch.randn(1000, 40, generator=torch.Generator().manual_seed(4))
    family = SimHash(40, bits=9, tables=20, seed=1)
    ids = torch.tensor([999, 0, 512, 3])
    family._row_dtype = torch.float32
    rows, queries = family.hash_rows(weight, None), family.hash_queries(weight)
    assert np.array_equal(rows[:, ids.numpy()], family.hash_rows(weight, None, ids))
    monkeypatch.setattr("slidex.lsh.simhash._CHUNK_PROJECTIONS", 180 * 70)
    assert np.array_equal(rows, family.hash_rows(weight, None))
    assert np.array_equal(queries, family.hash_queries(weight))
    family._row_dtype = torch.bfloat16
    assert np.array_equal(rows, family.hash_rows(weight, None))
    assert np.array_equal(rows[:, ids.numpy()], family.hash_rows(weight, None, ids))


def test_zero_tiny_and_huge_rows_hash_by_direction() -> None:
    weight = torch.randn(1, 8, generator=torch.Generator().manual_seed(4))
    rows = torch.cat([weight, weight * 2.0**100, weight * 2.0**-100, torch.zeros(1, 8), weight * 1e-42])
    codes = SimHash(8, bits=12, tables=6, seed=0).hash_rows(rows, None)
    assert np.array_equal(codes[:, 0], codes[:, 1])
    assert np.array_equal(codes[:, 0], codes[:, 2])
    assert not codes[:, 3].any()


def test_half_precision_weights_hash_as_their_float32_values() -> None:
    weight = torch.randn(30, 8, generator=torch.Generator().manual_seed(4)).bfloat16()
    family = SimHash(8, bits=12, tables=6, seed=0)
    assert np.array_equal(family.hash_rows(weight, None), family.hash_rows(weight.float(), None))


def test_hashing_changes_neither_weights_nor_hidden() -> None:
    weight = torch.randn(30, 8, generator=torch.Generator().manual_seed(4), requires_grad=True)
    before = weight.detach().clone()
    family = SimHash(8, bits=12, tables=6, seed=0, center=True, norm_augmentation=True)
    family.fit(weight, None)
    family.hash_rows(weight, None)
    family.hash_queries(weight)
    assert torch.equal(weight, before)


def test_probes_flip_the_bits_nearest_to_their_hyperplanes() -> None:
    hidden = torch.randn(50, 10, generator=torch.Generator().manual_seed(2))
    codes_NLV = SimHash(10, bits=6, tables=4, seed=3, probes=3).hash_queries(hidden)
    levels = levels_of(torch.cat([hidden, torch.ones(50, 1)], dim=1).numpy())
    margins = np.abs(levels @ draw_projections(24, 11, 3).T.astype(np.int64)).reshape(50, 4, 6)
    nearest = np.argsort(margins, axis=2, kind="stable")[:, :, :3]
    assert np.array_equal(codes_NLV[:, :, 1:], codes_NLV[:, :, :1] ^ (1 << nearest))


def test_sparse_projections_are_large_on_the_chosen_share_alone() -> None:
    projections = draw_projections(3_000, 90, 3, 30)
    size = np.abs(projections)
    assert set(np.unique(projections)) == {-127, -1, 1, 127}
    assert ((size == 127).sum(axis=1) == 30).all()
    for hits in ((projections > 0).sum(), (projections == 127).sum() + (projections == -1).sum()):
        assert_rate(int(hits), projections.size, 0.5)
    for hits in (size == 127).sum(axis=0):
        assert_rate(int(hits), 3_000, 1 / 3)


@pytest.mark.parametrize("density", [0.0, 0.02, 1 / 3, 1.0])
def test_sparse_projections_tell_one_hot_rows_apart(density: float) -> None:
    tables = 20_000
    family = SimHash(20, bits=1, tables=tables, seed=4, projection="sparse", density=density)
    codes_LC = family.hash_rows(torch.eye(20)[:4], None)
    for other in range(1, 4):
        assert_rate(int((codes_LC[:, 0] == codes_LC[:, other]).sum()), tables, 0.5)


@pytest.mark.parametrize("width", [3, 600, 5_000, 65_001])
@pytest.mark.parametrize("share", [None, 0.3])
def test_projections_keep_float32_sums_exact(width: int, share: float | None) -> None:
    projections = draw_projections(8, width, 0, share and round(share * width))
    assert (np.abs(projections) % 2 == 1).all()
    assert 255 * np.abs(projections).sum(axis=1, dtype=np.float64).max() < 2**24


def test_drift_is_the_share_of_changed_codes() -> None:
    weight = torch.randn(200, 10, generator=torch.Generator().manual_seed(6))
    index = make_index("simhash", 10, 200, seed=1, bits=6, tables=8)
    index.build(weight)
    moved = weight.clone()
    moved[:50] = -moved[:50]
    assert index.drift(moved, None, torch.arange(50)) == 1.0
    assert index.drift(moved, None, torch.arange(25, 75)) == 0.5
    assert index.drift(moved, None, torch.arange(0)) == 0.0


@pytest.mark.parametrize(
    ("num_classes", "bits"), [(1, 1), (4_000, 4), (142_584, 9), (500_000, 11), (2**31, 23)]
)
def test_automatic_bits_aim_at_the_target_load(num_classes: int, bits: int) -> None:
    assert automatic_bits(num_classes) == bits


def test_chosen_rows_are_hashed_as_among_all_over_several_chunks(monkeypatch) -> None:
    monkeypatch.setattr("slidex.lsh.simhash._CHUNK_PROJECTIONS", 1)  # 64 rows a chunk
    generator = torch.Generator().manual_seed(0)
    weight_CD, bias_C = torch.randn(500, 8, generator=generator), torch.randn(500, generator=generator)
    family = SimHash(8, bits=6, tables=4, seed=0)
    ids = torch.randperm(500, generator=generator)[:200]
    codes_LC = family.hash_rows(weight_CD, bias_C)
    assert np.array_equal(family.hash_rows(weight_CD, bias_C, ids), codes_LC[:, ids.numpy()])
    weight_CD[ids[150], 3] = torch.nan
    with pytest.raises(DivergedError, match=f"class {int(ids[150])} "):
        family.hash_rows(weight_CD, bias_C, ids)


def test_codes_of_a_wider_type_are_stored_in_the_smallest() -> None:
    class Wide(SimHash):
        def hash_rows(self, weight_CD, bias_C, ids=None):
            return super().hash_rows(weight_CD, bias_C, ids).astype(np.int64)

    weight_CD, queries_ND = torch.randn(305, 8, generator=torch.Generator().manual_seed(0)).split([300, 5])
    index, other = (HashIndex(8, 300, Wide(8, bits=5, tables=6, seed=0), seed=0) for _ in range(2))
    index.build(weight_CD)
    assert index.state()["codes"].dtype == torch.uint16
    other.load_state(index.state(), weight_CD)
    assert torch.equal(other.query(queries_ND, 9), index.query(queries_ND, 9))


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 13, 130])
def test_squared_norms_are_sums_of_squares_whatever_the_batch(width: int) -> None:
    rows_ME = torch.randn(40, width, generator=torch.Generator().manual_seed(width))
    norms_M1 = squared_norms(rows_ME)
    exact_M = rows_ME.double().square().sum(dim=1)
    torch.testing.assert_close(norms_M1[:, 0].double(), exact_M, rtol=1e-6, atol=0)
    assert torch.equal(torch.cat([squared_norms(row[None]) for row in rows_ME]), norms_M1)
