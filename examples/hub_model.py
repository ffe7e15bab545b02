"""`save_pretrained` and `from_pretrained` for a model with an `LSHSoftmaxLoss`, through huggingface_hub's mixin.

The weights go to ``model.safetensors`` and the constructor's arguments to ``config.json``. The index is in neither: it
is built from the weights when training goes on or indexed prediction asks for it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import safe_open
from torch import nn

from slidex.nn import LSHSoftmaxLoss, SamplingOptions, TopK

if TYPE_CHECKING:
    from collections.abc import Sequence


class Tagger(nn.Module, PyTorchModelHubMixin):
    """A bag of words to tags. Plain arguments, so that the mixin can write them as JSON."""

    def __init__(self, num_words: int, num_tags: int, width: int, sampling: dict[str, Any]) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(num_words, width)
        self.head = LSHSoftmaxLoss(width, num_tags, bias=True, options=SamplingOptions(**sampling))

    def forward(self, words_NM: torch.Tensor, tags_NP: torch.Tensor) -> torch.Tensor:
        """The loss of padded tags."""
        return self.head(self.words(words_NM), tags_NP)

    def topk(self, words_NM: torch.Tensor, k: int, *, indexed: bool = False) -> TopK:
        """The k best tags of each row."""
        return self.head.topk(self.words(words_NM), k, indexed=indexed)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains a little, saves, loads, compares; returns what it prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tags", type=int, default=10_000, help="number of tags")
    parser.add_argument("--steps", type=int, default=500, help="training steps")
    parser.add_argument("--folder", type=Path, help="where to save; a temporary folder otherwise")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    sampling = {"pool_size": 256, "optimizer": "adam", "learning_rate": 0.01}
    model = Tagger(num_words=args.tags, num_tags=args.tags, width=32, sampling=sampling)
    optimizer = torch.optim.Adagrad(model.words.parameters(), lr=0.5)
    losses = []
    for _ in range(args.steps):
        words_N3 = random_words(256, args.tags)
        loss = model(words_N3, words_N3[:, :2])  # a row's tags are two of its words
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        model.save_pretrained(folder)
        loaded = Tagger.from_pretrained(folder)
        with safe_open(folder / "model.safetensors", "pt") as file:
            stored = sorted(file.keys())
    words_N3 = random_words(64, args.tags)
    before, after = model.topk(words_N3, 5), loaded.topk(words_N3, 5)
    result = {
        "first": losses[0],
        "last": losses[-1],
        "stored": stored,
        "same ids": torch.equal(before.ids, after.ids),
        "same scores": torch.equal(before.scores, after.scores),
        "found by the index": recall(loaded.topk(words_N3, 5, indexed=True).ids, after.ids),
    }
    for name, value in result.items():
        print(f"{name}: {value}")
    return result


def random_words(count: int, num_words: int) -> torch.Tensor:
    """Three different words for each row (N, 3)."""
    return (torch.randint(num_words, (count, 1)) + torch.tensor([0, 7, 11])) % num_words


def recall(found_NK: torch.Tensor, true_NK: torch.Tensor) -> float:
    """Share of the true ids that were found."""
    return (true_NK[:, :, None] == found_NK[:, None, :]).any(2).float().mean().item()


if __name__ == "__main__":
    main()
