"""The output layer over all classes: loss, gradient and row updates on the classes that matter for the batch.

One training step is two calls, so that a non-finite loss stops before anything is written:

    scored = head.score(hidden_ND, labels, step)        # picks the classes, computes the loss and its gradient
    grad_hidden_ND = head.update(scored, settings)      # gradient for the encoder; touched rows take a step

Legend: N rows in a batch, C classes, D hidden width, A active classes per row, U classes in a shared pool.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from slidex.errors import ConfigError
from slidex.kernels import OPTIMIZERS, RowState, StepSettings
from slidex.kernels import cpu as kernels
from slidex.lsh import exact_topk
from slidex.nn.candidates import label_weights

if TYPE_CHECKING:
    from slidex.data.csr import CsrArrays
    from slidex.nn.candidates import ActiveSets, CandidateSelector

MODES = ("exact", "shared", "per_sample")
LOSSES = ("softmax", "logistic")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class Scored:
    """What `SampledHead.score` leaves for `SampledHead.update`.

    Args:
        loss_N: float (N,), loss of every row.
        active: How many classes a row was scored on, on average.
        ids: int64, the classes the batch was scored on: (U,) distinct ones or (N, A) padded with -1.
        query_seconds: Time spent on choosing them.
        hidden_ND: What was scored.
        grad: Of the *mean* loss by the scores, (N, U) or (N, A).
        rows_UD: The weights of `ids`, or of all classes where every row has its own.
    """

    loss_N: torch.Tensor
    active: float
    ids: torch.Tensor
    query_seconds: float
    hidden_ND: torch.Tensor
    grad: torch.Tensor
    rows_UD: torch.Tensor


class SampledHead(nn.Module):
    """A linear layer onto C classes that trains on an active set of them.

    Args:
        in_features: D.
        num_classes: C.
        mode: ``exact`` scores all classes; ``shared`` scores the batch on one pool of classes with matrix products
            (MONGOOSE's way); ``per_sample`` scores each row on its own classes (SLIDE's way).
        loss: ``softmax`` (a row's target mass is spread evenly over its true classes) or ``logistic``
            (one-vs-all on the active classes).
        precision: Of the matrix products in ``exact`` and ``shared`` mode; weights stay float32.
        selector: Chooses the active classes; None if and only if `mode` is ``exact``.
        optimizer: Rule of the row updates, one of `slidex.kernels.OPTIMIZERS`.
        seed: Seed of the initial weights.

    Raises:
        ConfigError: if a setting is none of the values above, or a sampled mode has no selector.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        mode: str = "shared",
        loss: str = "softmax",
        precision: str = "float32",
        selector: CandidateSelector | None = None,
        optimizer: str = "adam",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("mode", mode, MODES),
            ("loss", loss, LOSSES),
            ("precision", precision, PRECISIONS),
            ("optimizer", optimizer, OPTIMIZERS),
        ):
            if value not in allowed:
                raise ConfigError(
                    f"The {name!r} parameter of SampledHead must be one of {allowed}. Got {value!r} instead."
                )
        if mode != "exact" and selector is None:
            raise ConfigError(f"The 'selector' parameter of SampledHead must be given when mode is {mode!r}.")
        self.in_features, self.num_classes = in_features, num_classes
        self.mode, self.loss, self.precision, self.selector = mode, loss, precision, selector
        generator = torch.Generator().manual_seed(seed)
        weight_CD = torch.empty(num_classes, in_features).normal_(
            0, 1 / math.sqrt(in_features), generator=generator
        )
        # Rows are written by the fused kernels, never by autograd.
        self.weight = nn.Parameter(weight_CD, requires_grad=False)
        # One-vs-all starts from "hardly any class is true"; from 0 the first epochs would only push C scores down.
        start = -math.log(num_classes) if loss == "logistic" else 0.0
        self.bias = nn.Parameter(torch.full((num_classes,), start), requires_grad=False)
        self.weight_state = RowState.zeros_like(self.weight, optimizer)
        self.bias_state = RowState.zeros_like(self.bias, optimizer)

    def score(self, hidden_ND: torch.Tensor, labels: CsrArrays, step: int) -> Scored:
        """Loss of every row over its active classes, and the gradient that `update` will apply.

        Args:
            hidden_ND: float32 (N, D), detached.
            labels: True classes of the N rows.
            step: Keys all randomness, so that a step can be repeated.
        """
        started = time.perf_counter()
        if self.selector is None:
            ids_U, rows_UD, bias_U, offset_U = torch.arange(self.num_classes), self.weight, self.bias, None
            indptr, positions = (
                torch.from_numpy(labels.indptr),
                torch.from_numpy(labels.indices.astype(np.int64)),
            )
            weights, query_seconds = label_weights(labels), 0.0
        elif self.mode == "shared":
            pool = self.selector.pool(hidden_ND, labels, step)
            query_seconds = time.perf_counter() - started
            ids_U, offset_U = pool.ids_U, pool.offset_U
            indptr, positions, weights = pool.target_indptr, pool.target_positions, pool.target_weights
            rows_UD, bias_U = kernels.gather_rows(self.weight, self.bias, ids_U)
        else:
            sets = self.selector.active_sets(hidden_ND, labels, step)
            return self._score_pairs(sets, hidden_ND, time.perf_counter() - started)
        if self.precision == "bfloat16":
            rows_UD = rows_UD.bfloat16()
        logits_NU = self._matmul(hidden_ND, rows_UD.T)
        # Every row counts 1 / N: the loss kernels overwrite the scores with the gradient of the mean loss.
        rows = max(1, hidden_ND.shape[0])
        if self.loss == "softmax":
            added_U = bias_U if offset_U is None else bias_U + offset_U
            loss_N = kernels.shared_softmax_loss(logits_NU, indptr, positions, weights / rows, added_U)
        else:
            weight_U = torch.ones_like(bias_U) if offset_U is None else offset_U.exp()
            loss_N = kernels.shared_logistic_loss(
                logits_NU.add_(bias_U), indptr, positions, torch.ones_like(weights), weight_U / rows
            )
        loss_N *= rows
        return Scored(loss_N, float(len(ids_U)), ids_U, query_seconds, hidden_ND, logits_NU, rows_UD)

    def update(self, scored: Scored, settings: StepSettings) -> torch.Tensor:
        """Applies one optimiser step to the touched rows; returns the mean loss's gradient for `hidden_ND`, (N, D)."""
        grad = scored.grad
        states = (self.weight, self.bias, self.weight_state, self.bias_state, settings)
        if self.mode == "per_sample":
            grad_hidden_ND = kernels.pair_hidden_grad(grad, scored.rows_UD, scored.ids)
            kernels.pair_update(grad, scored.hidden_ND, scored.ids, *states)
            return grad_hidden_ND
        grad_hidden_ND = self._matmul(grad, scored.rows_UD)
        grad_rows_UD = self._matmul(grad.T, scored.hidden_ND)
        kernels.rows_update(scored.ids, grad_rows_UD, grad.sum(0), *states)
        return grad_hidden_ND

    def _score_pairs(self, sets: ActiveSets, hidden_ND: torch.Tensor, query_seconds: float) -> Scored:
        logits_NA = kernels.pair_logits(hidden_ND, self.weight, self.bias, sets.active_NA)
        rows = max(1, hidden_ND.shape[0])
        if self.loss == "softmax":
            loss_N, grad_NA = kernels.softmax_loss(logits_NA, sets.target_NA / rows, sets.offset_NA)
        else:
            weight_NA = torch.ones_like(logits_NA) if sets.offset_NA is None else sets.offset_NA.exp()
            # One-vs-all: every true class is a full positive of its own binary problem.
            loss_N, grad_NA = kernels.logistic_loss(
                logits_NA, (sets.target_NA > 0).to(logits_NA.dtype), weight_NA / rows
            )
        loss_N *= rows
        active = sets.count / rows
        return Scored(loss_N, active, sets.active_NA, query_seconds, hidden_ND, grad_NA, self.weight)

    def _matmul(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if self.precision == "float32":
            return a @ b
        return (a.bfloat16() @ b.bfloat16()).float()

    @torch.no_grad()
    def topk(
        self, hidden_ND: torch.Tensor, k: int, *, candidates_NA: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best classes of every row, best first; never builds an (N, C) matrix.

        Args:
            hidden_ND: float32 (N, D).
            k: Classes per row.
            candidates_NA: int64 (N, A) padded with -1: score only these; None scores all classes.

        Returns:
            Scores float32 (N, k) and ids int64 (N, k), padded with -inf and -1 where a row has fewer classes.
        """
        if candidates_NA is None:
            return exact_topk(hidden_ND, self.weight, self.bias, k)
        logits_NA = kernels.pair_logits(hidden_ND, self.weight, self.bias, candidates_NA)
        scores, slots = logits_NA.topk(min(k, logits_NA.shape[1]))
        ids = candidates_NA.gather(1, slots)
        missing = k - ids.shape[1]
        return (
            nn.functional.pad(scores, (0, missing), value=-math.inf),
            nn.functional.pad(ids, (0, missing), value=-1),
        )
