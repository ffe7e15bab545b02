"""A softmax over active classes whose labels give a share of their mass to all classes alike, or none.

Legend: N rows, A active classes per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from slidex.nn.sharding import sharded_softmax_loss

if TYPE_CHECKING:
    from types import ModuleType

    from slidex.nn.sharding import Shard


class LabelMass(NamedTuple):
    """How much each label counts in a softmax, where that is not 1 / (labels of its row).

    Args:
        weights: float (P,), mass of every stored label.
        smoothing: Share of the mass that is spread over all classes instead (Szegedy et al., 2016), in [0, 1].
        class_weights: float (C,), factor of each class's part of what is spread; None means 1.
    """

    weights: torch.Tensor
    smoothing: float = 0.0
    class_weights: torch.Tensor | None = None


def softmax(
    kernels: ModuleType,
    logits_NA: torch.Tensor,
    target_NA: torch.Tensor,
    offset_NA: torch.Tensor | None,
    shard: Shard | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient over the active slots, of all processes where there is a shard."""
    if shard is None:
        return kernels.softmax_loss(logits_NA, target_NA, offset_NA)
    scores_NA = logits_NA if offset_NA is None else logits_NA + offset_NA
    return sharded_softmax_loss(scores_NA, target_NA, shard), scores_NA


def smoothed_softmax(
    kernels: ModuleType,
    logits_NA: torch.Tensor,
    target_NA: torch.Tensor,
    ids: torch.Tensor,
    offset: torch.Tensor,
    mass: LabelMass,
    row_scale: float | torch.Tensor,
    shard: Shard | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of a softmax whose labels give a share of their mass to all classes alike.

    The sum of all classes' scores is estimated as the softmax's denominator is, with weight exp(offset) for each active
    class, scaled so that these add up to 1.

    Args:
        kernels: What computes the softmax.
        logits_NA: float (N, A), -inf at pads.
        target_NA: float (N, A), mass of the labels; changed in place.
        ids: int64 (N, A) or (1, A), the classes; -1 at pads.
        offset: float (N, A) or (1, A), log weights; of pads anything but NaN.
        mass: Says how much is spread, and among whom.
        row_scale: As in `slidex.nn.scoring.Scorer.score`.
        shard: As in `slidex.nn.scoring.Scorer`.
    """
    spread = offset.exp() * (ids >= 0)
    total_N1, labelled_N1 = spread.sum(1, keepdim=True), (target_NA != 0).any(1, keepdim=True)
    if shard is not None:
        sums_N2 = torch.cat([total_N1.expand_as(labelled_N1), labelled_N1], 1)
        total_N1, labelled_N1 = shard.reduce(sums_N2).split(1, 1)
        labelled_N1 = labelled_N1 > 0
        spread = spread.expand_as(logits_NA) * mass.smoothing / total_N1
    else:
        spread *= mass.smoothing / total_N1
    if mass.class_weights is not None:
        spread *= mass.class_weights.to(spread.dtype)[ids.clamp(min=0)]
    target_NA.mul_(1 - mass.smoothing).add_(torch.where(labelled_N1, spread, 0))
    # The kernel adds the offset to every score, in the part that is spread too; there it is a constant to be taken off.
    constant_N = torch.where(spread != 0, spread * offset, 0).sum(1) * labelled_N1[:, 0]
    if shard is not None:
        shard.reduce(constant_N)
    loss_N, grad_NA = softmax(kernels, logits_NA, target_NA * row_scale, offset.expand_as(logits_NA), shard)
    return loss_N + constant_N * row_scale, grad_NA
