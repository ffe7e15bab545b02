"""Where the time of a run goes, and what happened since the last report."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from slidex.train.distributed import Solo


@dataclass
class Stopwatch:
    """Seconds by stage since the last report."""

    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def lap(self, stage: str) -> float:
        """Books the time since the last lap on `stage`."""
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        self.seconds[stage] = self.seconds.get(stage, 0.0) + elapsed
        return elapsed

    def move(self, source: str, target: str, seconds: float) -> None:
        """Books `seconds` of one stage on another, which ran inside it."""
        self.seconds[source] -= seconds
        self.seconds[target] = self.seconds.get(target, 0.0) + seconds


@dataclass
class Interval:
    """Sums over the steps since the last report; those of losses and active classes are on the device of the layer."""

    rows: int = 0
    loss: float | torch.Tensor = 0.0
    active: float | torch.Tensor = 0.0
    rehashes: int = 0
    index_updates: int = 0
    rows_rehashed: int = 0
    watch: Stopwatch = field(default_factory=Stopwatch)

    def add_up(self, ranks: Solo) -> None:
        """Replaces what processes count for their own classes by the sum; rows and losses are of all anyway."""
        self.active, rehashes, updates, hashed = ranks.totals(
            float(self.active), self.rehashes, self.index_updates, self.rows_rehashed
        )
        self.rehashes, self.index_updates, self.rows_rehashed = int(rehashes), int(updates), int(hashed)

    def facts(self) -> dict[str, Any]:
        """Means and rates over the interval, which ends now."""
        seconds = max(sum(self.watch.seconds.values()), 1e-9)
        rows = max(1, self.rows)
        return {
            "loss": float(self.loss) / rows,
            "samples_per_second": self.rows / seconds,
            "active_classes": float(self.active) / rows,
            "rehashes": self.rehashes,
            "index_updates": self.index_updates,
            "rows_rehashed": self.rows_rehashed,
            "time_share": {stage: spent / seconds for stage, spent in sorted(self.watch.seconds.items())},
        }
