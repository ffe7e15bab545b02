"""SimHash (Charikar 2002): a code of K bits per table, each the side of a random hyperplane a vector lies on.

Two vectors at an angle θ agree in one bit with probability 1 - θ/π, so in a whole code with (1 - θ/π)^K.

A classifier wants the largest inner product, not the smallest angle. Rows hashed are [w_c, b_c] and queries
[h, 1], so the bias takes part; `norm_augmentation` makes angle and inner product agree in order (Neyshabur &
Srebro 2015).

The projections are small odd integers, and a vector is scaled to its largest entry and rounded to 8 bits and
a sign before it is projected. Every product and every partial sum is then an integer that float32 holds
exactly: a code does not depend on the shape of a matrix product, the number of threads, or the machine, so
updating one row equals rebuilding all of them, and a fast bfloat16 product (10 times faster where the
processor has one) gives the very same bits. The rounding turns a vector by about 0.004 radians.

Legend: N rows in a batch, C classes, D hidden width, E hashed width (D + 1 or D + 2), K bits, L tables, V
    codes
looked up per table (1 + probes).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import llvmlite.binding
import numba
import numpy as np
import torch

from slidex.errors import ConfigError, DivergedError
from slidex.lsh.cuda.simhash import mean_row, pack, pack_probes, quantise
from slidex.lsh.family import MAX_BITS, code_dtype, row_not_hashable, rows_at_once
from slidex.lsh.hash_index import register_hash_family
from slidex.lsh.index import check_integer, check_number

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from slidex.lsh.index import QuerySample

PROJECTIONS = ("gaussian", "sparse")
_ROW_LEVELS = 255
_EXACT_LIMIT = 1 << 24
_INFINITY_BITS = 0x7F800000
_CHUNK_PROJECTIONS = 1 << 18
"""Projections made at once: they are read again at once, and stay in the second-level cache."""
_PROJECTION_STREAM = 0x51A5


@register_hash_family("simhash")
class SimHash:
    """L tables of K signed random projections.

    Args:
        in_features: Hidden width D.
        bits: K, 1 to 24.
        tables: L, at least 1.
        seed: Fixes the projections (Philox).
        projection: ``"gaussian"``, or ``"sparse"``: random ±1 on a random share of the coordinates and nothing on
            the others (Achlioptas 2003; Li et al. 2006; a third of them in SLIDE), for vectors of few large
            entries. "Nothing" is ±1 against ±127 here, so that a vector that misses all chosen coordinates of
            a hyperplane, as a one-hot row mostly does, still lies at random on one side of it. Above a width
            of 30,000 exact sums leave too few levels, and sparse projections become dense ±1.
        density: The share of coordinates chosen for a sparse projection, from 0 (one coordinate) to 1.
        probes: Further codes looked up per table and query, each with one bit flipped, nearest hyperplanes
            first (multi-probe, Lv et al. 2007); 0 to K.
        center: Subtract the mean row before hashing. ``h·(w_c - mean)`` differs from ``h·w_c`` by a constant
            over the classes, so the ranking that a query asks for is unchanged, while rows that share a large
            common component spread over more buckets.
        norm_augmentation: Append ``sqrt(M² - |row|²)`` to rows and 0 to queries (simple-LSH), M the largest
            row norm at the last `fit`, so that the angle ranks as the inner product does. Rows that outgrow M
            later get 0 until the next fit.
    """

    uses_queries = False
    query_version = 0
    runs_on_cuda = True

    def __init__(
        self,
        in_features: int,
        *,
        bits: int,
        tables: int,
        seed: int,
        projection: str = "gaussian",
        density: float = 1 / 3,
        probes: int = 0,
        center: bool = False,
        norm_augmentation: bool = False,
    ) -> None:
        check_integer("bits", "simhash", bits, 1, MAX_BITS)
        check_integer("tables", "simhash", tables, 1)
        check_integer("probes", "simhash", probes, 0, bits)
        check_number("density", "simhash", density, 0, 1)
        if projection not in PROJECTIONS:
            raise ConfigError(
                f"The 'projection' parameter of simhash must be one of {', '.join(PROJECTIONS)}. "
                f"Got {projection!r} instead."
            )
        for name, value in (("center", center), ("norm_augmentation", norm_augmentation)):
            if not isinstance(value, bool):
                raise ConfigError(
                    f"The {name!r} parameter of simhash must be true or false. Got {value!r} instead."
                )
        self.bits, self.tables, self.probes = bits, tables, probes
        self._in_features = in_features
        self._center, self._norm_augmentation = center, norm_augmentation
        width = in_features + 1 + norm_augmentation
        chosen = max(1, round(density * width)) if projection == "sparse" else None
        self._row_projection_BE = torch.from_numpy(draw_projections(tables * bits, width, seed, chosen))
        self._query_projection_BE = self._row_projection_BE
        self._device_projection_BE = self._row_projection_BE
        self._row_dtype = torch.bfloat16 if _has_fast_bfloat16() else torch.float32
        self._mean_E = torch.zeros(in_features + 1)
        self._max_norm = torch.zeros(1)

    @property
    def bytes(self) -> int:
        """Memory of the projections."""
        shared = self._query_projection_BE is self._row_projection_BE
        return self._row_projection_BE.nbytes + (0 if shared else self._query_projection_BE.nbytes)

    def fit(
        self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, queries: QuerySample | None = None
    ) -> None:
        """Set what the hash functions take from the data: the mean row and the largest norm.

        Raises:
            DivergedError: A row's norm is not finite.
        """
        del queries
        self._mean_E = torch.zeros(self._in_features + 1)
        if self._center:
            self._largest_norm(weight_CD, bias_C)  # names the row that would spoil the mean
            mean = mean_row(weight_CD.detach()).cpu()
            bias_mean = 0.0 if bias_C is None else float(bias_C.detach().mean(dtype=torch.float64))
            self._mean_E = torch.cat([mean, mean.new_tensor([bias_mean])]).float()
        if self._norm_augmentation:
            self._max_norm = torch.tensor([self._largest_norm(weight_CD, bias_C)])

    def parameters(self) -> dict[str, torch.Tensor]:
        """What `fit` set."""
        return {"mean": self._mean_E, "max_norm": self._max_norm}

    def load_parameters(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Restore what `fit` set."""
        self._mean_E, self._max_norm = parameters["mean"].float(), parameters["max_norm"].float()

    def hash_rows(
        self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, ids: torch.Tensor | None = None
    ) -> np.ndarray:
        """Codes of class rows.

        Args:
            weight_CD: floating (C, D).
            bias_C: floating (C,), or None for zeros.
            ids: int64 (M,), the rows to hash; None for all.

        Returns:
            (L, C), or (L, M), of type `code_dtype`.

        Raises:
            DivergedError: A row holds a value that is not finite.
        """
        count = len(weight_CD) if ids is None else len(ids)
        codes_LC = np.empty((self.tables, count), dtype=code_dtype(self.bits))
        projection = self._row_projection_BE.to(self._row_dtype)
        for first, chunk in self._extended_chunks(weight_CD, bias_C, ids, "cpu", self._cpu_rows):
            rows = self._prepare_rows(chunk)
            bad = _quantise(rows)
            if bad >= 0:
                raise row_not_hashable(first + bad, ids)
            signs_BM = torch.mm(projection, rows.to(self._row_dtype).T)
            # A bfloat16 above zero is an int16 above zero: numba needs no bfloat16 type.
            view = signs_BM.view(torch.int16) if signs_BM.dtype == torch.bfloat16 else signs_BM
            _pack_rows(view.numpy(), codes_LC, first, self.bits)
        return codes_LC

    def hash_queries(self, hidden_ND: torch.Tensor) -> np.ndarray:
        """Codes to look up: int32 (N, L, V), the query's own code first, then its probes."""
        rows_ND = hidden_ND.detach().to(device="cpu", dtype=torch.float32)
        codes_NLV = np.empty((len(rows_ND), self.tables, 1 + self.probes), dtype=np.int32)
        step = max(1, _CHUNK_PROJECTIONS // len(self._query_projection_BE))
        for first in range(0, len(rows_ND), step):
            rows = rows_ND.new_ones((min(step, len(rows_ND) - first), self._in_features + 1))
            rows[:, :-1] = rows_ND[first : first + step]
            rows = self._prepare_queries(rows)
            bad = _quantise(rows)
            if bad >= 0:
                raise DivergedError(
                    f"Row {first + bad} of the hidden vectors holds a value that is not finite."
                )
            margins = torch.mm(rows, self._query_projection_BE.T).numpy()
            _pack_queries(margins, codes_NLV[first : first + step], self.bits)
        return codes_NLV

    def hash_rows_on_device(
        self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What `hash_rows` gives, computed where the weights are: int32 (L, C), or (L, M)."""
        device = weight_CD.device
        count = len(weight_CD) if ids is None else len(ids)
        codes_LC = torch.empty((self.tables, count), dtype=torch.int32, device=device)
        for first, chunk in self._extended_chunks(weight_CD, bias_C, ids, device, self._device_rows):
            rows = self._prepare_rows(chunk)
            bad_M = ~torch.isfinite(rows).all(dim=1)
            if bool(bad_M.any()):
                raise row_not_hashable(first + int(bad_M.nonzero()[0]), ids)
            margins_BM = torch.mm(self._projection_on(device), quantise(rows, _ROW_LEVELS).T)
            codes_LC[:, first : first + len(rows)] = pack(margins_BM, self.tables)
        return codes_LC

    def hash_queries_on_device(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """What `hash_queries` gives for finite rows, computed where these are and without waiting for it."""
        rows_NE = hidden_ND.new_ones((len(hidden_ND), self._in_features + 1), dtype=torch.float32)
        rows_NE[:, :-1] = hidden_ND
        rows_NE = quantise(self._prepare_queries(rows_NE), _ROW_LEVELS)
        margins_NB = torch.mm(rows_NE, self._projection_on(hidden_ND.device).T)
        return pack_probes(margins_NB, self.tables, self.probes)

    @property
    def _cpu_rows(self) -> int:
        return max(64, _CHUNK_PROJECTIONS // len(self._row_projection_BE))

    @property
    def _device_rows(self) -> int:
        return rows_at_once(*reversed(self._row_projection_BE.shape))

    def _projection_on(self, device: torch.device) -> torch.Tensor:
        if self._device_projection_BE.device != device:
            self._device_projection_BE = self._row_projection_BE.to(device)
        return self._device_projection_BE

    def _largest_norm(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None) -> float:
        largest = 0.0
        device = weight_CD.device
        step = self._cpu_rows if device.type == "cpu" else self._device_rows
        for first, rows in self._extended_chunks(weight_CD, bias_C, None, device, step):
            norms = squared_norms(rows)[:, 0].sqrt()
            if not bool(torch.isfinite(norms).all()):
                row = first + int((~torch.isfinite(norms)).nonzero()[0])
                raise DivergedError(
                    f"The weight row and bias of class {row} have a norm that is not finite; "
                    "the hash functions cannot be fitted."
                )
            largest = max(largest, float(norms.max()))
        return largest

    def _prepare_queries(self, rows_ME: torch.Tensor) -> torch.Tensor:
        """What is rounded and projected, from ``[h, 1]``; may be the same tensor."""
        return torch.nn.functional.pad(rows_ME, (0, 1)) if self._norm_augmentation else rows_ME

    def _prepare_rows(self, rows_ME: torch.Tensor) -> torch.Tensor:
        """What is rounded and projected, from ``[w_c, b_c]`` less the mean; may be the same tensor."""
        if not self._norm_augmentation:
            return rows_ME
        slack = self._max_norm.to(rows_ME.device) ** 2 - squared_norms(rows_ME)
        return torch.cat([rows_ME, slack.clamp_(min=0).sqrt_()], dim=1)

    def _extended_chunks(
        self,
        weight_CD: torch.Tensor,
        bias_C: torch.Tensor | None,
        ids: torch.Tensor | None,
        device: torch.device | str,
        step: int,
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """`step` rows ``[w_c, b_c]`` at a time, less the mean: (first row, fresh float32 (rows, D + 1) on `device`)."""
        count = len(weight_CD) if ids is None else len(ids)
        for first in range(0, count, step):
            weight = _take(weight_CD, first, step, ids)
            extended = torch.empty((len(weight), self._in_features + 1), device=device)
            extended[:, : self._in_features] = weight
            extended[:, self._in_features] = 0.0 if bias_C is None else _take(bias_C, first, step, ids)
            if self._center:
                extended -= self._mean_E.to(extended.device)
            yield first, extended


def _take(values: torch.Tensor, first: int, step: int, ids: torch.Tensor | None) -> torch.Tensor:
    """Rows from `first` on, at most `step`, of all or of those that `ids` name, in this order."""
    values = values.detach()
    if ids is None:
        return values[first : first + step]
    # A quarter of the time of values[ids].
    return values.index_select(0, ids[first : first + step].to(values.device))


def squared_norms(rows_ME: torch.Tensor) -> torch.Tensor:
    """Sums of squares in an order that depends on E alone, so the same on every device: float32 (M, 1)."""
    squares = rows_ME.square()
    while squares.shape[1] > 1:
        rest = squares.shape[1] // 2
        squares[:, :rest] += squares[:, -rest:]
        squares = squares[:, : squares.shape[1] - rest]
    return squares


def draw_projections(count: int, width: int, seed: int, chosen: int | None = None) -> np.ndarray:
    """Odd integers, coarse enough for exact float32 sums: float32 (count, width).

    Gaussian in shape; or, where `chosen` is given, large on that many random coordinates of each projection
    and ±1 on the others.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, _PROJECTION_STREAM]))
    if chosen is None:
        return round_projections(generator.standard_normal((count, width), dtype=np.float32), 32.0)
    order = generator.random((count, width), dtype=np.float32)
    size = np.where(order <= np.partition(order, chosen - 1, axis=1)[:, chosen - 1 : chosen], 1.0, 1e-9)
    sign = np.where(generator.random((count, width), dtype=np.float32) < 0.5, -1, 1)
    return round_projections((sign * size).astype(np.float32), 127.0)


def round_projections(projection_BE: np.ndarray, scale: float) -> np.ndarray:
    """`scale` times the projections as odd integers, at a smaller scale where sums would not be exact.

    Args:
        projection_BE: float32 (B, E).
        scale: Positive.

    Returns:
        float32 (B, E) of odd integers from -127 to 127.
    """
    while True:
        # Odd numbers have no zero, which would leave one-hot rows on neither side of a hyperplane.
        odd = (2 * np.floor(projection_BE * (scale / 2)) + 1).clip(-127, 127)
        if _ROW_LEVELS * float(np.abs(odd).sum(axis=1, dtype=np.float64).max()) < _EXACT_LIMIT:
            return odd
        scale /= 2


def _has_fast_bfloat16() -> bool:
    features = llvmlite.binding.get_host_cpu_features()
    return bool(features.get("avx512bf16") or features.get("amx-bf16"))


def _quantise(rows_ME: torch.Tensor) -> int:
    """Scale each float32 row, in place, to integers in [-255, 255]; the first not finite row, or -1."""
    rows = rows_ME.numpy()
    largest = np.empty(len(rows), dtype=np.int32)
    _scale_rows(rows, rows.view(np.int32), largest)
    bad = np.flatnonzero(largest >= _INFINITY_BITS)
    return int(bad[0]) if len(bad) else -1


@numba.njit(cache=True, nogil=True, parallel=True)
def _scale_rows(rows, bits, largest):
    """The largest magnitude is found on the bits of the floats: integer maxima vectorise, and keep NaN on top."""
    for i in numba.prange(len(rows)):
        top = np.int32(0)
        for j in range(rows.shape[1]):
            top = max(top, bits[i, j] & np.int32(0x7FFFFFFF))
        largest[i] = top
        scale = np.float32(0)
        for j in range(rows.shape[1]):
            if bits[i, j] & np.int32(0x7FFFFFFF) == top:
                scale = abs(rows[i, j])
                break
        if 0 < top < _INFINITY_BITS:
            for j in range(rows.shape[1]):
                # Dividing before multiplying keeps subnormal rows finite.
                rows[i, j] = np.rint(rows[i, j] / scale * np.float32(_ROW_LEVELS))


@numba.njit(cache=True, nogil=True, parallel=True)
def _pack_rows(signs_BM, codes_LC, first, bits):
    """Bit j of table t's code is 1 where projection ``t * bits + j`` is above zero."""
    for t in numba.prange(codes_LC.shape[0]):
        out = codes_LC[t, first : first + signs_BM.shape[1]]
        out[:] = 0
        for j in range(bits):
            signs = signs_BM[t * bits + j]
            for i in range(len(out)):
                out[i] |= (signs[i] > 0) << j


@numba.njit(cache=True, nogil=True, parallel=True)
def _pack_queries(margins_NB, codes_NLV, bits):
    """Own code, then those with the bit of the 1st, 2nd, ... smallest margin flipped; ties: lower bit."""
    tables, versions = codes_NLV.shape[1:]
    for n in numba.prange(codes_NLV.shape[0]):
        for t in range(tables):
            margins = margins_NB[n, t * bits : (t + 1) * bits]
            code = 0
            for j in range(bits):
                code |= (margins[j] > 0) << j
            codes_NLV[n, t, 0] = code
            flipped = 0
            for v in range(1, versions):
                nearest = -1
                for j in range(bits):
                    free = (flipped >> j) & 1 == 0
                    if free and (nearest < 0 or abs(margins[j]) < abs(margins[nearest])):
                        nearest = j
                flipped |= 1 << nearest
                codes_NLV[n, t, v] = code ^ (1 << nearest)
