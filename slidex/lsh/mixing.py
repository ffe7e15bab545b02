"""The hashes that settle what is left to chance, in torch: on every device those of `slidex.lsh.reading` on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slidex.lsh.reading import mix

if TYPE_CHECKING:
    import torch


def hash_key(number: int) -> int:
    """A key for `mix_ids`: the hash of a number below 2^64, its bits as a signed number."""
    return _signed(int(mix(number)))


def mix_ids(ids: torch.Tensor, key: int) -> torch.Tensor:
    """`slidex.lsh.voting.mix_ids`, as int64 in the order of the unsigned hashes.

    Args:
        ids: int64 (M,).
        key: The bits of a uint64 as a signed number.
    """
    value = (ids ^ key) + _signed(0x9E3779B97F4A7C15)
    value = (value ^ _shifted(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shifted(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _shifted(value, 31) ^ _signed(1 << 63)


def _shifted(value: torch.Tensor, places: int) -> torch.Tensor:
    """Bits moved right, with zeros moving in."""
    return (value >> places) & ((1 << 64 - places) - 1)


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits
