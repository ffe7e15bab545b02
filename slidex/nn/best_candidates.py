"""Prediction by an index: its candidates, scored exactly.

Legend: N rows in a batch, D hidden width, A candidates per row, k classes asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from slidex.kernels import cpu

if TYPE_CHECKING:
    from types import ModuleType

    from slidex.nn.scoring import Rows


def best_candidates(
    rows: Rows,
    hidden_ND: torch.Tensor,
    candidates_NA: torch.Tensor,
    k: int,
    kernels: ModuleType = cpu,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of each row's candidates, exactly scored, best first.

    Args:
        rows: The layer.
        hidden_ND: float (N, D).
        candidates_NA: int64 (N, A), -1 for none.
        k: Classes per row.
        kernels: Those for the device of the layer.

    Returns:
        Scores float (N, k) and ids int64 (N, k), padded with -inf and -1 where a row has fewer candidates.
    """
    logits_NA = kernels.pair_logits(hidden_ND, rows.weight, rows.bias, candidates_NA)
    scores, slots = logits_NA.topk(min(k, logits_NA.shape[1]))
    missing = k - slots.shape[1]
    return (
        pad(scores, (0, missing), value=-torch.inf),
        pad(candidates_NA.gather(1, slots), (0, missing), value=-1),
    )
