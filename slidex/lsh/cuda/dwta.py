"""Numba-CUDA kernels of densified winner-take-all, with the codes of `slidex.lsh.dwta` to the bit.

Only comparisons, one subtraction and integers are at work, so nothing rounds otherwise than on the CPU. A first
kernel finds the winner of every bin of every row, a second one fills empty bins and packs digits into codes.

Legend: M rows, D hidden width, B bins (tables times digits), S positions in a bin, L tables, V codes looked up
    per table, J digits of a code.
"""

from __future__ import annotations

import numpy as np
import torch

from slidex.kernels.cuda.launch import cuda, kernel
from slidex.lsh.cuda.grid import THREADS, blocks_of

_NOTHING = np.float32(-np.inf)
_ENDLESS = np.float32(np.inf)


@kernel
def find_winners(rows_MD, last_M, bins_SB, digits_MB, filled_MB):
    """Position of the largest value in each bin, the first of equals, and whether the bin holds any.

    Reads S values per bin, those of a row from the first-level cache; writes 2 bytes. No atomics. Deterministic.
    Grid: any, one bin of one row a thread at a time.

    Args:
        rows_MD: float32 (M, D).
        last_M: float32 (M,), the last coordinate of each row.
        bins_SB: int32 (S, B), coordinates of each bin, at most D.
        digits_MB: uint8 (M, B), written.
        filled_MB: uint8 (M, B), written: 1, or 0 for a bin of zeros.
    """
    size, bins = bins_SB.shape
    width = rows_MD.shape[1]
    for i in range(cuda.grid(1), rows_MD.shape[0] * bins, cuda.gridsize(1)):
        m, b = i // bins, i % bins
        digit, best = 0, _NOTHING
        for s in range(size):
            e = bins_SB[s, b]
            value = last_M[m] if e == width else rows_MD[m, e]
            if value != 0 and value > best:
                digit, best = s, value
        digits_MB[m, b] = digit
        filled_MB[m, b] = 1 if best > _NOTHING else 0


@kernel
def find_runners_up(rows_MD, last_M, bins_SB, digits_MB, seconds_MB, leads_MB):
    """Position of the second largest value in each bin, the first of equals, and the winner's lead over it.

    The lead is infinite where the bin holds one value or none. Reads as `find_winners`, writes 5 bytes a bin. No
    atomics. Deterministic. Grid: any.

    Args:
        rows_MD: float32 (M, D).
        last_M: float32 (M,).
        bins_SB: int32 (S, B).
        digits_MB: uint8 (M, B), as `find_winners` gave them.
        seconds_MB: uint8 (M, B), written; 0 where there is none.
        leads_MB: float32 (M, B), written.
    """
    size, bins = bins_SB.shape
    width = rows_MD.shape[1]
    for i in range(cuda.grid(1), rows_MD.shape[0] * bins, cuda.gridsize(1)):
        m, b = i // bins, i % bins
        digit, second, best, low = digits_MB[m, b], 0, _NOTHING, _NOTHING
        for s in range(size):
            e = bins_SB[s, b]
            value = last_M[m] if e == width else rows_MD[m, e]
            if s == digit:
                best = value
            elif value != 0 and value > low:
                second, low = s, value
        seconds_MB[m, b] = second
        leads_MB[m, b] = best - low if low > _NOTHING else _ENDLESS


@cuda.jit(device=True)
def _lender(filled_B, starts_B, strides_B, b):
    """The bin whose digit bin b has: its own, or the first on its walk that is not empty; -1 where all are."""
    if filled_B[b]:
        return np.int64(b)
    at = np.int64(starts_B[b])
    for _ in range(len(filled_B)):
        if filled_B[at]:
            return at
        at = (at + strides_B[b]) % len(filled_B)
    return np.int64(-1)


@cuda.jit(device=True)
def _digit(digits_B, lender):
    return np.int64(digits_B[lender]) if lender >= 0 else np.int64(0)


@cuda.jit(device=True)
def _nearest(filled_B, leads_B, first, digits, replaced):
    """The digit of the smallest lead that is not replaced yet, the lower one of equals; empty bins lead endlessly."""
    nearest, least = -1, _ENDLESS
    for j in range(digits):
        lead = leads_B[first + j] if filled_B[first + j] else _ENDLESS
        if (replaced >> j) & 1 == 0 and (nearest < 0 or lead < least):
            nearest, least = j, lead
    return nearest


@kernel
def pack_codes(digits_MB, filled_MB, seconds_MB, leads_MB, starts_B, strides_B, digit_bits, bits, codes_LMV):
    """Codes, own code first, then those with the digit of the 1st, 2nd, ... smallest lead replaced.

    Digit j of table t is that of bin ``t * J + j``, at bit ``j * digit_bits``. Reads 2 bytes a bin, for V > 1 up to
    7 V, and walks on where bins are empty; writes 4 bytes a code. No atomics. Deterministic. Grid: any, one code of
    one row a thread at a time. Reference: `slidex.lsh.dwta`, which it equals.

    Args:
        digits_MB: uint8 (M, B).
        filled_MB: uint8 (M, B).
        seconds_MB: uint8 (M, B), read where V > 1.
        leads_MB: float32 (M, B), read where V > 1.
        starts_B: int32 (B,), where each bin's walk begins.
        strides_B: int32 (B,), and its step.
        digit_bits: Bits of a digit.
        bits: K.
        codes_LMV: int32 (L, M, V), written.
    """
    tables, rows, versions = codes_LMV.shape
    digits = digits_MB.shape[1] // tables
    mask = (1 << bits) - 1
    for i in range(cuda.grid(1), tables * rows, cuda.gridsize(1)):
        t, m = i // rows, i % rows
        first = t * digits
        code = 0
        for j in range(digits):
            lender = _lender(filled_MB[m], starts_B, strides_B, first + j)
            code |= (_digit(digits_MB[m], lender) << (j * digit_bits)) & mask
        codes_LMV[t, m, 0] = code
        replaced = 0
        for v in range(1, versions):
            j = _nearest(filled_MB[m], leads_MB[m], first, digits, replaced)
            replaced |= 1 << j
            lender = _lender(filled_MB[m], starts_B, strides_B, first + j)
            change = _digit(digits_MB[m], lender) ^ _digit(seconds_MB[m], lender)
            change = (change << (j * digit_bits)) & mask
            codes_LMV[t, m, v] = code ^ (change if change != 0 else 1 << (j * digit_bits))


class DeviceBins:
    """Bins and probe sequences of `slidex.lsh.Dwta` on a device.

    Args:
        functions: Bins, int64 (B, S), starts and strides, int64 (B,).
        digit_bits: Bits of a digit.
        bits: K.
        tables: L.
        device: Where to hash.
    """

    def __init__(
        self,
        functions: tuple[np.ndarray, np.ndarray, np.ndarray],
        digit_bits: int,
        bits: int,
        tables: int,
        device: torch.device,
    ) -> None:
        self.device = device
        self._digit_bits, self._bits, self._tables = digit_bits, bits, tables
        bins_BS, starts_B, strides_B = (
            torch.from_numpy(array).to(device, torch.int32) for array in functions
        )
        self._bins_SB = bins_BS.T.contiguous()
        self._walks = starts_B, strides_B

    def hash(self, rows_MD: torch.Tensor, last_M: torch.Tensor, versions: int) -> torch.Tensor:
        """Codes of vectors: int32 (L, M, V).

        Args:
            rows_MD: float32 (M, D), contiguous, finite.
            last_M: float32 (M,), the last coordinate of each.
            versions: V: 1 for own codes only.
        """
        shape = len(rows_MD), self._bins_SB.shape[1]
        digits_MB, filled_MB = (torch.empty(shape, dtype=torch.uint8, device=self.device) for _ in range(2))
        seconds_MB, leads_MB = digits_MB, torch.empty((1, 1), device=self.device)  # not read
        blocks = blocks_of(digits_MB.numel())
        find_winners.launch(blocks, THREADS, rows_MD, last_M, self._bins_SB, digits_MB, filled_MB)
        if versions > 1:
            seconds_MB, leads_MB = torch.empty_like(digits_MB), torch.empty(shape, device=self.device)
            find_runners_up.launch(
                blocks, THREADS, rows_MD, last_M, self._bins_SB, digits_MB, seconds_MB, leads_MB
            )
        codes_LMV = torch.empty((self._tables, len(rows_MD), versions), dtype=torch.int32, device=self.device)
        pack_codes.launch(
            blocks_of(self._tables * len(rows_MD)),
            THREADS,
            digits_MB,
            filled_MB,
            seconds_MB,
            leads_MB,
            *self._walks,
            self._digit_bits,
            self._bits,
            codes_LMV,
        )
        return codes_LMV
