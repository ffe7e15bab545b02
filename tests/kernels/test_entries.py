"""Sparse rows in words: what a word holds is near enough, and belongs to its feature."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from slidex.kernels.cpu import entries
from slidex.kernels.cpu.entries import ALL, GROUP, add_row, ranked_entries, sparse_dot
from tests.kernels.cases import sparse_rows


def rows_of(features: int, dtype: type = np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    indptr, indices, values = (part.numpy() for part in sparse_rows(30, min(features, 60), 3))
    return indptr, indices, values.astype(dtype)


def decoded(found: entries.Entries, indptr: np.ndarray) -> np.ndarray:
    """The values, in double precision."""
    scale = np.repeat(found.scale_N.astype(np.float64), np.diff(indptr))
    return scale * (found.ids.view(np.int32) if found.x.dtype == np.uint32 else found.x)


@pytest.mark.parametrize("features", [1, 2, 3, 60, 64, 65, 1 << 20])
def test_a_word_is_the_nearest_with_the_rank_of_its_feature(features):
    indptr, indices, values = rows_of(features)
    found = ranked_entries(indptr, indices, values, features)
    assert len(found.x) == 0
    assert int(found.low) + 1 == 1 << (features - 1).bit_length()
    np.testing.assert_array_equal(found.feature_R[found.ids & found.low], indices)
    half = np.repeat(found.scale_N * (float(found.low) + 2) / 2, np.diff(indptr))
    assert (np.abs(decoded(found, indptr) - values) <= half * (1 + 1e-6)).all()
    largest = np.array([np.abs(values[a:b]).max(initial=0) for a, b in pairwise(indptr)])
    assert (found.scale_N[largest > 0] <= 1.001 * largest[largest > 0] / (2**31 - 2.0**20)).all()


@pytest.mark.parametrize(("dtype", "most"), [(np.float64, 1 << 20), (np.float32, 59)])
def test_doubles_and_values_of_too_many_features_are_kept_as_they_are(dtype, most, monkeypatch):
    monkeypatch.setattr(entries, "WORD_FEATURES", most)
    indptr, indices, values = rows_of(60, dtype)
    found = ranked_entries(indptr, indices, values, 60)
    np.testing.assert_array_equal(found.x, values)
    np.testing.assert_array_equal(found.feature_R[found.ids], indices)
    assert found.low == ALL
    assert (found.scale_N == 1).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_frequent_features_come_first_and_rows_know_their_squares(dtype):
    indptr, indices, values = rows_of(60, dtype)
    found = ranked_entries(indptr, indices, values, 60)
    counts = np.bincount(indices, minlength=60)[found.feature_R]
    assert (np.diff(counts) <= 0).all()
    assert counts[0] > counts[-1]
    np.testing.assert_array_equal(np.sort(found.feature_R), np.arange(60))
    squares = [np.square(values[a:b].astype(float)).sum() for a, b in pairwise(indptr)]
    np.testing.assert_allclose(found.square_N, squares, rtol=1e-5)


def test_rows_of_zeros_and_of_next_to_nothing_have_a_scale():
    values = np.array([0, 0, 1e-38, -1e-39, 1e-28, 0, 3e38, 1e-3], np.float32)
    indptr = np.arange(0, 10, 2)
    found = ranked_entries(indptr, np.tile(np.arange(2, dtype=np.int32), 4), values, 2)
    np.testing.assert_array_equal(found.scale_N[:3], 1)
    np.testing.assert_array_equal(found.ids[:6] & ~found.low, 0)
    np.testing.assert_allclose(decoded(found, indptr)[6:], [3e38, 0], rtol=1e-6, atol=3e29)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_over_a_row(dtype):
    rng = np.random.default_rng(0)
    values, w = rng.normal(size=24).astype(dtype), rng.normal(size=24).astype(dtype)
    found = ranked_entries(np.array([0, 24]), np.arange(24, dtype=np.int32), values, 24)
    held, scale = decoded(found, np.array([0, 24])), found.scale_N[0]
    ranks = found.ids & found.low
    for stop in range(25):
        got = scale * sparse_dot(0, stop, found.ids, found.x, found.low, w)
        np.testing.assert_allclose(got, held[:stop] @ w[ranks[:stop]], rtol=1e-4, atol=1e-5)
    for stop in range(0, 25, GROUP):
        more = w.copy()
        add_row(0, stop, found.ids, found.x, found.low, more, 0.5 * scale)
        want = w.astype(float)
        want[ranks[:stop]] += 0.5 * held[:stop]
        np.testing.assert_allclose(more, want, rtol=1e-5, atol=1e-6)
