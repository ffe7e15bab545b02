"""Inputs and the one comparison that every kernel test uses, so that its teeth are proved once for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from slidex.kernels import RowState, StepSettings

if TYPE_CHECKING:
    from collections.abc import Callable

SETTINGS = StepSettings(learning_rate=0.01, step=3, beta1=0.8, beta2=0.95, epsilon=1e-6, weight_decay=0.1)
UPDATES = ("embedding_bag_update", "pair_update", "rows_update")
KERNELS = (
    "embedding_bag",
    "embedding_bag_update",
    "pair_logits",
    "pair_hidden_grad",
    "pair_update",
    "softmax_loss",
    "logistic_loss",
    "gather_rows",
    "rows_update",
    "shared_softmax_loss",
    "shared_logistic_loss",
)


@dataclass(frozen=True)
class Shape:
    """Sizes of one random problem."""

    rows: int = 9
    slots: int = 70
    classes: int = 83
    width: int = 24
    scale: float = 3.0
    optional: bool = True
    most_targets: int = 3
    optimizer: str = "adam"


SHAPES = {
    "plain": Shape(),
    "without-optionals": Shape(optional=False),
    "no-rows": Shape(rows=0),
    "one-row": Shape(rows=1),
    "one-slot": Shape(slots=1),
    "one-class": Shape(slots=1, classes=1),
    "width-1": Shape(width=1),
    "width-7": Shape(width=7),
    "width-130": Shape(width=130),
    "many-ids": Shape(rows=40, slots=500, classes=5000, width=5),
    "huge-logits": Shape(scale=1e4),
}

MOST_SCALE = {torch.float32: 1e4, torch.bfloat16: 1e4, torch.float16: 1e3}
"""Of scores that a dtype can hold, some standard deviations and all: float16 ends at 65,504."""

Arguments = list[object]


class Problem:
    """Random float64 arguments for every kernel; `arguments` casts them."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        self.shape, self._rng = shape, np.random.Generator(np.random.Philox(key=[seed, 7]))

    def _floats(self, *shape: int, low: float | None = None) -> torch.Tensor:
        values = self._rng.standard_normal(shape) if low is None else self._rng.uniform(low, 1, shape)
        return torch.from_numpy(np.asarray(values))

    def _active(self) -> torch.Tensor:
        """Distinct classes within a row, the last class always, pads anywhere, one row of pads only."""
        rows, slots, classes = self.shape.rows, self.shape.slots, self.shape.classes
        active = np.full((rows, slots), -1)
        for n in range(rows):
            taken = self._rng.permutation(classes - 1)[: slots - 1]
            active[n, : len(taken) + 1] = np.append(taken, classes - 1)
            self._rng.shuffle(active[n])
            active[n, self._rng.random(slots) < 0.1] = -1
        active[3:4] = -1
        return torch.from_numpy(active)

    def _state(self, like: torch.Tensor | None) -> RowState | None:
        if like is None:
            return None
        empty = RowState.zeros_like(like, self.shape.optimizer)
        return RowState(
            self._floats(*empty.moment1.shape) * 0.1, self._floats(*empty.moment2.shape, low=0) * 0.01
        )

    def _csr(self, columns: int, longest: int, distinct: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """CSR rows of 0 to `longest` entries; every third is empty, repeats unless `distinct`."""
        lengths = [int(self._rng.integers(1, longest + 1)) * (n % 3 != 2) for n in range(self.shape.rows)]
        ids = [
            self._rng.choice(columns, size=min(length, columns) if distinct else length, replace=not distinct)
            for length in lengths
        ]
        indptr = np.cumsum([0, *map(len, ids)])
        return torch.from_numpy(indptr), torch.from_numpy(np.concatenate([[], *ids]).astype(np.int32))

    def arguments(self, kernel: str, dtype: torch.dtype) -> Arguments:
        """Positional arguments of `kernel`, float tensors in `dtype`."""
        return [
            cast(argument, dtype) for argument in getattr(self, f"_{kernel.removeprefix('shared_')}")(kernel)
        ]

    def _pair_parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        shape = self.shape
        weight, bias = self._floats(shape.classes, shape.width), None
        if shape.optional:
            bias = self._floats(shape.classes)
        return self._floats(shape.rows, shape.slots), self._floats(shape.rows, shape.width), weight, bias

    def _embedding_bag(self, _: str) -> Arguments:
        indptr, ids = self._csr(self.shape.classes, 12, distinct=False)
        values = self._floats(len(ids)) if self.shape.optional else None
        weight = self._floats(self.shape.classes, self.shape.width)
        return [indptr, ids, values, weight, self._floats(self.shape.width) if self.shape.optional else None]

    def _embedding_bag_update(self, _: str) -> Arguments:
        indptr, ids, values, weight, _ = self._embedding_bag("")
        grad = self._floats(self.shape.rows, self.shape.width)
        return [indptr, ids, values, grad, weight, self._state(weight), SETTINGS]

    def _pair_logits(self, _: str) -> Arguments:
        _, hidden, weight, bias = self._pair_parts()
        return [hidden, weight, bias, self._active()]

    def _pair_hidden_grad(self, _: str) -> Arguments:
        grad, _, weight, _ = self._pair_parts()
        return [grad, weight, self._active()]

    def _pair_update(self, _: str) -> Arguments:
        grad, hidden, weight, bias = self._pair_parts()
        return [grad, hidden, self._active(), weight, bias, self._state(weight), self._state(bias), SETTINGS]

    def _dense_loss(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores with pads; some targets, never on a pad, always one in the first place of the first row."""
        pads = self._active() < 0
        logits = (self._floats(*pads.shape) * self.shape.scale).masked_fill(pads, -torch.inf)
        target = self._floats(*pads.shape, low=0.1) * (
            self._floats(*pads.shape, low=0) > 1 - self.shape.most_targets / 100
        )
        target[0:1, :1] = 1.0
        return logits, target.masked_fill(pads, 0)

    def _softmax_loss(self, kernel: str) -> Arguments:
        if kernel.startswith("shared"):
            return self._pool_loss(low=None)
        logits, target = self._dense_loss()
        return [logits, target, self._floats(*logits.shape) if self.shape.optional else None]

    def _logistic_loss(self, kernel: str) -> Arguments:
        if kernel.startswith("shared"):
            return self._pool_loss(low=0.0)
        logits, target = self._dense_loss()
        return [logits, target, self._floats(*logits.shape, low=0) if self.shape.optional else None]

    def _pool_loss(self, low: float | None) -> Arguments:
        pool = self.shape.slots
        indptr, positions = self._csr(pool, self.shape.most_targets, distinct=True)
        logits = self._floats(self.shape.rows, pool) * self.shape.scale
        extra = self._floats(pool, low=low) if self.shape.optional else None
        return [logits, indptr, positions, self._floats(len(positions), low=0.1), extra]

    def _gather_rows(self, _: str) -> Arguments:
        _, _, weight, bias = self._pair_parts()
        return [weight, bias, self._pool()]

    def _rows_update(self, _: str) -> Arguments:
        _, _, weight, bias = self._pair_parts()
        ids = self._pool()
        grads = self._floats(len(ids), self.shape.width), None if bias is None else self._floats(len(ids))
        return [ids, *grads, weight, bias, self._state(weight), self._state(bias), SETTINGS]

    def _pool(self) -> torch.Tensor:
        size = min(self.shape.slots, self.shape.classes)
        return torch.from_numpy(self._rng.permutation(self.shape.classes)[:size])


def sparse_rows(
    rows: int, features: int, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    """Offsets, features and values of sparse rows, one of them empty; some of the features occur in no row."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, max(2, features // 2), rows)
    counts[rows // 2] = 0
    chosen = [
        np.sort(rng.choice(max(1, features - 2), min(n, max(1, features - 2)), replace=False)) for n in counts
    ]
    indptr = torch.from_numpy(np.concatenate([[0], np.cumsum([len(ids) for ids in chosen])]))
    indices = torch.from_numpy(np.concatenate(chosen).astype(np.int32))
    return indptr, indices, torch.from_numpy(rng.normal(size=len(indices))).to(dtype)


def cast(argument: object, dtype: torch.dtype) -> object:
    """A copy of an argument with its floats in `dtype`; ids keep theirs."""
    if isinstance(argument, RowState):
        return RowState(*(moment.to(dtype, copy=True) for moment in argument))
    if isinstance(argument, torch.Tensor):
        return argument.to(dtype, copy=True) if argument.is_floating_point() else argument.clone()
    return argument


def outcome(kernel: Callable[..., object], arguments: Arguments) -> list[torch.Tensor]:
    """Everything a call shows: what it returns, and every float argument after it."""
    arguments = [_copied(argument) for argument in arguments]
    returned = kernel(*arguments)
    seen: list[torch.Tensor] = []
    for value in (returned, *arguments):
        parts = value if isinstance(value, tuple) else (value,)
        seen += [part for part in parts if isinstance(part, torch.Tensor) and part.is_floating_point()]
    return seen


def assert_parity(
    kernel: Callable[..., object], reference: Callable[..., object], name: str, shape: Shape, seed: int = 0
) -> None:
    """`kernel` does what `reference` does: in float64 to 1e-10 of the largest entry, in float32 as torch does."""
    double = Problem(shape, seed).arguments(name, torch.float64)
    for got, want in zip(outcome(kernel, double), outcome(reference, double), strict=True):
        assert _error(got, want) <= 1e-10 * _size(want)
    assert_as_exact_as_torch(kernel, reference, name, shape, torch.float32, seed)


def assert_as_exact_as_torch(
    kernel: Callable[..., object],
    reference: Callable[..., object],
    name: str,
    shape: Shape,
    dtype: torch.dtype,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """`kernel`'s error against the float64 reference is at most twice that of the reference in the kernel's dtype.

    Beside four units of float32 in the last place of the largest entry, and half a unit of what the result is stored
    in, or a whole one where that is rounded stochastically. Moments are float32 for a kernel in 16 bits.
    """
    arguments = Problem(shape, seed).arguments(name, dtype)
    exact = outcome(reference, [cast(argument, torch.float64) for argument in arguments])
    rivals = outcome(reference, arguments)
    if dtype.itemsize == 2:
        arguments = [cast(a, torch.float32) if isinstance(a, RowState) else a for a in arguments]
    arguments = [moved(argument, device) for argument in arguments]
    for got, rival, want in zip(outcome(kernel, arguments), rivals, exact, strict=True):
        unit = 4 * torch.finfo(torch.float32).eps
        if got.dtype.itemsize == 2:
            unit += torch.finfo(got.dtype).eps / (1 if name in UPDATES else 2)
        assert _error(got.cpu(), want) <= 2 * _error(rival, want) + unit * _size(want)


def assert_rounds_as_the_reference(
    kernel: Callable[..., object],
    reference: Callable[..., object],
    name: str,
    shape: Shape,
    dtype: torch.dtype,
    device: str = "cpu",
) -> None:
    """`kernel` rounds updated weights of 16 bits as `reference` does: up, or down, the same ones.

    Weights and biases are of `dtype`, all else is float32. A number whose last bit in float32 differs may lie on the
    other side of what the random bits ask, and become its other neighbour: one in 2^13 of those in float16, in 2^16 of
    those in bfloat16. So two may, and one in 500.
    """
    arguments = Problem(shape).arguments(name, torch.float32)
    at = next(at for at, argument in enumerate(arguments) if isinstance(argument, RowState))
    parameters = slice(at - 1 if name == "embedding_bag_update" else at - 2, at)  # before their states
    arguments[parameters] = [cast(parameter, dtype) for parameter in arguments[parameters]]
    want = [part for part in outcome(reference, arguments) if part.dtype == dtype]
    found = outcome(kernel, [moved(argument, device) for argument in arguments])
    got = [part.cpu() for part in found if part.dtype == dtype]
    assert len(got) == len(want) > 0
    others = sum(int((mine != theirs).sum()) for mine, theirs in zip(got, want, strict=True))
    assert others <= 2 + sum(part.numel() for part in want) / 500
    for mine, theirs in zip(got, want, strict=True):
        assert _error(mine, theirs.double()) <= torch.finfo(dtype).eps * _size(theirs)


def _copied(argument: object) -> object:
    if isinstance(argument, RowState):
        return RowState(*(moment.clone() for moment in argument))
    return argument.clone() if isinstance(argument, torch.Tensor) else argument


def moved(argument: object, device: str) -> object:
    """An argument with its tensors on a device."""
    if isinstance(argument, RowState):
        return RowState(*(moment.to(device) for moment in argument))
    return argument.to(device) if isinstance(argument, torch.Tensor) else argument


def _size(want: torch.Tensor) -> float:
    finite = want[want.isfinite()]
    return float(finite.abs().max()) if len(finite) else 1.0


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference; infinite unless both are non-finite in the same places and the same way."""
    assert got.shape == want.shape
    got = got.double()
    ordinary = want.isfinite()
    if not torch.equal(got.nan_to_num(7, 8, 9)[~ordinary], want.nan_to_num(7, 8, 9)[~ordinary]):
        return float("inf")
    return float((got - want)[ordinary].abs().max()) if ordinary.any() else 0.0
