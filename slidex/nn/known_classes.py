"""The classes that a network proposes from where a ranker follows: their rows, laid out to be scored.

Legend: N rows, M of C classes, D hidden width, K classes wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from slidex import doctor
from slidex.kernels import RoughRows, cpu
from slidex.lsh import exact_topk

if TYPE_CHECKING:
    from slidex.nn.head import SampledHead


@dataclass(frozen=True, slots=True)
class KnownClasses:
    """Copies of some of a layer's rows: a ranker is fitted beside weights that no longer change.

    Args:
        ids_M: int64, the classes, where the layer is.
        weight_MD: float32; on another device as the layer has them.
        bias_M: Likewise.
        mask_C: bool, of all classes, which these are.
        rough: Of `weight_MD`, in bfloat16 where the CPU has instructions for it; None on another device.
    """

    ids_M: torch.Tensor
    weight_MD: torch.Tensor
    bias_M: torch.Tensor
    mask_C: torch.Tensor
    rough: RoughRows | None

    @classmethod
    def of(cls, head: SampledHead, ids_M: torch.Tensor) -> KnownClasses:
        """As the layer has them now.

        Args:
            head: The layer, where it is to score.
            ids_M: int64, of its classes.
        """
        ids_M = ids_M.to(head.weight.device)
        weight_MD, bias_M = head.weight.detach()[ids_M], head.bias.detach()[ids_M]
        mask_C = torch.zeros(head.num_classes, dtype=torch.bool, device=ids_M.device).index_fill_(
            0, ids_M, True
        )
        rough = None
        if ids_M.device.type == "cpu":
            dtype = torch.bfloat16 if doctor.has_native_bf16() is True else torch.float32
            rough = RoughRows.of(weight_MD, dtype)
        return cls(ids_M, weight_MD, bias_M, mask_C, rough)

    def topk(self, hidden_ND: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores float32 and ids int64 (N, k) of the best of them, best first, as if all products were in float32.

        Args:
            hidden_ND: float32, where the layer is.
            k: At most M.
        """
        if self.rough is None:
            scores_NK, places_NK = exact_topk(hidden_ND, self.weight_MD, self.bias_M, k)
        else:
            scores_NK, places_NK = cpu.best_classes(hidden_ND, self.weight_MD, self.bias_M, k, self.rough)
        return scores_NK, self.ids_M[places_NK]

    def only(self, ids_NA: torch.Tensor) -> torch.Tensor:
        """The ids that an index proposes, with -1 for each that is of none of these classes."""
        return torch.where(self.mask_C[ids_NA.clamp(min=0)], ids_NA, -1)  # a pad is -1 either way
