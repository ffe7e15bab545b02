"""The trainer's output layer: weights, optimiser state, and a step that scores a batch and updates what it touched.

One training step is two calls, so that a non-finite loss stops before anything is written:

    scored = head.score(hidden_ND, labels, step)        # picks the classes, computes the loss and its gradient
    grad_hidden_ND = head.update(scored, settings)      # gradient for the encoder; touched rows take a step

Where classes are sharded over processes, N are the rows of all of them; weights and state are of one's own classes.

Legend: N rows in a batch, C classes, D hidden width, A active classes per row.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from slidex.data.csr import CsrArrays
from slidex.errors import ConfigError
from slidex.kernels import OPTIMIZERS, RowState, StepSettings
from slidex.lsh import exact_topk
from slidex.nn import placement as placements
from slidex.nn.best_candidates import best_candidates
from slidex.nn.candidates import label_weights
from slidex.nn.initial_weights import allocate, draw_normal
from slidex.nn.scoring import Rows, Scored, Scorer
from slidex.nn.smoothing import LabelMass

if TYPE_CHECKING:
    from slidex.nn.candidates import CandidateSelector
    from slidex.nn.device_labels import DeviceLabels
    from slidex.nn.placement import Placement
    from slidex.nn.sharding import Shard


class SampledHead(nn.Module):
    """A linear layer onto C classes that trains on an active set of them.

    Args:
        in_features: D.
        num_classes: C.
        mode: See `Scorer`, as the next three.
        loss: ``softmax`` or ``logistic``.
        precision: Of the matrix products.
        selector: Chooses the active classes.
        optimizer: Rule of the row updates, one of `slidex.kernels.OPTIMIZERS`.
        seed: Seed of the initial weights: the same for any number of processes.
        weight_dtype: Of the weights; torch.bfloat16 takes a step or scores on a GPU alone. Biases and the optimiser's
            state are float32.
        shard: Which of the C classes this process has; None where it has all. The selector is over its own.
        device: ``cpu``, or ``meta`` for a head without weights: `place` draws them where they are to be.

    Raises:
        ConfigError: if a setting is none of its values, or a sampled mode has no selector.
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
        weight_dtype: torch.dtype = torch.float32,
        shard: Shard | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        if optimizer not in OPTIMIZERS:
            raise ConfigError(
                f"The 'optimizer' parameter of SampledHead must be one of {OPTIMIZERS}. Got {optimizer!r} instead."
            )
        self.scorer = Scorer(mode, loss=loss, precision=precision, selector=selector, shard=shard)
        self.in_features, self.num_classes, self.shard = in_features, num_classes, shard
        self._optimizer, self._seed = optimizer, seed
        own = num_classes if shard is None else shard.end - shard.begin
        weight_CD = torch.empty(own, in_features, dtype=weight_dtype, device=device)
        # Rows are written by the fused kernels, never by autograd.
        self.weight = nn.Parameter(weight_CD, requires_grad=False)
        self.bias = nn.Parameter(torch.empty(own, device=device), requires_grad=False)
        self._placement = placements.place(torch.device("cpu"))
        if device != "meta":
            self._draw()
        self._forget()

    @property
    def mode(self) -> str:
        """How a batch is scored, see `Scorer`."""
        return self.scorer.mode

    @property
    def loss(self) -> str:
        """``softmax`` or ``logistic``."""
        return self.scorer.loss

    @property
    def selector(self) -> CandidateSelector | None:
        """What chooses the active classes; None in ``exact`` mode."""
        return self.scorer.selector

    def place(self, placement: Placement, index_name: str | None = None) -> None:
        """Goes where a model is to be; with an `index_name` it can train there, and the optimiser's state goes along.

        Raises:
            ConfigError: The index does not work there, or classes are sharded.
        """
        if index_name is not None:
            self.scorer.place(placement, index_name)
        self._placement = placement
        if self.weight.device.type == "meta":
            allocate(self, placement.device)
            self._draw()
            self._forget()
            return
        self.to(placement.device)
        if index_name is not None:
            self.weight_state = self.weight_state.to(placement.device)
            self.bias_state = self.bias_state.to(placement.device)

    def _draw(self) -> None:
        """Initial weights: rows of a matrix (C, D) that is a function of C, D and seed."""
        generator, begin = torch.Generator().manual_seed(self._seed), self.shard.begin if self.shard else 0
        deviation = 1 / math.sqrt(self.in_features)
        draw_normal(self.weight, deviation, generator, begin=begin, num_rows=self.num_classes)
        # One-vs-all starts from "hardly any class is true"; from 0 the first epochs would only push C scores down.
        self.bias.fill_(-math.log(self.num_classes) if self.loss == "logistic" else 0.0)

    def _forget(self) -> None:
        """A state of the optimiser that no step has touched, where the weights are."""
        self.weight_state = RowState.zeros_like(self.weight, self._optimizer)
        self.bias_state = RowState.zeros_like(self.bias, self._optimizer)

    def score(self, hidden_ND: torch.Tensor, labels: CsrArrays | DeviceLabels, step: int) -> Scored:
        """Loss of every row over its active classes, and the gradient of their mean that `update` will apply.

        Args:
            hidden_ND: float32 (N, D), detached.
            labels: True classes of the N rows, of all processes; `DeviceLabels` where the head is on a device.
            step: Keys all randomness, so that a step can be repeated.
        """
        scale, mass = 1 / max(1, len(hidden_ND)), None
        if self.shard is not None and isinstance(labels, CsrArrays):
            weights = label_weights(labels).numpy()
            labels = self.shard.local(replace(labels, values=weights))
            mass = LabelMass(torch.from_numpy(labels.values))
        rows = Rows(self.weight, self.bias)
        return self.scorer.score(rows, hidden_ND, labels, step, row_scale=scale, mass=mass)

    def update(self, scored: Scored, settings: StepSettings) -> torch.Tensor:
        """Applies one optimiser step to the touched rows; returns the mean loss's gradient for `hidden_ND`, (N, D).

        With a shard it is this process's part of that gradient; the sum over processes is the whole.
        """
        grad_hidden_ND = self.scorer.hidden_grad(scored)
        self.scorer.update(scored, Rows(self.weight, self.bias), self.weight_state, self.bias_state, settings)
        return grad_hidden_ND

    def logits(self, hidden_ND: torch.Tensor, ids_NA: torch.Tensor) -> torch.Tensor:
        """Scores of each row's own classes, float32 (N, A), -inf at pads; `ids_NA` int64, padded with -1."""
        return self._placement.kernels.pair_logits(hidden_ND, self.weight, self.bias, ids_NA)

    @torch.no_grad()
    def topk(
        self, hidden_ND: torch.Tensor, k: int, *, candidates_NA: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best classes of every row, best first; never builds an (N, C) matrix.

        Args:
            hidden_ND: float32 (N, D).
            k: Classes per row.
            candidates_NA: int64 (N, A) padded with -1: score only these; None scores all classes, of all processes.

        Returns:
            Scores float32 (N, k) and ids int64 (N, k), padded with -inf and -1 where a row has fewer classes.

        Raises:
            ConfigError: if candidates are given where classes are sharded over processes.
        """
        if candidates_NA is None:
            best = exact_topk(hidden_ND, self.weight, self.bias, k)
            return best if self.shard is None else self.shard.merge_topk(*best)
        if self.shard is not None:
            raise ConfigError(
                "The 'candidates_NA' parameter of SampledHead.topk must be None for a sharded head."
            )
        rows = Rows(self.weight, self.bias)
        return best_candidates(rows, hidden_ND, candidates_NA, k, self._placement.kernels)
