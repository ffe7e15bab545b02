"""From sparse features to a dense hidden vector: an embedding bag, ReLU, and optional dense layers.

The bag is as large as the vocabulary and touched sparsely, so it has the fused row updates of the kernels;
the dense layers are ordinary torch modules with torch's own Adam.

Legend: N rows in a batch, F input features, D width of the bag, H width of the output.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from slidex.data.csr import CsrArrays
from slidex.kernels import RowState, StepSettings
from slidex.kernels import cpu as kernels

if TYPE_CHECKING:
    from collections.abc import Sequence


class BagEncoder(nn.Module):
    """Embedding bag + bias + ReLU, then dense layers with ReLU, with dropout on inputs and hidden vectors.

    Args:
        num_features: F.
        width: D, the bag's width.
        dense_widths: Widths of further dense layers; the last one (or D) is `out_features`.
        input_dropout: Share of a row's stored features dropped in training; the rest are scaled up.
        hidden_dropout: Share of hidden units dropped after every ReLU in training.
        normalize: Scale every row of the input to unit L2 norm first.
        optimizer: Rule of the bag's row updates, one of `slidex.kernels.OPTIMIZERS`.
        seed: Seed of the initial weights and, with the step number, of the dropout masks.
    """

    def __init__(
        self,
        num_features: int,
        width: int,
        *,
        dense_widths: Sequence[int] = (),
        input_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        normalize: bool = True,
        optimizer: str = "adam",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.input_dropout, self.hidden_dropout = input_dropout, hidden_dropout
        self.normalize, self.seed = normalize, seed
        self.out_features = dense_widths[-1] if dense_widths else width
        generator = torch.Generator().manual_seed(seed)
        # Unit-norm inputs give pre-activations of variance 1 / D: the hidden vector starts with norm about 0.7.
        bag = torch.empty(num_features, width).normal_(0, 1 / math.sqrt(width), generator=generator)
        self.bag = nn.Parameter(bag, requires_grad=False)
        self.bag_state = RowState.zeros_like(self.bag, optimizer)
        self.bias = nn.Parameter(torch.zeros(width))
        self.dense = nn.ModuleList()
        for fan_in, fan_out in itertools.pairwise([width, *dense_widths]):
            layer = nn.Linear(fan_in, fan_out)
            nn.init.normal_(layer.weight, 0, math.sqrt(2 / fan_in), generator=generator)
            nn.init.zeros_(layer.bias)
            self.dense.append(layer)

    def forward(self, x: CsrArrays, step: int | None = None) -> torch.Tensor:
        """Hidden vectors of a batch: float32 (N, H).

        Args:
            x: N rows of features.
            step: Keys the dropout masks of a training step; None means no dropout.
        """
        return self._layers(self._bag_sum(self._inputs(x, step)), step)

    def forward_train(self, x: CsrArrays, step: int) -> tuple[torch.Tensor, TrainingGraph]:
        """As `forward`, with what `backward` needs to continue from the hidden vectors' gradient."""
        x = self._inputs(x, step)
        bag_ND = self._bag_sum(x).requires_grad_()
        hidden_NH = self._layers(bag_ND, step)
        return hidden_NH.detach(), TrainingGraph(x, bag_ND, hidden_NH)

    def backward(self, graph: TrainingGraph, grad_hidden_NH: torch.Tensor, settings: StepSettings) -> None:
        """Accumulates `.grad` of the dense parameters and applies one optimiser step to the touched rows of the bag."""
        graph.hidden_NH.backward(grad_hidden_NH)
        x, grad_bag_ND = graph.x, graph.bag_ND.grad
        if grad_bag_ND is None:
            raise RuntimeError("autograd left no gradient at the embedding bag")
        kernels.embedding_bag_update(
            torch.from_numpy(x.indptr),
            torch.from_numpy(x.indices),
            None if x.values is None else torch.from_numpy(x.values),
            grad_bag_ND,
            self.bag,
            self.bag_state,
            settings,
        )

    def _inputs(self, x: CsrArrays, step: int | None) -> CsrArrays:
        values = x.values
        if self.normalize:
            values = _unit_rows(x)
        if step is not None and self.input_dropout > 0:
            rng = np.random.Generator(np.random.Philox(key=[self.seed, step]))
            keep = rng.random(len(x.indices), dtype=np.float32) >= self.input_dropout
            scale = np.float32(1 / (1 - self.input_dropout))
            values = keep * scale if values is None else values * (keep * scale)
        if values is x.values:
            return x
        return CsrArrays(x.indptr, x.indices, values, x.num_columns)

    def _bag_sum(self, x: CsrArrays) -> torch.Tensor:
        values = None if x.values is None else torch.from_numpy(x.values)
        return kernels.embedding_bag(
            torch.from_numpy(x.indptr), torch.from_numpy(x.indices), values, self.bag, None
        )

    def _layers(self, bag_ND: torch.Tensor, step: int | None) -> torch.Tensor:
        generator = None
        if step is not None and self.hidden_dropout > 0:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        hidden = self._dropout(torch.relu(bag_ND + self.bias), generator)
        for layer in self.dense:
            hidden = self._dropout(torch.relu(layer(hidden)), generator)
        return hidden

    def _dropout(self, hidden: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        if generator is None:
            return hidden
        keep = torch.rand(hidden.shape, generator=generator) >= self.hidden_dropout
        return hidden * keep / (1 - self.hidden_dropout)


class TrainingGraph:
    """What a training step remembers between the encoder's forward and backward pass."""

    __slots__ = ("bag_ND", "hidden_NH", "x")

    def __init__(self, x: CsrArrays, bag_ND: torch.Tensor, hidden_NH: torch.Tensor) -> None:
        self.x, self.bag_ND, self.hidden_NH = x, bag_ND, hidden_NH


def _unit_rows(x: CsrArrays) -> np.ndarray:
    """The values of `x` with every row scaled to unit L2 norm; rows of zeros stay as they are."""
    counts = np.diff(x.indptr)
    if x.values is None:
        return np.repeat(1 / np.sqrt(np.maximum(counts, 1)), counts).astype(np.float32)
    norms = np.sqrt(np.bincount(x.row_ids(), weights=np.square(x.values), minlength=x.num_rows))
    return (x.values * np.repeat(1 / np.where(norms > 0, norms, 1), counts)).astype(np.float32)
