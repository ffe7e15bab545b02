"""The trainer's output layer: weights, optimiser state, and a step that scores a batch and updates what it touched.

One training step is two calls, so that a non-finite loss stops before anything is written:

    scored = head.score(hidden_ND, labels, step)        # picks the classes, computes the loss and its gradient
    grad_hidden_ND = head.update(scored, settings)      # gradient for the encoder; touched rows take a step

Legend: N rows in a batch, C classes, D hidden width, A active classes per row.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from slidex.errors import ConfigError
from slidex.kernels import OPTIMIZERS, RowState, StepSettings
from slidex.kernels import cpu as kernels
from slidex.lsh import exact_topk
from slidex.nn.scoring import Rows, Scored, Scorer

if TYPE_CHECKING:
    from slidex.data.csr import CsrArrays
    from slidex.nn.candidates import CandidateSelector


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
        seed: Seed of the initial weights.

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
    ) -> None:
        super().__init__()
        if optimizer not in OPTIMIZERS:
            raise ConfigError(
                f"The 'optimizer' parameter of SampledHead must be one of {OPTIMIZERS}. Got {optimizer!r} instead."
            )
        self.scorer = Scorer(mode, loss=loss, precision=precision, selector=selector)
        self.in_features, self.num_classes = in_features, num_classes
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

    @property
    def mode(self) -> str:
        """How a batch is scored, see `Scorer`."""
        return self.scorer.mode

    @property
    def selector(self) -> CandidateSelector | None:
        """What chooses the active classes; None in ``exact`` mode."""
        return self.scorer.selector

    def score(self, hidden_ND: torch.Tensor, labels: CsrArrays, step: int) -> Scored:
        """Loss of every row over its active classes, and the gradient of their mean that `update` will apply.

        Args:
            hidden_ND: float32 (N, D), detached.
            labels: True classes of the N rows.
            step: Keys all randomness, so that a step can be repeated.
        """
        scale = 1 / max(1, len(hidden_ND))
        return self.scorer.score(Rows(self.weight, self.bias), hidden_ND, labels, step, row_scale=scale)

    def update(self, scored: Scored, settings: StepSettings) -> torch.Tensor:
        """Applies one optimiser step to the touched rows; returns the mean loss's gradient for `hidden_ND`, (N, D)."""
        grad_hidden_ND = self.scorer.hidden_grad(scored)
        self.scorer.update(scored, Rows(self.weight, self.bias), self.weight_state, self.bias_state, settings)
        return grad_hidden_ND

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
