"""Next-word models that differ in nothing but the output layer: sampled words, all words, or torch's adaptive softmax.

Each has an encoder of its own, all with the same initial weights and the same optimisers.
Letters: N rows in a batch, C words, D hidden width, W words of context.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from benchmarks.rivals import DenseHead
from slidex.nn import LSHSoftmaxLoss
from slidex.nn.functional import lsh_softmax

if TYPE_CHECKING:
    import numpy as np

    from slidex.nn import SamplingOptions

CONTEXT, EMBEDDING, INNER, WIDTH = 12, 64, 256, 128
"""W, the width of a word's embedding, that of the encoder's inner layer, and D."""
EMBEDDING_DEVIATION = 0.1
"""Of the initial embeddings. With torch's 1: perplexity 1,640 after 800 steps; with this 1,403 after 600."""


class Encoder(nn.Module):
    """The last words' embeddings side by side, a layer with ReLU and a linear one (Bengio et al., 2003).

    Only the embeddings of words that occur in a batch are read and written: a dense update of them all would cost
    about as much as a head.

    Args:
        num_words: C.
        learning_rate: Of its optimisers.
        seed: Of the initial weights.
    """

    def __init__(self, num_words: int, learning_rate: float, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.words = nn.Embedding(num_words, EMBEDDING, sparse=True)
        nn.init.normal_(self.words.weight, 0, EMBEDDING_DEVIATION)
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(CONTEXT * EMBEDDING, INNER), nn.ReLU(), nn.Linear(INNER, WIDTH)
        )
        self._optimizers = [
            torch.optim.SparseAdam(self.words.parameters(), lr=learning_rate),
            torch.optim.Adam(self.layers.parameters(), lr=learning_rate, fused=True),
        ]

    def forward(self, context_NW: torch.Tensor) -> torch.Tensor:
        """Hidden vectors: float32 (N, D)."""
        return self.layers(self.words(context_NW))

    def step(self) -> None:
        """Applies the gradients that a backward pass has left."""
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()


class Model(Protocol):
    """An encoder with an output layer."""

    encoder: Encoder

    def step(self, context_NW: torch.Tensor, target_N: torch.Tensor) -> float:
        """One optimiser step of encoder and head; the batch's mean loss before it, as training computes it."""
        ...

    def exact_loss(self, hidden_ND: torch.Tensor, target_N: torch.Tensor) -> float:
        """Mean loss of the rows with all words scored."""
        ...


def first_layer(counts: np.ndarray, seed: int = 0) -> nn.Linear:
    """The output layer that runs start from: small weights, and each word's log frequency as its bias.

    With biases of 0 the first hundreds of steps do nothing but learn how frequent each word is.

    Args:
        counts: int64 (C,), a word that does not occur counts as half an occurrence.
        seed: Of the weights.
    """
    torch.manual_seed(seed)
    layer = nn.Linear(WIDTH, len(counts))
    share_C = torch.from_numpy(counts).double().clamp(min=0.5) / counts.sum()
    with torch.no_grad():
        layer.bias.copy_(share_C.log())
    return layer


class SampledModel:
    """With `LSHSoftmaxLoss`, whose rows are updated within backward.

    Args:
        start: The layer it starts from.
        options: With a fused optimizer.
        learning_rate: Of the encoder.
    """

    def __init__(self, start: nn.Linear, options: SamplingOptions, learning_rate: float) -> None:
        self.encoder = Encoder(start.out_features, learning_rate)
        self.head = LSHSoftmaxLoss(start.in_features, start.out_features, bias=True, options=options)
        self.head.load_state_dict(start.state_dict())

    def step(self, context_NW: torch.Tensor, target_N: torch.Tensor) -> float:
        """See `Model`."""
        loss = self.head(self.encoder(context_NW), target_N)
        loss.backward()
        self.encoder.step()
        return float(loss.detach())

    @torch.no_grad()
    def exact_loss(self, hidden_ND: torch.Tensor, target_N: torch.Tensor) -> float:
        """See `Model`."""
        self.head.eval()
        loss = float(self.head(hidden_ND, target_N))
        self.head.train()
        return loss


class DenseModel:
    """With a softmax over all words and torch's fused Adam over all rows: see `benchmarks.rivals.DenseHead`.

    Args:
        start: The layer it starts from.
        batch_size: N.
        precision: Of the products.
        head_rate: Learning rate of the layer.
        learning_rate: Of the encoder.
    """

    def __init__(
        self, start: nn.Linear, batch_size: int, precision: str, head_rate: float, learning_rate: float
    ) -> None:
        self.encoder = Encoder(start.out_features, learning_rate)
        self.head = DenseHead(start.weight, start.bias, batch_size, precision)
        self._optimizer = torch.optim.Adam([self.head.weight, self.head.bias], lr=head_rate, fused=True)

    def step(self, context_NW: torch.Tensor, target_N: torch.Tensor) -> float:
        """See `Model`."""
        hidden_ND = self.encoder(context_NW)
        rows, mass = torch.arange(len(target_N)), torch.ones(len(target_N))
        loss, grad_ND = self.head.loss_and_grad(hidden_ND, rows, target_N, mass)
        hidden_ND.backward(grad_ND)
        self._optimizer.step()
        self.head.updated()
        self.encoder.step()
        return loss

    @torch.no_grad()
    def exact_loss(self, hidden_ND: torch.Tensor, target_N: torch.Tensor) -> float:
        """See `Model`."""
        return float(lsh_softmax(hidden_ND, self.head.weight, target_N, linear_bias=self.head.bias))


class AdaptiveModel:
    """With `torch.nn.AdaptiveLogSoftmaxWithLoss` (Grave et al., 2017): rare words in clusters of smaller width.

    A layer of another kind, with fewer parameters, exact for what it is. Its words must be numbered by frequency.

    Args:
        num_words: C.
        cutoffs: Where clusters of words begin.
        head_rate: Learning rate of the layer.
        learning_rate: Of the encoder.
    """

    def __init__(
        self, num_words: int, cutoffs: tuple[int, ...], head_rate: float, learning_rate: float
    ) -> None:
        self.encoder = Encoder(num_words, learning_rate)
        self.head = nn.AdaptiveLogSoftmaxWithLoss(WIDTH, num_words, list(cutoffs))
        self._optimizer = torch.optim.Adam(self.head.parameters(), lr=head_rate, fused=True)

    def step(self, context_NW: torch.Tensor, target_N: torch.Tensor) -> float:
        """See `Model`."""
        loss = self.head(self.encoder(context_NW), target_N).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.encoder.step()
        return float(loss.detach())

    @torch.no_grad()
    def exact_loss(self, hidden_ND: torch.Tensor, target_N: torch.Tensor) -> float:
        """See `Model`."""
        return float(self.head(hidden_ND, target_N).loss)
