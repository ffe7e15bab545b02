"""Scores, loss and gradients of a batch on its active classes: what every output layer of slidex is made of.

One training step is `Scorer.score`, which picks the classes and computes the loss and its gradient by the scores, and
then what is made of that gradient: `hidden_grad` for whatever comes before the layer, and for its rows either `update`
(an optimiser step at once) or `rows_grad` (for another optimiser). So a non-finite loss stops before anything is
written.

Where the layer is sharded over processes (`slidex.nn.sharding`), N are the rows of all of them, and C, A, U and P of
the classes of one.

Legend: N rows in a batch, C classes, D hidden width, A active classes per row, U classes in a shared pool, P labels in
all.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from slidex.errors import ConfigError
from slidex.kernels import cpu
from slidex.nn import products
from slidex.nn.device_candidates import DeviceSelector
from slidex.nn.label_places import PlacedLabels, class_places, first_slots
from slidex.nn.sharding import Targets, sharded_softmax_loss
from slidex.nn.smoothing import smoothed_softmax, softmax

if TYPE_CHECKING:
    from types import ModuleType

    from slidex.data.csr import CsrArrays
    from slidex.kernels import RowState, StepSettings
    from slidex.nn.candidates import ActiveSets, CandidateSelector
    from slidex.nn.device_labels import DeviceLabels
    from slidex.nn.placement import Placement
    from slidex.nn.sharding import Shard
    from slidex.nn.smoothing import LabelMass

MODES = ("exact", "shared", "per_sample")
LOSSES = ("softmax", "logistic")
PRECISIONS = ("float32", "bfloat16")


class Rows(NamedTuple):
    """The parameters of an output layer.

    Args:
        weight: float (C, D).
        bias: float (C,), or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Scored:
    """What `Scorer.score` leaves for the backward pass.

    Args:
        loss_N: float (N,), loss of every row.
        active: How many classes a row was scored on, on average; on a device a number there.
        ids: int64, the classes the batch was scored on: (U,) distinct ones or (N, A) padded with -1, as is the former
            on a device.
        query_seconds: Time spent on choosing them.
        hidden_ND: What was scored.
        grad: Of the sum of losses times `row_scale` by the scores, (N, U) or (N, A); where products are bfloat16 it may
            be that, and have zeros for the rows that `products.pool_rows` has added.
        rows_UD: The weights of `ids`, those of a pool as `slidex.nn.products.pool_rows` makes them; or of all classes
            where every row has its own.
    """

    loss_N: torch.Tensor
    active: float | torch.Tensor
    ids: torch.Tensor
    query_seconds: float
    hidden_ND: torch.Tensor
    grad: torch.Tensor
    rows_UD: torch.Tensor

    def masked(self, keep: torch.Tensor) -> Scored:
        """Itself where `keep`, bool (), is true; else without any class, so that an update writes nothing."""
        return replace(self, ids=self.ids.masked_fill(~keep, -1))


class Scorer:
    """How an output layer scores a batch.

    Args:
        mode: ``exact`` scores all classes; ``shared`` scores the batch on one pool of classes with matrix products
            (MONGOOSE's way); ``per_sample`` scores each row on its own classes (SLIDE's way).
        loss: ``softmax`` (a row's target mass is spread evenly over its true classes) or ``logistic``
            (one-vs-all on the active classes).
        precision: Of the matrix products in ``exact`` and ``shared`` mode; weights stay as they are.
        selector: Chooses the active classes; None if and only if `mode` is ``exact``.
        shard: Which classes of a larger layer these are; None where they are all. The losses of all processes' classes
            are added up, gradients are of this process's.

    Raises:
        ConfigError: if a setting is none of the values above, or a sampled mode has no selector.
    """

    def __init__(
        self,
        mode: str,
        *,
        loss: str = "softmax",
        precision: str = "float32",
        selector: CandidateSelector | None = None,
        shard: Shard | None = None,
    ) -> None:
        for name, value, allowed in (
            ("mode", mode, MODES),
            ("loss", loss, LOSSES),
            ("precision", precision, PRECISIONS),
        ):
            if value not in allowed:
                raise ConfigError(
                    f"The {name!r} parameter of Scorer must be one of {allowed}. Got {value!r} instead."
                )
        if mode != "exact" and selector is None:
            raise ConfigError(f"The 'selector' parameter of Scorer must be given when mode is {mode!r}.")
        self.mode, self.loss, self.precision, self.selector = mode, loss, precision, selector
        self.shard = shard
        self._placement: Placement | None = None
        self._chooser: CandidateSelector | DeviceSelector | None = selector
        self._memory: torch.Tensor | None = None
        """Of the last gradient of all classes, for the next scores: else a step would ask the system for as much."""
        self.pads = False
        """Whether `Scored.ids` of a pool has pads."""

    def __getstate__(self) -> dict[str, object]:
        """Without the memory that is only kept for the next step."""
        return {**vars(self), "_memory": None}

    def place(self, placement: Placement, index_name: str) -> None:
        """Computes where the layer is from now on; labels are then `DeviceLabels` unless that is the CPU.

        Raises:
            ConfigError: The index, or a sharded layer, does not work there.
        """
        if not placement.waits and self.shard is not None:
            raise ConfigError(
                "A head that LSHSoftmaxLoss.shard has spread over processes must be on the CPU. "
                f"Got {placement.device} instead."
            )
        self._placement, self.pads = placement, not placement.waits and self.mode == "shared"
        self._chooser = self.selector
        if not placement.waits and self.selector is not None:
            self._chooser = DeviceSelector(self.selector, placement, index_name)

    @property
    def _kernels(self) -> ModuleType:
        return cpu if self._placement is None else self._placement.kernels

    def score(
        self,
        rows: Rows,
        hidden_ND: torch.Tensor,
        labels: CsrArrays | DeviceLabels,
        step: int,
        *,
        row_scale: float | torch.Tensor = 1.0,
        mass: LabelMass | None = None,
    ) -> Scored:
        """Loss of every row over its active classes, and its gradient by their scores.

        Args:
            rows: The layer.
            hidden_ND: float32 or float64 (N, D), detached.
            labels: True classes of the N rows, `DeviceLabels` where `place` has named a device; with a shard, those of
                this process (`Shard.local`).
            step: Keys all randomness, so that a step can be repeated.
            row_scale: What each row's loss counts in the gradient, such as 1 / N for their mean; above 0.
            mass: Of the labels, in a softmax; None spreads a row's 1 evenly over its true classes. With a shard that
                would be those of this process: give the mass of the labels as they are over all.
        """
        started = time.perf_counter()
        if self.mode == "per_sample" and self._chooser is not None:
            # pyrefly: ignore[bad-argument-type]  (as `place` says)
            sets = self._chooser.active_sets(hidden_ND, labels, step)
            query_seconds = time.perf_counter() - started
            return self._score_pairs(rows, sets, hidden_ND, labels, query_seconds, row_scale, mass)
        offset_U, query_seconds, dtype = None, 0.0, self._product_dtype(hidden_ND)
        if self._chooser is None:
            ids_U = torch.arange(len(rows.weight), device=rows.weight.device)
            bias_U = rows.weight.new_zeros(len(ids_U)) if rows.bias is None else rows.bias.detach()
            rows_UD, targets, active = rows.weight.detach(), class_places(labels), float(len(ids_U))
        else:
            # pyrefly: ignore[bad-argument-type]
            pool = self._chooser.pool(hidden_ND, labels, step)
            query_seconds = time.perf_counter() - started
            ids_U, offset_U = pool.ids_U, pool.offset_U
            targets = PlacedLabels(
                pool.target_indptr, pool.target_positions, pool.target_weights, pool.target_rows
            )
            active = (ids_U >= 0).sum() if self.pads else float(len(ids_U))
            gathered_U = ids_U.clamp(min=0) if self.pads else ids_U
            rows_UD, bias_U = self._kernels.gather_rows(rows.weight, rows.bias, gathered_U)
            rows_UD = products.pool_rows(rows_UD, dtype)
        narrow = dtype == torch.bfloat16 and self._keeps_narrow_scores(hidden_ND, mass)
        shape = len(hidden_ND), len(rows_UD) if narrow else len(ids_U)
        memory = self._take_memory(shape, hidden_ND, dtype if narrow else hidden_ND.dtype)
        logits_NU = products.class_scores(hidden_ND, rows_UD, dtype, memory)
        weights = targets.weights if mass is None else mass.weights
        targets = targets._replace(weights=weights.to(hidden_ND.dtype))
        loss_N, grad_NU = self._pool_loss(logits_NU, bias_U, offset_U, ids_U, targets, mass, row_scale)
        loss_N /= row_scale
        return Scored(loss_N, active, ids_U, query_seconds, hidden_ND, grad_NU, rows_UD)

    def hidden_grad(self, scored: Scored) -> torch.Tensor:
        """Gradient of the hidden vectors, (N, D); with a shard, this process's part of the sum."""
        if self.mode == "per_sample":
            return self._kernels.pair_hidden_grad(scored.grad, scored.rows_UD, scored.ids)
        return products.hidden_gradient(scored.grad, scored.rows_UD, self._product_dtype(scored.grad))

    def update(
        self,
        scored: Scored,
        rows: Rows,
        weight_state: RowState,
        bias_state: RowState | None,
        settings: StepSettings,
    ) -> None:
        """Applies one optimiser step to the rows that were scored, in place; `scored` is of no more use then."""
        grad, hidden_ND = scored.grad, scored.hidden_ND
        layer = (
            rows.weight.detach(),
            None if rows.bias is None else rows.bias.detach(),
            weight_state,
            bias_state,
        )
        if self.mode == "per_sample":
            self._kernels.pair_update(grad, hidden_ND, scored.ids, *layer, settings)
            return
        dtype = self._product_dtype(hidden_ND)
        for part in products.pieces(hidden_ND, grad.shape[1]):
            ids_U, grad_NU = scored.ids[part], grad[:, part]
            grad_UD = products.rows_gradient(grad_NU, hidden_ND, dtype)[: len(ids_U)]
            grad_U = grad_NU.sum(0).to(hidden_ND.dtype)[: len(ids_U)]
            self._kernels.rows_update(ids_U, grad_UD, grad_U, *layer, settings)
        if self.mode == "exact" and grad.device.type == "cpu":  # a device keeps memory by itself
            self._memory = grad

    def rows_grad(self, scored: Scored) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradient of the rows that were scored: int64 ids (U,), ascending, and gradients (U, D) and (U,).

        Where a pool has pads, the last class has more than one entry, whose sum counts. Rows with classes of their own
        have as many as they have, for which a device is waited for.
        """
        grad, hidden_ND, ids = scored.grad, scored.hidden_ND, scored.ids
        if self.mode == "per_sample":
            row, slot = (ids >= 0).nonzero(as_tuple=True)
            ids_U, group = ids[row, slot].unique(return_inverse=True)
            grad = torch.sparse_coo_tensor(
                torch.stack([group, row]),
                grad[row, slot],
                (len(ids_U), len(hidden_ND)),
                check_invariants=False,
            )
            return ids_U, torch.sparse.mm(grad, hidden_ND), torch.sparse.sum(grad, 1).to_dense()
        if self.pads:  # another entry of the last class, all zeros
            ids = torch.where(ids >= 0, ids, ids.max().clamp(min=0))
        ids_U, order = ids.sort()
        if self.selector is not None:  # else they are all classes, in order
            grad = grad[:, order]
        grad_UD = products.rows_gradient(grad, hidden_ND, self._product_dtype(hidden_ND))
        return ids_U, grad_UD, grad.sum(0).to(hidden_ND.dtype)

    def _pool_loss(
        self,
        logits_NU: torch.Tensor,
        bias_U: torch.Tensor,
        offset_U: torch.Tensor | None,
        ids_U: torch.Tensor,
        targets: PlacedLabels,
        mass: LabelMass | None,
        row_scale: float | torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss times `row_scale`, and its gradient by the scores, which takes their place.

        Args:
            logits_NU: Products of rows and hidden vectors.
            bias_U: To be added to them.
            offset_U: Log weights, or None.
            ids_U: int64, the classes.
            targets: The labels.
            mass: As in `score`.
            row_scale: As in `score`.
        """
        indptr, positions, weights, _ = targets
        if self.loss == "logistic":
            weight_U = torch.ones_like(bias_U) if offset_U is None else offset_U.exp()
            loss_N = self._kernels.shared_logistic_loss(
                logits_NU.add_(bias_U),
                indptr,
                positions,
                (weights > 0).to(weights.dtype),
                weight_U * row_scale,
            )
            return self._over_processes(loss_N), logits_NU
        if mass is not None and mass.smoothing > 0:
            offset_U = torch.zeros_like(bias_U) if offset_U is None else offset_U
            target_NU = torch.zeros_like(logits_NU)
            target_NU.index_put_((targets.row_P(), positions), weights, accumulate=True)  # pads have 0
            logits_NU, ids, offset = logits_NU.add_(bias_U), ids_U[None], offset_U[None]
            return smoothed_softmax(
                self._kernels, logits_NU, target_NU, ids, offset, mass, row_scale, self.shard
            )
        added_U = bias_U if offset_U is None else bias_U + offset_U
        if self.shard is None:
            filled_up = logits_NU.shape[1] - len(added_U)
            if filled_up:
                added_U = torch.nn.functional.pad(added_U, (0, filled_up), value=-torch.inf)
            loss_N = self._kernels.shared_softmax_loss(
                logits_NU, indptr, positions, weights * row_scale, added_U
            )
        else:
            entries = Targets(targets.row_P(), positions, weights * row_scale)
            loss_N = sharded_softmax_loss(logits_NU.add_(added_U), entries, self.shard)
        return loss_N, logits_NU

    def _score_pairs(
        self,
        rows: Rows,
        sets: ActiveSets,
        hidden_ND: torch.Tensor,
        labels: CsrArrays | DeviceLabels,
        query_seconds: float,
        row_scale: float | torch.Tensor,
        mass: LabelMass | None,
    ) -> Scored:
        logits_NA = self._kernels.pair_logits(hidden_ND, rows.weight, rows.bias, sets.active_NA)
        if self.loss == "logistic":
            weight_NA = torch.ones_like(logits_NA) if sets.offset_NA is None else sets.offset_NA.exp()
            # One-vs-all: every true class is a full positive of its own binary problem.
            loss_N, grad_NA = self._kernels.logistic_loss(
                logits_NA, (sets.target_NA > 0).to(logits_NA.dtype), weight_NA * row_scale
            )
            loss_N = self._over_processes(loss_N)
        else:
            target_NA, offset_NA = sets.target_NA, sets.offset_NA
            if mass is not None:  # a row's labels have its first slots, in their order
                target_NA[first_slots(labels)] = mass.weights.to(target_NA.dtype)
            if mass is None or mass.smoothing == 0:
                loss_N, grad_NA = softmax(
                    self._kernels, logits_NA, target_NA * row_scale, offset_NA, self.shard
                )
            else:
                offset_NA = torch.zeros_like(logits_NA) if offset_NA is None else offset_NA
                loss_N, grad_NA = smoothed_softmax(
                    self._kernels,
                    logits_NA,
                    target_NA,
                    sets.active_NA,
                    offset_NA,
                    mass,
                    row_scale,
                    self.shard,
                )
        loss_N /= row_scale
        active = sets.count / max(1, len(hidden_ND))
        return Scored(loss_N, active, sets.active_NA, query_seconds, hidden_ND, grad_NA, rows.weight.detach())

    def _over_processes(self, loss_N: torch.Tensor) -> torch.Tensor:
        return loss_N if self.shard is None else self.shard.reduce(loss_N)

    def _take_memory(self, shape: tuple[int, int], like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What the last step left, if it fits; it is given away, so that a loss before the next update gets its own."""
        memory, self._memory = self._memory, None
        if memory is not None and memory.shape == shape and memory.dtype == dtype:
            return memory
        return like.new_empty(shape, dtype=dtype)

    def _keeps_narrow_scores(self, hidden_ND: torch.Tensor, mass: LabelMass | None) -> bool:
        """Whether scores stay as products in bfloat16 are: half of what a step would else read and write."""
        plain = self.loss == "softmax" and self.shard is None and (mass is None or mass.smoothing == 0)
        return plain and self._kernels is cpu and hidden_ND.dtype == torch.float32

    def _product_dtype(self, like: torch.Tensor) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bfloat16" else like.dtype
