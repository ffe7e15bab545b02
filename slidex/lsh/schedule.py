"""When to rehash: an index goes stale as rows move, and rebuilding it too often costs more than it gains.

Schedules are driven by the trainer's step number alone and keep their few numbers in `state_dict`, so a
resumed run rehashes at the very steps an unbroken one would. The trainer builds the index before its first
step and calls `rehashed` with that step, then asks `due` once a step and calls `rehashed` after every
rebuild.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from slidex.errors import ConfigError
from slidex.lsh.index import check_integer, check_number
from slidex.lsh.sampler import ClassSampler

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch


class RehashSchedule(Protocol):
    """Decides at which steps the index is rebuilt."""

    def due(self, step: int, drift: Callable[[], float]) -> bool:
        """Whether to rehash at this step.

        Args:
            step: The trainer's step, never smaller than in an earlier call.
            drift: Measures the share of stale codes, in [0, 1]; called only where the schedule needs it.
        """
        ...

    def rehashed(self, step: int) -> None:
        """Note that the index was built from the weights of this step."""
        ...

    def state_dict(self) -> dict[str, int]:
        """Plain values, fit for JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ConfigError: Other keys, or a value that is not an integer of at least 0.
        """
        ...


class FixedSchedule:
    """Rehash when `every` steps have passed since the last time.

    Args:
        every: Steps, at least 1.
    """

    def __init__(self, every: int) -> None:
        check_integer("every", "FixedSchedule", every, 1)
        self._every = every
        self._last = 0

    def due(self, step: int, drift: Callable[[], float]) -> bool:
        """See `RehashSchedule.due`."""
        del drift
        return step - self._last >= self._every

    def rehashed(self, step: int) -> None:
        """See `RehashSchedule.rehashed`."""
        self._last = step

    def state_dict(self) -> dict[str, int]:
        """See `RehashSchedule.state_dict`."""
        return {"last": self._last}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """See `RehashSchedule.load_state_dict`."""
        self._last = _checked(state, "FixedSchedule", ("last",))["last"]


class ExponentialSchedule:
    """Rehash after gaps that grow by a factor, as SLIDE does: rows move most at the start of training.

    Args:
        first: Steps before the first rehash, at least 1.
        growth: Factor from one gap to the next, at least 1.
        maximum: The longest gap, at least `first`.
    """

    def __init__(self, first: int, growth: float, maximum: int) -> None:
        check_integer("first", "ExponentialSchedule", first, 1)
        check_number("growth", "ExponentialSchedule", growth, 1.0)
        check_integer("maximum", "ExponentialSchedule", maximum, first)
        self._first, self._growth, self._maximum = first, growth, maximum
        self._last = 0
        # Rehashes so far; -1 until the build before the first step, which is not one.
        self._count = -1

    def due(self, step: int, drift: Callable[[], float]) -> bool:
        """See `RehashSchedule.due`."""
        del drift
        return step - self._last >= self._gap()

    def rehashed(self, step: int) -> None:
        """See `RehashSchedule.rehashed`."""
        self._last = step
        self._count += 1

    def state_dict(self) -> dict[str, int]:
        """See `RehashSchedule.state_dict`."""
        return {"last": self._last, "builds": self._count + 1}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """See `RehashSchedule.load_state_dict`."""
        values = _checked(state, "ExponentialSchedule", ("last", "builds"))
        self._last, self._count = values["last"], values["builds"] - 1

    def _gap(self) -> int:
        gap = float(self._first)
        for _ in range(max(self._count, 0)):
            gap = min(gap * self._growth, float(self._maximum))
        return int(gap)


class DriftSchedule:
    """Rehash when enough codes have changed since the last build (MONGOOSE, Chen et al. 2021).

    Args:
        threshold: Share of stale codes that calls for a rehash, in (0, 1].
        check_every: Steps between measurements, at least 1.
        sample_rows: Rows of the fixed random sample that `sample_ids` gives, at least 1.
        min_gap: Fewest steps between rehashes, at least 1.
        max_gap: Most steps between rehashes, at least `min_gap`.
    """

    def __init__(
        self, threshold: float, check_every: int, sample_rows: int, min_gap: int, max_gap: int
    ) -> None:
        check_number("threshold", "DriftSchedule", threshold, 1e-9, 1.0)
        check_integer("check_every", "DriftSchedule", check_every, 1)
        check_integer("sample_rows", "DriftSchedule", sample_rows, 1)
        check_integer("min_gap", "DriftSchedule", min_gap, 1)
        check_integer("max_gap", "DriftSchedule", max_gap, min_gap)
        self._threshold, self._check_every = threshold, check_every
        self._sample_rows, self._min_gap, self._max_gap = sample_rows, min_gap, max_gap
        self._last = 0

    def sample_ids(self, num_classes: int, seed: int) -> torch.Tensor:
        """The rows to measure on, the same at every step: int64 (min(sample_rows, C),), ascending."""
        return ClassSampler(num_classes, seed=seed).sample(self._sample_rows, step=0).sort().values

    def due(self, step: int, drift: Callable[[], float]) -> bool:
        """See `RehashSchedule.due`; measures every `check_every` steps once `min_gap` has passed."""
        gap = step - self._last
        if gap >= self._max_gap:
            return True
        if gap < self._min_gap or gap % self._check_every:
            return False
        return drift() >= self._threshold

    def rehashed(self, step: int) -> None:
        """See `RehashSchedule.rehashed`."""
        self._last = step

    def state_dict(self) -> dict[str, int]:
        """See `RehashSchedule.state_dict`."""
        return {"last": self._last}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """See `RehashSchedule.load_state_dict`."""
        self._last = _checked(state, "DriftSchedule", ("last",))["last"]


def _checked(state: Mapping[str, int], caller: str, names: tuple[str, ...]) -> dict[str, int]:
    if set(state) != set(names):
        raise ConfigError(
            f"The 'state' parameter of {caller}.load_state_dict must hold {', '.join(names)}. "
            f"Got {', '.join(sorted(state))} instead."
        )
    for name in names:
        check_integer(name, f"{caller}.load_state_dict", state[name], 0)
    return dict(state)
