"""From sparse features to a dense hidden vector: an embedding bag, ReLU, and optional dense layers.

The bag is as large as the vocabulary and touched sparsely, so it has the fused row updates of the kernels;
the dense layers are ordinary torch modules with torch's own Adam.

Legend: N rows in a batch, F input features, D width of the bag, H width of the output.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from slidex.kernels import RowState, StepSettings
from slidex.nn import placement as placements
from slidex.nn.bag_inputs import BagInputs, InputRules
from slidex.nn.initial_weights import allocate, draw_normal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from slidex.data.csr import CsrArrays
    from slidex.nn.placement import Placement


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
        device: ``cpu``, or ``meta`` for an encoder without weights: `place` draws them where they are to be.
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
        device: str = "cpu",
    ) -> None:
        super().__init__()
        self.hidden_dropout = hidden_dropout
        self.rules = InputRules(normalize, input_dropout, hidden_dropout, (width, *dense_widths), seed)
        self._placement = placements.place(torch.device("cpu"))
        self.out_features = dense_widths[-1] if dense_widths else width
        self._optimizer = optimizer
        self.bag = nn.Parameter(torch.empty(num_features, width, device=device), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(width, device=device))
        widths = itertools.pairwise([width, *dense_widths])
        self.dense = nn.ModuleList(nn.Linear(*sizes, device=device) for sizes in widths)
        if device != "meta":
            self._draw()
        self._forget()

    def place(self, placement: Placement, *, trains: bool = True) -> None:
        """Goes where a model is to be; where it `trains`, with the state of its optimiser."""
        self._placement = placement
        if self.bag.device.type == "meta":
            allocate(self, placement.device)
            self._draw()
            self._forget()
            return
        self.to(placement.device)
        if trains:
            self.bag_state = self.bag_state.to(placement.device)

    @torch.no_grad()
    def _draw(self) -> None:
        """Initial weights: a function of sizes and seed."""
        generator = torch.Generator().manual_seed(self.rules.seed)
        # Unit-norm inputs give pre-activations of variance 1 / D: the hidden vector starts with norm about 0.7.
        draw_normal(self.bag, 1 / math.sqrt(self.bag.shape[1]), generator)
        self.bias.zero_()
        for parameter in self.dense.parameters():  # layer by layer, weights before biases
            if parameter.dim() == 2:
                draw_normal(parameter, math.sqrt(2 / parameter.shape[1]), generator)
            else:
                parameter.zero_()

    def _forget(self) -> None:
        """A state of the optimiser that no step has touched, where the weights are."""
        self.bag_state = RowState.zeros_like(self.bag, self._optimizer)

    def forward(self, x: CsrArrays | BagInputs, step: int | None = None) -> torch.Tensor:
        """Hidden vectors of a batch: float32 (N, H).

        Args:
            x: N rows of features, or what `rules` made of them, where the encoder is.
            step: Keys the dropout masks of a training step; None means no dropout.
        """
        inputs = self._inputs(x, step)
        return self._dense_layers(self._bag_layer(inputs), inputs.keep[1:])

    def forward_train(
        self, x: CsrArrays | BagInputs, step: int, rows: slice | None = None
    ) -> tuple[torch.Tensor, TrainingGraph]:
        """As `forward`, with what `backward` needs to continue from the hidden vectors' gradient.

        Args:
            x: N rows of features, or what `rules` made of them for this step, where the encoder is.
            step: Keys the dropout masks.
            rows: The consecutive rows of `x` to do; None does all. Masks do not depend on it.
        """
        whole = self._inputs(x, step)
        inputs = whole.rows(rows or slice(0, whole.num_rows))
        bag_ND = self._bag_layer(inputs)
        if not self.dense:
            return bag_ND, TrainingGraph(whole, bag_ND, None)
        hidden_NH = self._dense_layers(bag_ND.requires_grad_(), inputs.keep[1:])
        return hidden_NH.detach(), TrainingGraph(whole, bag_ND, hidden_NH)

    def backward(
        self,
        graph: TrainingGraph,
        grad_hidden_NH: torch.Tensor,
        settings: StepSettings,
        gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Accumulates `.grad` of the dense parameters and applies one optimiser step to the touched rows of the bag.

        Args:
            graph: From `forward_train`.
            grad_hidden_NH: Gradient of what it returned.
            settings: The step's settings.
            gather: Makes the bag's gradients of some rows those of all rows of `graph.x`, where `forward_train` did
                some and others did the rest. Bag and bias are then updated for all; gradients of the dense layers
                are of the rows done here.
        """
        x, grad_ND = graph.x, grad_hidden_NH
        if graph.hidden_NH is not None:
            graph.hidden_NH.backward(grad_hidden_NH)
            if graph.bag_ND.grad is None:
                raise RuntimeError("autograd left no gradient at the embedding bag")
            grad_ND = graph.bag_ND.grad
        # The bag's units that were negative or dropped are 0; those kept had been scaled up by 1 / (1 - dropout).
        kept = graph.bag_ND.detach() > 0
        grad_bag_ND = grad_ND * (kept if self.hidden_dropout == 0 else kept / (1 - self.hidden_dropout))
        if gather is not None:
            grad_bag_ND = gather(grad_bag_ND)
        grad_D = grad_bag_ND.sum(0)
        self.bias.grad = grad_D if self.bias.grad is None else self.bias.grad + grad_D
        self._placement.kernels.embedding_bag_update(
            x.indptr, x.indices, x.values, grad_bag_ND, self.bag, self.bag_state, settings
        )

    def _inputs(self, x: CsrArrays | BagInputs, step: int | None) -> BagInputs:
        return x if isinstance(x, BagInputs) else self.rules.apply(x, step).to(self._placement)

    def _bag_layer(self, x: BagInputs) -> torch.Tensor:
        sums_ND = self._placement.kernels.embedding_bag(
            x.indptr, x.indices, x.values, self.bag, self.bias.detach()
        )
        return self._dropout(sums_ND.relu_(), x.keep[0] if x.keep else None)

    def _dense_layers(self, hidden: torch.Tensor, keep: Sequence[torch.Tensor]) -> torch.Tensor:
        for layer, mask in itertools.zip_longest(self.dense, keep):
            hidden = self._dropout(torch.relu(layer(hidden)), mask)
        return hidden

    def _dropout(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return hidden if mask is None else hidden * mask / (1 - self.hidden_dropout)


@dataclass(frozen=True, slots=True)
class TrainingGraph:
    """What a training step remembers between the encoder's forward and backward pass.

    Args:
        x: The rows of the whole batch, as they are summed.
        bag_ND: The first layer, after ReLU and dropout, of the rows that were done, as `hidden_NH`.
        hidden_NH: The last dense layer with its autograd graph; None where there is none.
    """

    x: BagInputs
    bag_ND: torch.Tensor
    hidden_NH: torch.Tensor | None
