"""Random classes with exactly known inclusion probabilities, the other half of every candidate mixture.

A correction (log-q, stratified weights) is only as right as the probability it divides by, so both schemes
here have one in closed form. Uniform: a simple random sample without replacement. By frequency: the unit
interval is cut into `count` equal strata and one point is drawn in each; a class is in the sample when a
point falls in its part of the interval. Against drawing with replacement this wastes fewer draws on repeats,
returns ids in order without a sort, and needs O(count log C) time and one cumulative array. Legend: C
classes.
"""

from __future__ import annotations

import numpy as np
import torch

from slidex.errors import ConfigError
from slidex.lsh.index import check_class_ids, check_integer, check_number


class ClassSampler:
    """Draws random classes, uniformly or by a power of their training frequency.

    Args:
        num_classes: C.
        class_counts: Non-negative (C,), training samples of each class; needed where `power` is not 0. A
            class without samples counts as 1: one that is never drawn would never be pushed down.
        power: 0 for uniform, 1 for frequency, between for flatter; at least 0.
        seed: Non-negative.
    """

    def __init__(
        self,
        num_classes: int,
        class_counts: torch.Tensor | np.ndarray | None = None,
        power: float = 0.0,
        *,
        seed: int,
    ) -> None:
        check_integer("num_classes", "ClassSampler", num_classes, 1)
        check_integer("seed", "ClassSampler", seed, 0, 2**63 - 1)
        check_number("power", "ClassSampler", power, 0.0)
        self.num_classes = num_classes
        self.power = power
        self._seed = seed
        self._bounds: np.ndarray | None = None
        self._device_bounds: torch.Tensor | None = None
        if power > 0:
            self._bounds = _bounds(num_classes, class_counts, power)

    def sample(self, count: int, step: int, stream: int = 0) -> torch.Tensor:
        """Distinct random classes.

        Args:
            count: Classes to draw, at least 0.
            step: With the seed and `stream`, fixes the draw.
            stream: Separates independent draws of the same step.

        Returns:
            int64, distinct, in no useful order. Uniform: exactly ``min(count, C)`` ids. By frequency: at most
            `count`, fewer where a frequent class was hit more than once.
        """
        check_integer("count", "ClassSampler.sample", count, 0)
        check_integer("step", "ClassSampler.sample", step, 0, 2**63 - 1)
        check_integer("stream", "ClassSampler.sample", stream, 0, 2**63 - 1)
        bits = np.random.Philox(key=[self._seed, stream], counter=[0, 0, 0, step])
        generator = np.random.Generator(bits)
        if self._bounds is None:
            ids = generator.choice(
                self.num_classes, min(count, self.num_classes), replace=False, shuffle=False
            )
            return torch.from_numpy(ids)
        points = (np.arange(count) + generator.random(count)) / max(count, 1)
        ids = np.searchsorted(self._bounds, points, side="right") - 1
        # Rounding can bring the last point up to 1, past the last class.
        ids = np.minimum(ids, self.num_classes - 1)
        distinct = np.ones(count, dtype=bool)
        distinct[1:] = ids[1:] != ids[:-1]
        return torch.from_numpy(ids[distinct])

    def inclusion_probability(self, ids: torch.Tensor, count: int) -> torch.Tensor:
        """Probability that each of `ids` is in one `sample` of `count`.

        Uniform: ``min(1, count / C)``. By frequency, with the class's part [a, b) of the interval stretched
            to
        length `count`: ``b - a`` where that lies in one stratum, 1 where it covers a whole one, and
        ``1 - (1 - left)(1 - right)`` where it straddles a boundary by `left` and `right`.

        Args:
            ids: int64 (M,).
            count: As given to `sample`.

        Returns:
            float64 (M,).
        """
        check_integer("count", "ClassSampler.inclusion_probability", count, 0)
        check_class_ids("ids", "ClassSampler.inclusion_probability", ids, self.num_classes)
        return self.inclusion_within(ids, count)

    def inclusion_within(self, ids: torch.Tensor, count: int) -> torch.Tensor:
        """As `inclusion_probability`, of ids of any shape that are known to be in range; waits for no device."""
        if self._bounds is None:
            share = min(1.0, count / self.num_classes)
            return torch.full(ids.shape, share, dtype=torch.float64, device=ids.device)
        if self._device_bounds is None or self._device_bounds.device != ids.device:
            self._device_bounds = torch.from_numpy(self._bounds).to(ids.device)
        begin, end = self._device_bounds[ids] * count, self._device_bounds[ids + 1] * count
        left, right = begin.ceil() - begin, end - end.floor()
        straddling = torch.where(begin.ceil() < end.floor(), 1.0, 1 - (1 - left) * (1 - right))
        return torch.where(begin.ceil() > end.floor(), end - begin, straddling)


def _bounds(num_classes: int, class_counts: torch.Tensor | np.ndarray | None, power: float) -> np.ndarray:
    """float64 (C + 1,): class c has the part ``[bounds[c], bounds[c + 1])`` of the unit interval."""
    if class_counts is None:
        raise ConfigError(
            f"The 'class_counts' parameter of ClassSampler must be given where power is {power!r}. "
            "Got None instead."
        )
    counts = np.asarray(class_counts, dtype=np.float64)
    if counts.shape != (num_classes,) or not np.isfinite(counts).all() or (counts < 0).any():
        found = f"shape {counts.shape}, values from {counts.min(initial=0)} to {counts.max(initial=0)}"
        raise ConfigError(
            f"The 'class_counts' parameter of ClassSampler must hold {num_classes} finite counts "
            f"of at least 0. Got {found} instead."
        )
    bounds = np.zeros(num_classes + 1)
    np.cumsum(np.maximum(counts, 1.0) ** power, out=bounds[1:])
    return bounds / bounds[-1]
