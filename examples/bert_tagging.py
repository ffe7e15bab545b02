"""Raw text to tags with a BERT-like encoder, end to end and from random weights.

Documents are the docstrings of the standard library; the tags of each are the words of the name it belongs to and of
its module (``os.path.join`` has os, path and join). A tokenizer is trained on the texts, a small BERT encodes them, and
`LSHSoftmaxLoss` takes the tags as padded class ids.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from slidex.data import CsrArrays, standard_library_directory
from slidex.metrics import MetricAccumulator
from slidex.nn import LSHSoftmaxLoss, SamplingOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH, LENGTH, BATCH = 48, 32, 64
PAD = -1  # what LSHSoftmaxLoss takes for "no further tag"


class Tagger(nn.Module):
    """Token ids to tags: BERT, the mean over a text's tokens, and the output layer with its loss."""

    def __init__(self, num_tokens: int, num_tags: int, options: SamplingOptions) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=num_tokens,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=2 * WIDTH,
            max_position_embeddings=LENGTH,
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = LSHSoftmaxLoss(WIDTH, num_tags, options=options)

    def encode(self, texts: dict[str, torch.Tensor]) -> torch.Tensor:
        """Hidden vectors (N, D)."""
        mask_NL1 = texts["attention_mask"].unsqueeze(-1)
        hidden_NLD = self.bert(**texts).last_hidden_state
        return (hidden_NLD * mask_NL1).sum(1) / mask_NL1.sum(1).clamp(min=1)

    def forward(self, texts: dict[str, torch.Tensor], tags_NP: torch.Tensor) -> torch.Tensor:
        """The loss; exact in eval mode."""
        return self.head(self.encode(texts), tags_NP)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Trains, then ranks the tags of held-out documents; returns what it prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--documents", type=int, default=20_000, help="documents to read")
    parser.add_argument("--steps", type=int, default=1000, help="training steps")
    parser.add_argument("--pool-size", type=int, default=1024, help="negative tags in a step")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    documents = read_documents(args.documents)
    held_out = len(documents) // 10
    test, train = documents[:held_out], documents[held_out:]
    counts = Counter(tag for _, tags in train for tag in tags)
    names = sorted(tag for tag, count in counts.items() if count > 1)
    tag_ids = {name: i for i, name in enumerate(names)}
    tokenizer = train_tokenizer([text for text, _ in train])

    # Fused: the tags' rows are updated in backward; AdamW has the rest.
    options = SamplingOptions(pool_size=args.pool_size, optimizer="adam", learning_rate=1e-2)
    model = Tagger(len(tokenizer), len(names), options)
    optimizer = torch.optim.AdamW(model.bert.parameters(), lr=2e-3)
    probe = batch(train[:BATCH], tokenizer, tag_ids)
    result = {"tags": len(names), "first": exact_loss(model, probe)}
    order = torch.Generator().manual_seed(0)
    for _ in range(args.steps):
        chosen = torch.randint(len(train), (BATCH,), generator=order).tolist()
        optimizer.zero_grad()
        model(*batch([train[i] for i in chosen], tokenizer, tag_ids)).backward()
        optimizer.step()
    result["last"] = exact_loss(model, probe)

    class_counts = np.array([counts[name] for name in names])
    result |= evaluate(model, tokenizer, tag_ids, test, class_counts, len(train))
    print("  ".join(f"{name} {value:.3f}" for name, value in result.items()))
    texts, _ = batch(test[:3], tokenizer, tag_ids)
    with torch.no_grad():
        best_N5 = model.head.topk(model.encode(texts), 5).ids.tolist()
    for (text, tags), best_5 in zip(test, best_N5, strict=False):
        print(f"\n{text[:100]!r}\n  has {sorted(tags)}, gets {[names[tag] for tag in best_5]}")
    return result


def batch(
    documents: list[tuple[str, set[str]]], tokenizer: PreTrainedTokenizerFast, tag_ids: dict[str, int]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Token ids with their mask, and tags (N, P) padded with -1."""
    texts = tokenizer(
        [text for text, _ in documents], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    rows = [torch.tensor([tag_ids[tag] for tag in sorted(tags) if tag in tag_ids]) for _, tags in documents]
    tags_NP = nn.utils.rnn.pad_sequence([row.long() for row in rows], batch_first=True, padding_value=PAD)
    return dict(texts), tags_NP


def exact_loss(model: Tagger, probe: tuple[dict[str, torch.Tensor], torch.Tensor]) -> float:
    """The loss over all tags, without dropout."""
    model.eval()
    with torch.no_grad():
        loss = model(*probe).item()
    model.train()
    return loss


def evaluate(
    model: Tagger,
    tokenizer: PreTrainedTokenizerFast,
    tag_ids: dict[str, int],
    test: list[tuple[str, set[str]]],
    class_counts: np.ndarray,
    num_train: int,
) -> dict[str, float]:
    """P@k of the model, and of always saying the most frequent tags."""
    model.eval()
    ranked, frequent = (MetricAccumulator(class_counts, num_train, ks=(1, 3, 5)) for _ in range(2))
    most_5 = np.argsort(-class_counts, kind="stable")[:5]
    for first in range(0, len(test), BATCH):
        texts, tags_NP = batch(test[first : first + BATCH], tokenizer, tag_ids)
        truth = CsrArrays(
            np.concatenate([[0], (tags_NP != PAD).sum(1).cumsum(0).numpy()]),
            tags_NP[tags_NP != PAD].numpy().astype(np.int32),
            None,
            len(class_counts),
        )
        with torch.no_grad():
            best_N5 = model.head.topk(model.encode(texts), 5).ids
        ranked.update(best_N5.numpy(), truth)
        frequent.update(np.tile(most_5, (truth.num_rows, 1)), truth)
    found = ranked.compute()
    return {**{f"P@{k}": found[f"P@{k}"] for k in (1, 3, 5)}, "frequent P@1": frequent.compute()["P@1"]}


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Word pieces, learned from these texts."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=4000, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[0], unk_token=special[1])


def read_documents(most: int) -> list[tuple[str, set[str]]]:
    """Docstrings of the standard library with their tags, in a fixed random order."""
    root = standard_library_directory()
    documents = []
    for path in sorted(root.rglob("*.py")):
        where = path.relative_to(root).with_suffix("").parts
        if {"site-packages", "test", "tests", "lib2to3"} & set(where):
            continue
        if len(documents) >= most:
            break
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", "_".join([*where, node.name]))
                documents.append((text, {word.lower() for word in words}))
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    return [documents[i] for i in order[:most]]


if __name__ == "__main__":
    main()
