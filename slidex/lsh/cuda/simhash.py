"""SimHash's rounding and packing in torch, on any device, with the bits of `slidex.lsh.simhash`.

Division and rounding follow IEEE 754 on either, and the product of integers this small is exact in float32 whatever
the order of its sums; also where torch may use TF32, whose 11 digits hold factors of up to 8. It is not done in
bfloat16, for which torch may add partial sums that are rounded. No kernel is needed: packing by torch moves 14 bytes
a sign where a kernel would move 4, beside a product that takes several times as long as either.

Legend: M vectors, E hashed width, B = K L hyperplanes, K bits, L tables, V codes looked up per table.
"""

from __future__ import annotations

import torch

from slidex.lsh.family import rows_at_once


def quantise(rows_ME: torch.Tensor, levels: int) -> torch.Tensor:
    """Each row scaled to its largest entry and rounded to integers in ``[-levels, levels]``: float32 (M, E)."""
    scale_M1 = rows_ME.abs().amax(dim=1, keepdim=True)
    scale_M1 = torch.where(scale_M1 > 0, scale_M1, 1.0)
    # Dividing before multiplying keeps subnormal rows finite.
    return (rows_ME / scale_M1).mul_(levels).round_()


def mean_row(rows_CD: torch.Tensor) -> torch.Tensor:
    """Mean of the rows, float64 (D,); torch's own would first copy all of them to float64."""
    parts = rows_CD.split(rows_at_once(rows_CD.shape[1], 1))
    return torch.stack([part.sum(dim=0, dtype=torch.float64) for part in parts]).sum(dim=0) / len(rows_CD)


def pack(margins_BM: torch.Tensor, tables: int) -> torch.Tensor:
    """Own codes, int32 (L, M): bit j of table t is 1 where projection ``t * K + j`` is above zero."""
    above_LKM = margins_BM.view(tables, len(margins_BM) // tables, -1) > 0
    return (above_LKM * _powers(above_LKM)[:, None]).sum(dim=1, dtype=torch.int32)


def pack_probes(margins_MB: torch.Tensor, tables: int, probes: int) -> torch.Tensor:
    """Own code, then those with the bit of the 1st, 2nd, ... smallest margin flipped: int32 (M, L, V)."""
    margins_MLK = margins_MB.view(len(margins_MB), tables, margins_MB.shape[1] // tables)
    powers_K = _powers(margins_MLK.transpose(1, 2))
    own_ML1 = ((margins_MLK > 0) * powers_K).sum(dim=2, keepdim=True, dtype=torch.int32)
    if probes == 0:
        return own_ML1
    nearest_MLP = margins_MLK.abs().argsort(dim=2, stable=True)[:, :, :probes]
    return torch.cat([own_ML1, own_ML1 ^ powers_K[nearest_MLP]], dim=2)


def _powers(values_LKM: torch.Tensor) -> torch.Tensor:
    return 1 << torch.arange(values_LKM.shape[1], dtype=torch.int32, device=values_LKM.device)
