"""Stops a run whose loss is no longer finite: at once, or on a device, which is not waited for, a few steps later."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from slidex.errors import DivergedError
from slidex.late import LateErrors

if TYPE_CHECKING:
    from slidex.nn.placement import Placement
    from slidex.nn.scoring import Scored


class LossCheck:
    """Of one run.

    Args:
        placement: Where its model is.
        learning_rate: For the message.
    """

    def __init__(self, placement: Placement, learning_rate: float) -> None:
        self._placement, self._learning_rate, self._late = placement, learning_rate, LateErrors()

    def total(self, scored: Scored, step: int) -> float | torch.Tensor:
        """The sum of the losses of a step's rows; on a device a number there.

        Raises:
            DivergedError: If it is not finite; on a device, if that of an earlier step was not.
        """
        self._late.settle(wait=False)
        loss = scored.loss_N.sum()
        if not self._placement.waits:
            unsaved = "is not finite; no checkpoint has its update"
            self._late.expect((~torch.isfinite(loss)).long() - 1, lambda _: self._diverged(step, unsaved))
            return loss
        number = float(loss)
        if not math.isfinite(number):
            raise self._diverged(step, f"is {number}; its update was not applied")
        return number

    def settle(self) -> None:
        """Waits for the losses of all steps so far, before what they led to is used or saved; errors as of `total`."""
        self._late.settle(wait=True)

    def _diverged(self, step: int, what: str) -> DivergedError:
        rate = self._learning_rate
        return DivergedError(
            f"the loss of step {step:,} {what}. Lower 'learning_rate' (now {rate:g}) or set 'warmup'."
        )
