"""Stochastic rounding of updated weights to 16 bits, in plain torch, and the random bits of every implementation.

Rounding to nearest loses a step of less than half a unit of a weight's last place, and training stalls. Rounded up with
a probability of the share that the number has of the way between its two neighbours, a weight is the number on average
(Gupta, Agrawal, Gopalakrishnan and Narayanan 2015). The bits that decide are a hash of (seed, step, row, column): the
same in every run, on every device, for any order of rows. The mixer is the finaliser of MurmurHash3 (Appleby 2011), a
bijection of 32 bits: no two steps of a seed share a key, and no two of the first 2^32 rows of a step.
"""

from __future__ import annotations

from typing import TypeVar

import torch

MIX_1, MIX_2 = 0x85EBCA6B, 0xC2B2AE35
BIAS_COLUMN = -1
"""Of an entry of a (R,) parameter, so that a bias and its row's first weight are not rounded alike."""
SMALLEST_NORMAL_HALF = 2.0**-14

_MASK = 0xFFFFFFFF
_Bits = TypeVar("_Bits", int, torch.Tensor)


def mix32(value: _Bits) -> _Bits:
    """Bits that look random, from 0 to 2^32 - 1, of the lowest 32 of a number, or of each one in an int64 tensor."""
    value = value & _MASK
    value = ((value ^ (value >> 16)) * MIX_1) & _MASK
    value = ((value ^ (value >> 13)) * MIX_2) & _MASK
    return value ^ (value >> 16)


def rounding_key(seed: int, step: int) -> int:
    """Of all the random bits of a step, below 2^32."""
    return mix32(mix32(seed) + step)


def stochastic_round(x: torch.Tensor, dtype: torch.dtype, ids: torch.Tensor, key: int) -> torch.Tensor:
    """Rows of a (R, D) or (R,) parameter rounded to one of their two neighbours in `dtype`, without bias.

    What `dtype` holds stays as it is; NaN and infinity stay what they are; what is beyond its largest number may become
    infinite, as in rounding to nearest. One below 2^-14 is for float16, whose unit there is 2^-24, first rounded to the
    nearest multiple of 2^-37.

    Args:
        x: floating (U, D) or (U,), taken in float32.
        dtype: torch.bfloat16 or torch.float16.
        ids: int32 or int64 (U,), the rows in the parameter.
        key: From `rounding_key`.

    Returns:
        The shape of `x`, in `dtype`.
    """
    row_key = mix32(ids.long() ^ key)
    if x.dim() == 2:
        bits = mix32(row_key[:, None] + torch.arange(x.shape[1], device=x.device))
    else:
        bits = mix32(row_key + BIAS_COLUMN)
    x = x.float()
    if dtype == torch.bfloat16:
        rounded = _cut(x, bits, 16)
    else:  # one binade up, numbers below the smallest normal one are as far apart as they are here
        lifted = torch.where(x.abs() < SMALLEST_NORMAL_HALF, SMALLEST_NORMAL_HALF, 0.0).copysign(x)
        rounded = _cut(x + lifted, bits, 13) - lifted
    return torch.where(x.isfinite(), rounded, x).to(dtype)


def _cut(x: torch.Tensor, bits: torch.Tensor, places: int) -> torch.Tensor:
    """float32 whose last `places` bits are 0, of the numbers and what the random bits add to those places."""
    added = (x.contiguous().view(torch.int32) + (bits & (1 << places) - 1).int()) >> places << places
    return added.view(torch.float32)
