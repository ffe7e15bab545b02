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
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from slidex.errors import ConfigError
from slidex.kernels import cpu as kernels
from slidex.nn.candidates import label_weights
from slidex.nn.sharding import Targets, sharded_softmax_loss

if TYPE_CHECKING:
    from slidex.data.csr import CsrArrays
    from slidex.kernels import RowState, StepSettings
    from slidex.nn.candidates import ActiveSets, CandidateSelector
    from slidex.nn.sharding import Shard

MODES = ("exact", "shared", "per_sample")
LOSSES = ("softmax", "logistic")
PRECISIONS = ("float32", "bfloat16")
CLASSES_AT_ONCE = 1 << 16
"""Of a pool that is updated in pieces: their gradient exists for a moment."""


class Rows(NamedTuple):
    """The parameters of an output layer.

    Args:
        weight: float (C, D).
        bias: float (C,), or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None


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


@dataclass(frozen=True, slots=True)
class Scored:
    """What `Scorer.score` leaves for the backward pass.

    Args:
        loss_N: float (N,), loss of every row.
        active: How many classes a row was scored on, on average.
        ids: int64, the classes the batch was scored on: (U,) distinct ones or (N, A) padded with -1.
        query_seconds: Time spent on choosing them.
        hidden_ND: What was scored.
        grad: Of the sum of losses times `row_scale` by the scores, (N, U) or (N, A).
        rows_UD: The weights of `ids`, or of all classes where every row has its own.
    """

    loss_N: torch.Tensor
    active: float
    ids: torch.Tensor
    query_seconds: float
    hidden_ND: torch.Tensor
    grad: torch.Tensor
    rows_UD: torch.Tensor


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

    def score(
        self,
        rows: Rows,
        hidden_ND: torch.Tensor,
        labels: CsrArrays,
        step: int,
        *,
        row_scale: float = 1.0,
        mass: LabelMass | None = None,
    ) -> Scored:
        """Loss of every row over its active classes, and its gradient by their scores.

        Args:
            rows: The layer.
            hidden_ND: float32 or float64 (N, D), detached.
            labels: True classes of the N rows; with a shard, those of this process (`Shard.local`).
            step: Keys all randomness, so that a step can be repeated.
            row_scale: What each row's loss counts in the gradient, such as 1 / N for their mean; above 0.
            mass: Of the labels, in a softmax; None spreads a row's 1 evenly over its true classes. With a shard that
                would be those of this process: give the mass of the labels as they are over all.
        """
        started = time.perf_counter()
        if self.mode == "per_sample" and self.selector is not None:
            sets = self.selector.active_sets(hidden_ND, labels, step)
            query_seconds = time.perf_counter() - started
            return self._score_pairs(rows, sets, hidden_ND, labels, query_seconds, row_scale, mass)
        offset_U, query_seconds = None, 0.0
        if self.selector is None:
            ids_U = torch.arange(len(rows.weight))
            bias_U = rows.weight.new_zeros(len(ids_U)) if rows.bias is None else rows.bias.detach()
            rows_UD = rows.weight.detach()
            indptr = torch.from_numpy(labels.indptr)
            positions, weights = torch.from_numpy(labels.indices.astype(np.int64)), label_weights(labels)
        else:
            pool = self.selector.pool(hidden_ND, labels, step)
            query_seconds = time.perf_counter() - started
            ids_U, offset_U = pool.ids_U, pool.offset_U
            indptr, positions, weights = pool.target_indptr, pool.target_positions, pool.target_weights
            rows_UD, bias_U = kernels.gather_rows(rows.weight, rows.bias, ids_U)
        if self.precision == "bfloat16":
            rows_UD = rows_UD.bfloat16()
        logits_NU = self._matmul(hidden_ND, rows_UD.T)
        weights = (weights if mass is None else mass.weights).to(logits_NU.dtype)
        targets = indptr, positions, weights
        loss_N, grad_NU = self._pool_loss(logits_NU, bias_U, offset_U, ids_U, targets, mass, row_scale)
        loss_N /= row_scale
        return Scored(loss_N, float(len(ids_U)), ids_U, query_seconds, hidden_ND, grad_NU, rows_UD)

    def hidden_grad(self, scored: Scored) -> torch.Tensor:
        """Gradient of the hidden vectors, (N, D); with a shard, this process's part of the sum."""
        if self.mode == "per_sample":
            return kernels.pair_hidden_grad(scored.grad, scored.rows_UD, scored.ids)
        return self._matmul(scored.grad, scored.rows_UD)

    def update(
        self,
        scored: Scored,
        rows: Rows,
        weight_state: RowState,
        bias_state: RowState | None,
        settings: StepSettings,
    ) -> None:
        """Applies one optimiser step to the rows that were scored, in place."""
        grad, hidden_ND = scored.grad, scored.hidden_ND
        layer = (
            rows.weight.detach(),
            None if rows.bias is None else rows.bias.detach(),
            weight_state,
            bias_state,
        )
        if self.mode == "per_sample":
            kernels.pair_update(grad, hidden_ND, scored.ids, *layer, settings)
            return
        for first in range(0, len(scored.ids), CLASSES_AT_ONCE):
            part = slice(first, first + CLASSES_AT_ONCE)
            grad_rows_UD = self._matmul(grad[:, part].T, hidden_ND)
            kernels.rows_update(scored.ids[part], grad_rows_UD, grad[:, part].sum(0), *layer, settings)

    def rows_grad(self, scored: Scored) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradient of the rows that were scored: int64 ids (U,), ascending, and gradients (U, D) and (U,)."""
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
        ids_U, order = ids.sort()
        if self.selector is not None:  # else they are all classes, in order
            grad = grad[:, order]
        return ids_U, self._matmul(grad.T, hidden_ND), grad.sum(0)

    def _pool_loss(
        self,
        logits_NU: torch.Tensor,
        bias_U: torch.Tensor,
        offset_U: torch.Tensor | None,
        ids_U: torch.Tensor,
        targets: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        mass: LabelMass | None,
        row_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss times `row_scale`, and its gradient by the scores, which takes their place.

        Args:
            logits_NU: Products of rows and hidden vectors.
            bias_U: To be added to them.
            offset_U: Log weights, or None.
            ids_U: int64, the classes.
            targets: Offsets int64 (N + 1,), positions in the pool and mass of the labels, (P,).
            mass: As in `score`.
            row_scale: As in `score`.
        """
        indptr, positions, weights = targets
        if self.loss == "logistic":
            weight_U = torch.ones_like(bias_U) if offset_U is None else offset_U.exp()
            loss_N = kernels.shared_logistic_loss(
                logits_NU.add_(bias_U), indptr, positions, torch.ones_like(weights), weight_U * row_scale
            )
            return self._over_processes(loss_N), logits_NU
        if mass is not None and mass.smoothing > 0:
            offset_U = torch.zeros_like(bias_U) if offset_U is None else offset_U
            target_NU = torch.zeros_like(logits_NU)
            target_NU[_rows_of(indptr), positions] = weights
            return _smoothed_softmax(
                logits_NU.add_(bias_U), target_NU, ids_U[None], offset_U[None], mass, row_scale, self.shard
            )
        added_U = bias_U if offset_U is None else bias_U + offset_U
        if self.shard is None:
            loss_N = kernels.shared_softmax_loss(logits_NU, indptr, positions, weights * row_scale, added_U)
        else:
            entries = Targets(_rows_of(indptr), positions, weights * row_scale)
            loss_N = sharded_softmax_loss(logits_NU.add_(added_U), entries, self.shard)
        return loss_N, logits_NU

    def _score_pairs(
        self,
        rows: Rows,
        sets: ActiveSets,
        hidden_ND: torch.Tensor,
        labels: CsrArrays,
        query_seconds: float,
        row_scale: float,
        mass: LabelMass | None,
    ) -> Scored:
        logits_NA = kernels.pair_logits(hidden_ND, rows.weight, rows.bias, sets.active_NA)
        if self.loss == "logistic":
            weight_NA = torch.ones_like(logits_NA) if sets.offset_NA is None else sets.offset_NA.exp()
            # One-vs-all: every true class is a full positive of its own binary problem.
            loss_N, grad_NA = kernels.logistic_loss(
                logits_NA, (sets.target_NA > 0).to(logits_NA.dtype), weight_NA * row_scale
            )
            loss_N = self._over_processes(loss_N)
        else:
            target_NA, offset_NA = sets.target_NA, sets.offset_NA
            if mass is not None:  # a row's labels have its first slots, in their order
                indptr = torch.from_numpy(labels.indptr)
                row = _rows_of(indptr)
                target_NA[row, torch.arange(len(row)) - indptr[row]] = mass.weights.to(target_NA.dtype)
            if mass is None or mass.smoothing == 0:
                loss_N, grad_NA = _softmax(logits_NA, target_NA * row_scale, offset_NA, self.shard)
            else:
                offset_NA = torch.zeros_like(logits_NA) if offset_NA is None else offset_NA
                loss_N, grad_NA = _smoothed_softmax(
                    logits_NA, target_NA, sets.active_NA, offset_NA, mass, row_scale, self.shard
                )
        loss_N /= row_scale
        active = sets.count / max(1, len(hidden_ND))
        return Scored(loss_N, active, sets.active_NA, query_seconds, hidden_ND, grad_NA, rows.weight.detach())

    def _over_processes(self, loss_N: torch.Tensor) -> torch.Tensor:
        return loss_N if self.shard is None else self.shard.reduce(loss_N)

    def _matmul(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if self.precision == "float32":
            return a @ b
        return (a.bfloat16() @ b.bfloat16()).to(a.dtype)


def best_candidates(
    rows: Rows, hidden_ND: torch.Tensor, candidates_NA: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of each row's candidates, exactly scored, best first.

    Args:
        rows: The layer.
        hidden_ND: float (N, D).
        candidates_NA: int64 (N, A), -1 for none.
        k: Classes per row.

    Returns:
        Scores float (N, k) and ids int64 (N, k), padded with -inf and -1 where a row has fewer candidates.
    """
    logits_NA = kernels.pair_logits(hidden_ND, rows.weight, rows.bias, candidates_NA)
    scores, slots = logits_NA.topk(min(k, logits_NA.shape[1]))
    missing = k - slots.shape[1]
    return (
        torch.nn.functional.pad(scores, (0, missing), value=-torch.inf),
        torch.nn.functional.pad(candidates_NA.gather(1, slots), (0, missing), value=-1),
    )


def _softmax(
    logits_NA: torch.Tensor, target_NA: torch.Tensor, offset_NA: torch.Tensor | None, shard: Shard | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient over the active slots, of all processes where there is a shard."""
    if shard is None:
        return kernels.softmax_loss(logits_NA, target_NA, offset_NA)
    scores_NA = logits_NA if offset_NA is None else logits_NA + offset_NA
    return sharded_softmax_loss(scores_NA, target_NA, shard), scores_NA


def _smoothed_softmax(
    logits_NA: torch.Tensor,
    target_NA: torch.Tensor,
    ids: torch.Tensor,
    offset: torch.Tensor,
    mass: LabelMass,
    row_scale: float,
    shard: Shard | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of a softmax whose labels give a share of their mass to all classes alike.

    The sum of all classes' scores is estimated as the softmax's denominator is, with weight exp(offset) for each active
    class, scaled so that these add up to 1.

    Args:
        logits_NA: float (N, A), -inf at pads.
        target_NA: float (N, A), mass of the labels; changed in place.
        ids: int64 (N, A) or (1, A), the classes; -1 at pads.
        offset: float (N, A) or (1, A), log weights.
        mass: Says how much is spread, and among whom.
        row_scale: As in `Scorer.score`.
        shard: As in `Scorer`.
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
    constant_N = (spread * offset).sum(1) * labelled_N1[:, 0]
    if shard is not None:
        shard.reduce(constant_N)
    loss_N, grad_NA = _softmax(logits_NA, target_NA * row_scale, offset.expand_as(logits_NA), shard)
    return loss_N + constant_N * row_scale, grad_NA


def _rows_of(indptr: torch.Tensor) -> torch.Tensor:
    """The row of every stored label: int64 (P,)."""
    return torch.repeat_interleave(torch.arange(len(indptr) - 1), indptr.diff())
