"""The signs that a run's choice of negatives has collapsed.

A class that is never a negative is never pushed down and ends up scored above the true ones. That happens where an
index proposes the same few classes again and again and nothing random is mixed in, and the loss, which is computed on
the proposed classes, does not show it.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from slidex.train.config import TrainConfig

COVERAGE_RATIO = 0.4
"""Warn if an epoch covers less than this share of the classes that as many uniform random negatives would. A share r
of uniform ones covers at least r of it, as 1 - (1 - r q)^n >= r (1 - (1 - q)^n); so r >= 0.4 does not warn."""
DECLINE_VALIDATIONS = 3
DECLINE_SHARE = 0.1
"""Warn if P@1 falls from each of three validations to the next, by a tenth in all and three standard errors."""


class CollapseWatch:
    """Finds the two signs of a collapse; each is told once in a run, with the settings to change.

    Args:
        config: With `mode` other than ``auto``.
        num_classes: C.
    """

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        self._config, self._num_classes = config, num_classes
        self._told: list[str] = []
        self._loss: float | torch.Tensor = 0.0
        self._rows = 0
        self._history: list[tuple[float, float]] = []

    def note_loss(self, loss: float | torch.Tensor, rows: int) -> None:
        """Adds the summed loss of a step's rows, which may be on a device, to the mean until the next validation."""
        self._loss += loss
        self._rows += rows

    def epoch_ended(self, epoch: int, steps: int, coverage: float) -> str | None:
        """What to tell of an epoch, if anything.

        Args:
            epoch: Its number, from 1.
            steps: Steps taken in it.
            coverage: Share of the classes that were negatives in it.
        """
        config = self._config
        if config.mode == "exact" or "coverage" in self._told:
            return None
        negatives = config.pool_size if config.mode == "shared" else config.active_size
        missed = 1 - min(1.0, negatives / self._num_classes)
        uniform = 1 - missed**steps
        if coverage >= COVERAGE_RATIO * uniform:
            return None
        self._told.append("coverage")
        return (
            f"only {100 * coverage:.3g} % of the classes were negatives in epoch {epoch}; as many uniform random ones "
            f"would have reached {100 * uniform:.3g} %. Classes that are never pushed down end up above the true ones. "
            f"{self._advice()}"
        )

    def validated(self, p_at_1: float, rows: int) -> str | None:
        """What to tell of a validation, if anything.

        Args:
            p_at_1: Its P@1, from 0 to 1.
            rows: Rows it was measured on.
        """
        history = [*self._history, (p_at_1, float(self._loss) / max(1, self._rows))][-DECLINE_VALIDATIONS:]
        self._history, self._loss, self._rows = history, 0.0, 0
        if self._config.mode == "exact" or "decline" in self._told or len(history) < DECLINE_VALIDATIONS:
            return None
        first, last = history[0], history[-1]
        falling = all(b < a for x, y in itertools.pairwise(history) for a, b in zip(x, y, strict=True))
        error = math.sqrt(2 * first[0] * (1 - first[0]) / rows)
        if not falling or first[0] - last[0] < max(DECLINE_SHARE * first[0], 3 * error):
            return None
        self._told.append("decline")
        return (
            f"validation P@1 fell from {100 * first[0]:.2f} to {100 * last[0]:.2f} while the training loss fell from "
            f"{first[1]:.3f} to {last[1]:.3f}: the model overfits, or its negatives are no longer the classes it "
            f"confuses. {self._advice()}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {"told": self._told, "loss": float(self._loss), "rows": self._rows, "history": self._history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self._told, self._history = list(state["told"]), [tuple(pair) for pair in state["history"]]
        self._loss, self._rows = state["loss"], state["rows"]

    def _advice(self) -> str:
        config = self._config
        size = "pool_size" if config.mode == "shared" else "active_size"
        changes = [f"raise {size!r} (now {getattr(config, size):,})"]
        if config.random_power > 0:
            changes.insert(0, f"lower 'random_power' (now {config.random_power:g})")
        if config.index != "none":
            gap = "rehash_every" if config.rehash == "fixed" else "rehash_max_gap"
            changes.insert(0, f"lower {gap!r} (now {getattr(config, gap):,}; 'rehash' is {config.rehash})")
            if config.random_share < 1:
                changes.insert(0, f"raise 'random_share' (now {config.random_share:g})")
        return f"Try to {', or '.join(changes)}."
