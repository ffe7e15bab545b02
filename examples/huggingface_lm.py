"""Hugging Face's Trainer with a causal language model whose `lm_head` is an `LSHSoftmaxLoss`.

A small Llama with random weights learns to write Python from the standard library's source; its tokens are whole words
and signs. Training never makes the matrix of positions x vocabulary. Two runs: AdamW for all weights, and fused row
updates for the output layer. At the end, `LlamaForCausalLM` loads the checkpoint and generates.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.modeling_outputs import CausalLMOutput

from slidex.data import standard_library_directory
from slidex.nn import LSHSoftmaxLoss, SamplingOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

LENGTH, BATCH = 64, 8


class LlamaWithSampledLoss(LlamaForCausalLM):
    """A Llama whose forward returns the loss alone; its checkpoints are those of `LlamaForCausalLM`."""

    def __init__(self, config: LlamaConfig, options: SamplingOptions | None = None) -> None:
        super().__init__(config)
        self.lm_head = LSHSoftmaxLoss.from_linear(self.lm_head, options=options)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> CausalLMOutput:
        """Exact in eval mode. A label of -100 is no label, as everywhere in transformers."""
        hidden_NLD = self.model(input_ids).last_hidden_state
        return CausalLMOutput(loss=self.lm_head(hidden_NLD[:, :-1], labels[:, 1:]))


class FollowSchedule(TrainerCallback):
    """Gives the fused updates the learning rate that Trainer's schedule gives its optimizer."""

    def on_step_begin(self, *_: Any, model: LlamaWithSampledLoss, lr_scheduler: Any, **__: Any) -> None:
        """Called by Trainer before each step."""
        model.lm_head.learning_rate = lr_scheduler.get_last_lr()[0]


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains twice; returns what it prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vocabulary", type=int, default=30_000, help="number of tokens")
    parser.add_argument("--steps", type=int, default=500, help="training steps of each run")
    parser.add_argument("--files", type=int, default=300, help="source files to read")
    parser.add_argument("--pool-size", type=int, default=2048, help="negative tokens in a step")
    args = parser.parse_args(arguments)
    tokens, sequences = read_tokens(args.vocabulary, args.files)
    runs = {
        # Trainer clips gradients and has AdamW, neither of which takes sparse ones.
        "AdamW": SamplingOptions(pool_size=args.pool_size, sparse_grad=False),
        # Fused updates are no gradients: Trainer's clipping, accumulation and weight decay leave these rows alone.
        "fused": SamplingOptions(pool_size=args.pool_size, optimizer="adam"),
    }
    results = {}
    for name, options in runs.items():
        results[name], model = train(options, len(tokens), sequences, args.steps)
        shown = "  ".join(f"{key} {value:.3f}" for key, value in results[name].items())
        print(f"{name}: {shown}")
    print("\n" + complete(model, tokens, ["import", "os", "\n", "import"]))
    return results


def train(
    options: SamplingOptions, vocabulary: int, sequences: list[list[int]], steps: int
) -> tuple[dict[str, float], LlamaWithSampledLoss]:
    """Trains on all sequences but a tenth or 100; exact loss and accuracy on these."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaWithSampledLoss(config, options)
    held_out = min(len(sequences) // 10, 100)
    rows = [{"input_ids": row, "labels": row} for row in sequences]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=BATCH,
                learning_rate=5e-3,
                prediction_loss_only=True,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                dataloader_pin_memory=False,
                disable_tqdm=True,
                logging_strategy="no",
            ),
            train_dataset=rows[held_out:],
            eval_dataset=rows[:held_out],
            callbacks=[FollowSchedule()] if options.optimizer else [],
        )
        first = trainer.evaluate()["eval_loss"]
        trainer.train()
        last = trainer.evaluate()["eval_loss"]
    return {"first": first, "last": last, **accuracy(model, sequences[:held_out])}, model


def accuracy(model: LlamaWithSampledLoss, sequences: list[list[int]]) -> dict[str, float]:
    """How often the next token is the one the model expects most, and how often it is the most frequent one."""
    ids = torch.tensor(sequences)
    with torch.no_grad():
        best = model.lm_head.topk(model.model(ids).last_hidden_state[:, :-1], 1).ids[..., 0]
    truth = ids[:, 1:]
    frequent = truth.flatten().bincount().max().item() / truth.numel()
    return {"accuracy": (best == truth).float().mean().item(), "most frequent": frequent}


def complete(model: LlamaWithSampledLoss, tokens: list[str], words: list[str]) -> str:
    """Goes on from some words with the model as transformers knows it."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        plain = LlamaForCausalLM.from_pretrained(folder)
    start = torch.tensor([[tokens.index(word) if word in tokens else 0 for word in words]])
    written = plain.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    return " ".join(tokens[token] for token in written[0])


def read_tokens(vocabulary: int, files: int) -> tuple[list[str], list[list[int]]]:
    """The most frequent words and signs, an unknown one first, and all text as rows of their ids."""
    paths = sorted(standard_library_directory().glob("*.py"))[:files]
    texts = (re.sub(r"\n\s+", "\n", path.read_text(encoding="utf-8", errors="ignore")) for path in paths)
    words = [word for text in texts for word in re.findall(r"\w+|[^\w ]", text)]
    tokens = ["<unknown>", *(word for word, _ in Counter(words).most_common(vocabulary - 1))]
    ids = {word: i for i, word in enumerate(tokens)}
    stream = [ids.get(word, 0) for word in words]
    rows = [stream[i : i + LENGTH] for i in range(0, len(stream) - LENGTH, LENGTH)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return tokens, [rows[i] for i in order]


if __name__ == "__main__":
    main()
