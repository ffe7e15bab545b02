"""Roofline of a training step: what every stage must move and do, the least time for it here, and the time it takes.

A real `Trainer` trains on a real set; the functions that a step calls are timed from outside, each without those
inside it, so the stages add up to the step. Milliseconds are medians over the steps, those of the rehash its sum over
the steps divided by their number (the index is built in the warm-up; later in a run the gaps grow, and it costs less).
`benchmarks.roofline` has the formulas, and `benchmarks.ceilings` measures the rates in this process with its threads:
"floor" has scattered rows at the bandwidth of scattered rows, "stream" all bytes at that of long runs. "faults" are
pages of memory that the system had to hand out. Batches are read beside the step: "data" is the wait for them. With
``--clock cpu`` all times, those behind the rates too, are CPU seconds of the training thread, which other work on the
machine disturbs less; that needs ``--threads 1``. Run it as ``python -m benchmarks.stages``.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import click
import numba
import numpy as np
import torch

from benchmarks.ceilings import measure_ceilings
from benchmarks.datasets import SHARED as RAW
from benchmarks.datasets import load
from benchmarks.report import machine, print_row, write_results
from benchmarks.roofline import MODES, SHARED, Batch, Ceilings, in_words, stages_of
from slidex.kernels import cpu
from slidex.kernels.cpu import embedding, pairs
from slidex.lsh.hash_index import HashIndex
from slidex.nn import products
from slidex.threads import set_threads
from slidex.train.config import TrainConfig
from slidex.train.loop import Trainer
from slidex.train.settle import settle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from slidex.data import Dataset
    from slidex.data.csr import CsrArrays

WARM_UP = 5
"""Steps before the first that counts; the first of all compiles the kernels and builds the index."""
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}
COLUMNS = ("MB", "MFLOP", "stream ms", "floor ms", "ms", "ms / floor", "share %", "faults")


class Clock:
    """Seconds and page faults by stage: a stage inside another stops the outer one's clock.

    Args:
        timer: Seconds.
    """

    def __init__(self, timer: Callable[[], float]) -> None:
        self._timer, self._stack = timer, ["idle"]
        self._last, self._faults = timer(), _page_faults()
        self.kept: dict[str, Any] = {}
        self.spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def _book(self) -> None:
        now, faults = self._timer(), _page_faults()
        spent = self.spent[self._stack[-1]]
        spent[0] += now - self._last
        spent[1] += faults - self._faults
        self._last, self._faults = now, faults

    @contextmanager
    def running(self, stage: str) -> Iterator[None]:
        """Books what happens inside on `stage`."""
        self._book()
        self._stack.append(stage)
        try:
            yield
        finally:
            self._book()
            self._stack.pop()

    def wrap(self, stage: str, function: Callable, keep: Callable | None = None) -> Callable:
        """`function`, timed as `stage`; `kept` gets what `keep` makes of its result, by the function's name."""

        def timed(*arguments: Any, **named: Any) -> Any:
            with self.running(stage):
                result = function(*arguments, **named)
            if keep is not None:
                self.kept[function.__name__] = keep(result)
            return result

        return timed

    def take(self) -> tuple[dict[str, list[float]], dict[str, Any]]:
        """What was booked and kept since the last call."""
        self._book()
        taken = dict(self.spent), self.kept
        self.spent.clear()
        self.kept = {}
        return taken


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@contextmanager
def timed(trainer: Trainer, clock: Clock) -> Iterator[None]:
    """Within, the stages of the trainer's steps are booked on the clock.

    Raises:
        AttributeError: if a function that is a stage has another name now.
    """
    model, optimizer = trainer.model, trainer.dense_optimizer
    head, encoder, index, selector = model.head, model.encoder, model.index, model.head.selector
    assert isinstance(index, HashIndex)
    assert selector is not None
    stages: list[tuple[object, str, str, Callable | None]] = [
        (trainer.rehasher, "rehash_if_due", "rehash", lambda done: done),
        (trainer.record, "note", "class record", None),
        (encoder, "forward_train", "encoder layers", None),
        (encoder, "backward", "encoder backward", None),
        (optimizer, "step", "dense update", None),
        (optimizer, "zero_grad", "dense update", None),
        (cpu, "embedding_bag", "bag sum", None),
        (cpu, "embedding_bag_update", "bag update", None),
        (embedding, "group_by_id", "bag grouping", None),
        (head, "score", "score passes", lambda scored: scored.ids),
        (head, "update", "gradient passes", None),
        (products, "class_scores", "score product", None),
        (products, "hidden_gradient", "gradient products", None),
        (products, "rows_gradient", "gradient products", None),
        (selector, "pool" if head.mode == SHARED else "active_sets", "selection", None),
        (selector.sampler, "sample", "random draw", len),
        (index.family, "hash_queries", "hashing", lambda codes_NLV: codes_NLV),
        (index.tables, "pool", "voting", len),
        (index.tables, "query", "voting", lambda ids_NK: int((ids_NK >= 0).sum())),
        (cpu, "gather_rows", "gather", None),
        (cpu, "shared_softmax_loss", "softmax", None),
        (cpu, "rows_update", "row update", None),
        (cpu, "pair_logits", "score product", None),
        (cpu, "softmax_loss", "softmax", None),
        (cpu, "pair_hidden_grad", "gradient products", None),
        (cpu, "pair_update", "row update", None),
        (pairs, "group_by_id", "pair grouping", None),
    ]
    with ExitStack() as patches:
        for owner, name, stage, keep in stages:
            wrapped = clock.wrap(stage, getattr(owner, name), keep)
            patches.enter_context(patch.object(owner, name, wrapped))
        yield


def sizes(trainer: Trainer, x: CsrArrays, y: CsrArrays, kept: dict[str, Any]) -> Batch:
    """What a step had to do, from its batch and what the clock kept of it."""
    head, encoder, index = trainer.model.head, trainer.model.encoder, trainer.model.index
    assert isinstance(index, HashIndex)
    ids, rehash = kept["score"].numpy(), kept.get("rehash_if_due")
    codes_NLV = kept["hash_queries"]
    loads_LB = np.diff(index.tables.offsets, axis=1)
    codes = [np.unique(codes_NLV[:, t]) if ids.ndim == 1 else codes_NLV[:, t] for t in range(len(loads_LB))]
    distinct = ids if ids.ndim == 1 else np.unique(ids[ids >= 0])
    return Batch(
        rows=x.num_rows,
        features=x.nnz,
        feature_bytes=4 if x.values is None else 8,
        distinct_features=len(np.unique(x.indices)),
        labels=y.nnz,
        bag_width=encoder.bag.shape[1],
        width=head.in_features,
        dense=sum(p.numel() for p in encoder.parameters() if p.requires_grad),
        retrieved=kept.get("pool", kept.get("query", 0)),
        random=kept["sample"],
        slots=0 if ids.ndim == 1 else ids.shape[1],
        pairs=0 if ids.ndim == 1 else int((ids >= 0).sum()),
        classes=len(distinct),
        bits=index.family.bits * index.family.tables,
        tables=index.family.tables,
        entries=int(sum(loads_LB[t, codes[t]].sum() for t in range(len(loads_LB)))),
        code_bytes=index.tables.codes.itemsize,
        all_classes=head.num_classes,
        rehashed=rehash.rows if rehash is not None else 0,
        class_bytes=_row_bytes(head.weight, *head.weight_state) + _row_bytes(head.bias, *head.bias_state),
        bag_bytes=_row_bytes(encoder.bag, *encoder.bag_state),
    )


def _row_bytes(parameter: torch.Tensor, *state: torch.Tensor) -> float:
    """Bytes of a row of a parameter and of the states that its optimiser keeps."""
    return (parameter.nbytes + sum(tensor.nbytes for tensor in state)) / len(parameter)


def table(
    mode: str, batches: list[Batch], spent: list[dict[str, list[float]]], ceilings: Ceilings
) -> list[dict[str, Any]]:
    """The lines of the table, one for each stage.

    Args:
        mode: One of `MODES`.
        batches: Sizes of the steps.
        spent: Seconds and page faults of every stage of the same steps.
        ceilings: Of this machine.
    """
    lines: list[dict[str, Any]] = []
    for stage in stages_of(mode).values():
        typical = statistics.mean if stage.amortised else statistics.median
        works = [stage.work(batch) for batch in batches]
        seconds = [step[stage.name] for step in spent]
        floor = typical([ceilings.floor(work) for work in works])
        taken = typical([wall for wall, _ in seconds])
        lines.append(
            {
                "stage": stage.name,
                "MB": typical([work.bytes for work in works]) / 1e6,
                "MFLOP": typical([work.flops for work in works]) / 1e6,
                "stream ms": 1e3 * typical([ceilings.stream_floor(work) for work in works]),
                "floor ms": 1e3 * floor,
                "ms": 1e3 * taken,
                "ms / floor": taken / floor if floor else None,
                "faults": typical([faults for _, faults in seconds]),
            }
        )
    step = sum(line["ms"] for line in lines)
    totals = {
        key: sum(line[key] for line in lines) for key in ("MB", "MFLOP", "stream ms", "floor ms", "faults")
    }
    lines.append({"stage": "step", **totals, "ms": step, "ms / floor": step / totals["floor ms"]})
    return [{**line, "share %": 100 * line["ms"] / step} for line in lines]


def observe(
    trainer: Trainer, steps: int, timer: Callable[[], float]
) -> tuple[list[Batch], list[dict[str, list[float]]]]:
    """Trains; returns the sizes of the last `steps` steps, and the seconds and page faults of their stages.

    Args:
        trainer: Not yet trained, with a sampled mode, softmax and an index of hash tables.
        steps: How many count; `WARM_UP` more come first.
        timer: Seconds, wall-clock or CPU.
    """
    trainer.total_steps = steps + WARM_UP
    head, index = trainer.model.head, trainer.model.index
    assert index is not None
    clock, batches, spent = Clock(timer), [], []
    with timed(trainer, clock):
        source = trainer.batches()
        fetch = clock.wrap("data", lambda: next(source, None))
        while (batch := fetch()) is not None:
            x, y = batch
            with clock.running("other"):
                trainer.train_step(x, y)
            seconds, kept = clock.take()
            if trainer.step == WARM_UP:
                index.update(head.weight, head.bias, torch.tensor([0]))  # compiles, so that no rehash has to
            elif trainer.step > WARM_UP:
                batches.append(sizes(trainer, x, y, kept))
                spent.append(seconds)
            clock.take()  # what counting took is nobody's
    return batches, spent


def measure(dataset: Dataset, config: TrainConfig, steps: int, timer: Callable[[], float]) -> dict[str, Any]:
    """The sizes of a typical step, this machine's rates at them, and the table."""
    trainer = Trainer(dataset, settle(config, dataset), lambda *_: None)
    batches, spent = observe(trainer, steps, timer)
    head = trainer.model.head
    dtype = torch.bfloat16 if head.scorer.precision == "bfloat16" and head.mode == SHARED else torch.float32
    typical = batches[len(batches) // 2]
    ceilings, scattered = measure_ceilings(typical, head.num_classes, dtype, timer)
    return {
        "mode": head.mode,
        "steps": steps,
        "settings": trainer.config.to_mapping(),
        "batch": asdict(typical),
        "ceilings": asdict(ceilings),
        "scattered": scattered,
        "table": table(head.mode, batches, spent, ceilings),
    }


@click.command(help=__doc__)
@click.option("--set", "name", default="deb-files-283k", show_default=True)
@click.option("--modes", default=",".join(MODES), show_default=True)
@click.option("--batch", default=256, show_default=True, help="Rows in a step.")
@click.option("--steps", default=100, show_default=True, help="Steps that count.")
@click.option("--optimizer", help="Rule of the row updates; default: that of the settings.")
@click.option("--threads", type=int, help="Default: all cores.")
@click.option("--clock", type=click.Choice(list(CLOCKS)), default="wall", show_default=True)
@click.option("--data", type=click.Path(path_type=Path), default=RAW, help="Directory of the raw sets.")
def main(
    name: str,
    modes: str,
    batch: int,
    steps: int,
    optimizer: str | None,
    threads: int | None,
    clock: str,
    data: Path,
) -> None:
    """Print the tables and write them as JSON."""
    if clock == "cpu" and threads != 1:
        raise click.UsageError("--clock cpu times one thread: it needs --threads 1.")
    if unknown := set(modes.split(",")) - set(MODES):
        raise click.UsageError(
            f"--modes are {' and '.join(MODES)}. Got {', '.join(sorted(unknown))} instead."
        )
    set_threads(threads)
    facts = machine()
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    dataset = load(name, data)
    results: list[dict[str, Any]] = []
    for mode in modes.split(","):
        settings = {"mode": mode, "batch_size": batch, "epochs": 1000, "threads": threads}
        config = TrainConfig.from_mapping(settings | ({"optimizer": optimizer} if optimizer else {}))
        result: dict[str, Any] = {
            "set": name,
            "clock": clock,
            **measure(dataset, config, steps, CLOCKS[clock]),
        }
        if clock == "cpu" and numba.threading_layer() == "workqueue":
            raise click.ClickException("Numba's workqueue leaves the training thread idle: use --clock wall.")
        results.append(result)
        print(", ".join(f"{key} {value:,g}" for key, value in result["batch"].items()))
        print(in_words(Ceilings(**result["ceilings"])))
        for owner, rates in result["scattered"].items():
            print(
                f"{owner}'s table: "
                + ", ".join(f"{key} {rate / 1e9:.1f}" for key, rate in rates.items())
                + " GB/s"
            )
        print_row(f"{name}, {mode}, {clock} time", COLUMNS)
        for line in result["table"]:
            print_row(line["stage"], ["-" if line[key] is None else f"{line[key]:.3g}" for key in COLUMNS])
    write_results("stages", facts, results)


if __name__ == "__main__":
    main()
