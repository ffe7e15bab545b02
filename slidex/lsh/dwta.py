"""Densified winner-take-all (Chen & Shrivastava 2018): codes from the order of coordinates, not their size.

Winner-take-all (Yagnik et al. 2011) looks at a bin of m random coordinates and keeps the position of the
largest: a digit of log2(m) bits. Vectors agree in a digit when their large entries are in the same places,
which suits hidden vectors after a ReLU, and any scaling of a vector leaves its code as it is. In a sparse vector
many bins hold nothing but zeros. Such a bin takes the digit of another one, found by a probe sequence that
depends on the bin alone, so that two vectors with the same empty bins borrow from the same places.

Rows hashed are [w_c, b_c] and queries [h, 1]. An entry that is exactly zero counts as absent, as in the paper:
it wins only over nothing, so among non-zero entries the largest, with its sign, wins. That is right for a hidden
vector after a ReLU, whose entries are zero or above, and for a dense row, which has no zeros. Of equal entries
the first in the bin wins. A norm has no effect on a code, so neither has norm augmentation; the 1 of a query
competes with the hidden units of its bin, and so finds rows whose bias is large beside their weights.

Against SLIDE: a digit takes log2(m) bits of the code (it shifts by the natural logarithm, which folds codes onto
each other), the probe sequence reaches every bin (it gives up after 100 tries), and the query's bias coordinate
takes part.

Legend: N query rows, M weight rows, C classes, D hidden width, E = D + 1 hashed width, B bins (tables times
    digits), S positions in a bin, R rows hashed side by side, L tables, V codes looked up per table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np
import torch

from slidex.errors import ConfigError, DivergedError
from slidex.lsh.family import MAX_BITS, code_dtype, row_not_hashable, rows_at_once
from slidex.lsh.hash_index import register_hash_family
from slidex.lsh.index import check_integer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from slidex.lsh.cuda.dwta import DeviceBins
    from slidex.lsh.index import QuerySample

_MAX_BIN_SIZE = 256
_BLOCK_ROWS = 32
"""Rows hashed side by side in the vector unit; few, so that a batch of queries is work for several threads."""
_CHUNK_VALUES = 1 << 22
_BIN_STREAM = 0xD37A


@register_hash_family("dwta")
class Dwta:
    """L tables of codes made of densified winner-take-all digits.

    Args:
        in_features: Hidden width D.
        bits: Bits of a code, 1 to 24. It has ``ceil(bits / log2(bin_size))`` digits; where that is more than whole
            digits, the last one keeps its low bits only.
        tables: L, at least 1.
        seed: Fixes bins and probe sequences (Philox).
        bin_size: m, coordinates that compete for a digit: a power of two, 2 to 256 and at most D + 1. Large bins
            are seldom empty and make sharp digits; small ones forgive small differences.
        probes: Further codes looked up per table and query, each with one digit replaced by its bin's
            runner-up, smallest lead of the winner first; 0 to the number of digits.
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
        bin_size: int = 8,
        probes: int = 0,
    ) -> None:
        check_integer("bits", "dwta", bits, 1, MAX_BITS)
        self._digit_bits = _digit_bits(bin_size, in_features)
        digits = -(-bits // self._digit_bits)
        check_integer("tables", "dwta", tables, 1)
        check_integer("probes", "dwta", probes, 0, digits)
        self.bits, self.tables, self.probes = bits, tables, probes
        bins = tables * digits
        generator = np.random.Generator(np.random.Philox(key=[seed, _BIN_STREAM]))
        bins_BS = _draw_bins(generator, bins, in_features + 1, bin_size)
        self._functions = (bins_BS, *_draw_walks(generator, bins))
        self._width = in_features + 1
        self._device_bins: DeviceBins | None = None

    @property
    def bytes(self) -> int:
        """Memory of the bins and their probe sequences."""
        return sum(array.nbytes for array in self._functions)

    def fit(
        self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, queries: QuerySample | None = None
    ) -> None:
        """Nothing: the hash functions take nothing from the data."""

    def parameters(self) -> dict[str, torch.Tensor]:
        """Empty, as there is nothing to fit."""
        return {}

    def load_parameters(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Nothing, as there is nothing to fit."""

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
        step = _BLOCK_ROWS * max(1, _CHUNK_VALUES // (_BLOCK_ROWS * self._width))
        for first in range(0, count, step):
            rows = slice(first, first + step) if ids is None else ids[first : first + step]
            weight_MD = _float32(weight_CD[rows])
            bias_M = np.zeros(len(weight_MD), np.float32) if bias_C is None else _float32(bias_C[rows])
            codes_LM = codes_LC[:, first : first + step]
            bad = _hash_rows(weight_MD, bias_M, *self._functions, self._digit_bits, self.bits, codes_LM)
            if bad >= 0:
                raise row_not_hashable(int(first + bad), ids)
        return codes_LC

    def hash_queries(self, hidden_ND: torch.Tensor) -> np.ndarray:
        """Codes to look up: int32 (N, L, V), the query's own code first, then its probes.

        Raises:
            DivergedError: A row holds a value that is not finite.
        """
        codes_NLV = np.empty((len(hidden_ND), self.tables, 1 + self.probes), dtype=np.int32)
        one_N = np.ones(len(hidden_ND), np.float32)
        bad = _hash_queries(
            _float32(hidden_ND), one_N, *self._functions, self._digit_bits, self.bits, codes_NLV
        )
        if bad >= 0:
            raise DivergedError(f"Row {bad} of the hidden vectors holds a value that is not finite.")
        return codes_NLV

    def hash_rows_on_device(
        self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What `hash_rows` gives, computed where the weights are: int32 (L, C), or (L, M)."""
        count = len(weight_CD) if ids is None else len(ids)
        codes_LC = torch.empty((self.tables, count), dtype=torch.int32, device=weight_CD.device)
        step = rows_at_once(weight_CD.shape[1], len(self._functions[0]))
        for first in range(0, count, step):
            rows = slice(first, first + step) if ids is None else ids[first : first + step]
            weight_MD = weight_CD[rows].detach().float().contiguous()
            bias_M = weight_MD.new_zeros(len(weight_MD)) if bias_C is None else bias_C[rows].detach().float()
            bad_M = ~(torch.isfinite(weight_MD).all(dim=1) & torch.isfinite(bias_M))
            if bool(bad_M.any()):
                raise row_not_hashable(first + int(bad_M.nonzero()[0]), ids)
            codes_LMV = self._bins_on(weight_CD.device).hash(weight_MD, bias_M.contiguous(), 1)
            codes_LC[:, first : first + len(weight_MD)] = codes_LMV[:, :, 0]
        return codes_LC

    def hash_queries_on_device(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """What `hash_queries` gives for finite rows, computed where these are and without waiting for it."""
        hidden_ND = hidden_ND.detach().float().contiguous()
        one_N = hidden_ND.new_ones(len(hidden_ND))
        codes_LNV = self._bins_on(hidden_ND.device).hash(hidden_ND, one_N, 1 + self.probes)
        return codes_LNV.transpose(0, 1).contiguous()

    def _bins_on(self, device: torch.device) -> DeviceBins:
        from slidex.lsh.cuda.dwta import DeviceBins  # noqa: PLC0415  (needs numba-cuda)

        if self._device_bins is None or self._device_bins.device != device:
            self._device_bins = DeviceBins(self._functions, self._digit_bits, self.bits, self.tables, device)
        return self._device_bins


def _digit_bits(bin_size: int, in_features: int) -> int:
    highest = min(_MAX_BIN_SIZE, in_features + 1)
    check_integer("bin_size", "dwta", bin_size, 2, highest)
    bits = bin_size.bit_length() - 1
    if bin_size != 1 << bits:
        raise ConfigError(
            f"The 'bin_size' parameter of dwta must be a power of two from 2 to {highest}. "
            f"Got {bin_size!r} instead."
        )
    return bits


def _draw_bins(generator: np.random.Generator, count: int, width: int, size: int) -> np.ndarray:
    """int64 (count, size): coordinates of each bin, from permutations of all of them cut into bins."""
    each = width // size
    cuts = [generator.permutation(width)[: each * size].reshape(each, size) for _ in range(0, count, each)]
    return np.ascontiguousarray(np.concatenate(cuts)[:count])


def _draw_walks(generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and stride, int64 (count,), of each bin's probe sequence ``(start + i * stride) mod count``.

    Double hashing with a stride that has no factor in common with the number of bins, so that a sequence
    reaches each bin once.
    """
    strides = np.arange(1, count + 1)
    strides = strides[np.gcd(strides, count) == 1]
    return generator.integers(0, count, count), generator.choice(strides, count)


def _float32(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy()


@numba.njit(cache=True, nogil=True)
def _lay_out(rows_MD, last_M, first, values_ER):
    """Columns ``[row, last]`` of rows ``first, first + 1, ...``, zeros as -inf; the first bad row, or -1."""
    bad, width = -1, rows_MD.shape[1]
    for r in range(min(values_ER.shape[1], len(rows_MD) - first)):
        finite = True
        for e in range(width + 1):
            value = rows_MD[first + r, e] if e < width else last_M[first + r]
            finite &= np.isfinite(value)
            values_ER[e, r] = value if value != 0 else -np.inf
        if not finite and bad < 0:
            bad = first + r
    return bad


@numba.njit(cache=True, nogil=True)
def _find_winners(values_ER, bins_BS, digits_BR, best_BR):
    """Position and size of the largest value in each bin, the first of equals."""
    for b in range(len(bins_BS)):
        digit_R, best_R = digits_BR[b], best_BR[b]
        digit_R[:] = 0
        best_R[:] = -np.inf
        for s in range(bins_BS.shape[1]):
            value_R = values_ER[bins_BS[b, s]]
            for r in range(len(best_R)):
                digit_R[r] = s if value_R[r] > best_R[r] else digit_R[r]
                best_R[r] = max(value_R[r], best_R[r])


@numba.njit(cache=True, nogil=True)
def _find_runners_up(values_ER, bins_BS, digits_BR, best_BR, seconds_BR, leads_BR):
    """Position of the second largest value in each bin, the first of equals, and the winner's lead over it.

    The lead is infinite where the bin holds one value or none: such a digit is the last to be replaced.
    """
    for b in range(len(bins_BS)):
        digit_R, second_R, low_R = digits_BR[b], seconds_BR[b], leads_BR[b]
        second_R[:] = 0
        low_R[:] = -np.inf
        for s in range(bins_BS.shape[1]):
            value_R = values_ER[bins_BS[b, s]]
            for r in range(len(low_R)):
                larger = (value_R[r] > low_R[r]) & (digit_R[r] != s)
                second_R[r] = s if larger else second_R[r]
                low_R[r] = value_R[r] if larger else low_R[r]
        for r in range(len(low_R)):
            low_R[r] = best_BR[b, r] - low_R[r] if low_R[r] > -np.inf else np.inf


@numba.njit(cache=True, nogil=True)
def _densify(digits_BR, best_BR, starts_B, strides_B):
    """Empty bins take the digit of the first bin on their walk that is not empty; 0 where all are."""
    bins, rows = best_BR.shape
    for b in range(bins):
        for r in range(rows):
            if best_BR[b, r] > -np.inf:
                continue
            at = starts_B[b]
            for _ in range(bins):
                if best_BR[at, r] > -np.inf:
                    digits_BR[b, r] = digits_BR[at, r]
                    break
                at = (at + strides_B[b]) % bins


@numba.njit(cache=True, nogil=True, parallel=True)
def _hash_rows(rows_MD, last_M, bins_BS, starts_B, strides_B, digit_bits, bits, codes_LM):
    """Fill `codes_LM`, digit j of table t at bit ``j * digit_bits``; returns the first bad row, or -1."""
    bins, tables = len(bins_BS), len(codes_LM)
    digits = bins // tables
    bad_blocks = np.empty((len(rows_MD) + _BLOCK_ROWS - 1) // _BLOCK_ROWS, np.int64)
    for block in numba.prange(len(bad_blocks)):
        first = block * _BLOCK_ROWS
        count = min(_BLOCK_ROWS, len(rows_MD) - first)
        values_ER = np.full((rows_MD.shape[1] + 1, _BLOCK_ROWS), -np.inf, np.float32)
        digits_BR = np.empty((bins, _BLOCK_ROWS), np.int32)
        best_BR = np.empty((bins, _BLOCK_ROWS), np.float32)
        bad_blocks[block] = _lay_out(rows_MD, last_M, first, values_ER)
        _find_winners(values_ER, bins_BS, digits_BR, best_BR)
        _densify(digits_BR[:, :count], best_BR[:, :count], starts_B, strides_B)
        for t in range(tables):
            out = codes_LM[t, first : first + count]
            out[:] = 0
            for j in range(digits):
                for r in range(count):
                    out[r] |= (digits_BR[t * digits + j, r] << (j * digit_bits)) & ((1 << bits) - 1)
    for bad in bad_blocks:
        if bad >= 0:
            return bad
    return -1


@numba.njit(cache=True, nogil=True, parallel=True)
def _hash_queries(rows_ND, last_N, bins_BS, starts_B, strides_B, digit_bits, bits, codes_NLV):
    """As `_hash_rows`, with runners-up; every block writes its own rows."""
    bins, tables = len(bins_BS), codes_NLV.shape[1]
    digits = bins // tables
    bad_blocks = np.empty((len(rows_ND) + _BLOCK_ROWS - 1) // _BLOCK_ROWS, np.int64)
    for block in numba.prange(len(bad_blocks)):
        first = block * _BLOCK_ROWS
        count = min(_BLOCK_ROWS, len(rows_ND) - first)
        values_ER = np.full((rows_ND.shape[1] + 1, _BLOCK_ROWS), -np.inf, np.float32)
        digits_BR = np.empty((bins, _BLOCK_ROWS), np.int32)
        best_BR = np.empty((bins, _BLOCK_ROWS), np.float32)
        seconds_BR = np.zeros((bins, _BLOCK_ROWS), np.int32)
        leads_BR = np.zeros((bins, _BLOCK_ROWS), np.float32)
        bad_blocks[block] = _lay_out(rows_ND, last_N, first, values_ER)
        _find_winners(values_ER, bins_BS, digits_BR, best_BR)
        if codes_NLV.shape[2] > 1:
            _find_runners_up(values_ER, bins_BS, digits_BR, best_BR, seconds_BR, leads_BR)
            _densify(seconds_BR[:, :count], best_BR[:, :count], starts_B, strides_B)
        _densify(digits_BR[:, :count], best_BR[:, :count], starts_B, strides_B)
        for r in range(count):
            for t in range(tables):
                own = slice(t * digits, (t + 1) * digits)
                _pack_versions(
                    digits_BR[own, r],
                    seconds_BR[own, r],
                    leads_BR[own, r],
                    digit_bits,
                    bits,
                    codes_NLV[first + r, t],
                )
    for bad in bad_blocks:
        if bad >= 0:
            return bad
    return -1


@numba.njit(cache=True, nogil=True)
def _pack_versions(digits_J, seconds_J, leads_J, digit_bits, bits, codes_V):
    """Own code, then those with the digit of the 1st, 2nd, ... smallest lead replaced; ties: lower digit."""
    mask = (1 << bits) - 1
    code = 0
    for j in range(len(digits_J)):
        code |= (np.int64(digits_J[j]) << (j * digit_bits)) & mask
    codes_V[0] = code
    replaced = 0
    for v in range(1, len(codes_V)):
        nearest = -1
        for j in range(len(leads_J)):
            free = (replaced >> j) & 1 == 0
            if free and (nearest < 0 or leads_J[j] < leads_J[nearest]):
                nearest = j
        replaced |= 1 << nearest
        change = (np.int64(digits_J[nearest] ^ seconds_J[nearest]) << (nearest * digit_bits)) & mask
        # Without a runner-up, or where a shortened digit hides the difference, the lowest bit makes one.
        codes_V[v] = code ^ (change if change != 0 else 1 << (nearest * digit_bits))
