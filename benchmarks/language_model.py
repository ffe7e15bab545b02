"""Next-word prediction on text8 with all 253,854 words as classes: sampled words against all words.

All sides have the same small encoder (`benchmarks.language_heads`), the same initial weights and the same batches of
256 random places of the training part. They take laps by turns in one process: the dense softmax some steps, then each
other as many seconds as those took. Perplexity is computed with all words, on the same random places of the test part,
and its time not counted. Run it as ``python -m benchmarks.language_model``.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from torch import nn

from benchmarks.datasets import SHARED
from benchmarks.language_heads import (
    CONTEXT,
    AdaptiveModel,
    DenseModel,
    SampledModel,
    first_layer,
)
from benchmarks.report import Comparison, machine, print_row, write_results
from benchmarks.text8 import load_text8, random_windows
from slidex.doctor import has_native_bf16
from slidex.nn import LSHSoftmaxLoss, SamplingOptions
from slidex.threads import set_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from benchmarks.language_heads import Model
    from benchmarks.text8 import Text

    Clock = Callable[[], float]
    Sample = tuple[torch.Tensor, torch.Tensor]

BATCH = 256
ENCODER_RATE, HEAD_RATE = 3e-3, 6e-3
TEST_SEED, ESTIMATE_SEED = 1, 2
"""Of the places that are tested, and of those on which losses are compared; runs draw with seed 0."""
SAMPLED: dict[str, dict[str, Any]] = {
    "simhash": {},
    "random": {"index": "none"},
    "simhash by frequency": {"random_power": 0.75},
    "random by frequency": {"index": "none", "random_power": 0.75},
}
"""Sampling options of each line, over the defaults: shared pool, 4,096 negatives, correction stratified."""
ADAPTIVE_CUTOFFS = (2_000, 20_000)
DENSE, ADAPTIVE = "torch dense", "torch adaptive"


@dataclass(frozen=True, slots=True)
class Race:
    """How long: laps, the dense softmax's steps in each, rows and laps of measuring, and who runs against it."""

    laps: int = 5
    measure_every: int = 2
    dense_steps: int = 60
    test_rows: int = 4096
    lines: tuple[str, ...] = (*SAMPLED, ADAPTIVE)


LONG = Race()
SHORT = Race(laps=5, dense_steps=12, lines=("simhash", "random by frequency"))
SHORTEST = Race(laps=2, dense_steps=5, test_rows=1024, lines=("simhash",))


@dataclass(frozen=True, slots=True)
class Point:
    """What had been reached after so many steps and seconds of training."""

    step: int
    seconds: float
    perplexity: float


@dataclass(slots=True)
class Run:
    """A model while it trains on random windows of a text.

    Args:
        model: What trains.
        words: int32, the training part.
        clock: Gives seconds.

    Attributes:
        step: Steps so far; with the seed it fixes the batches, so that all runs take the same.
        seconds: Time of training so far.
        laps: Milliseconds a step, of each lap.
        curve: Measurements.
    """

    model: Model
    words: np.ndarray
    clock: Clock = time.perf_counter
    step: int = 0
    seconds: float = 0.0
    laps: list[float] = field(default_factory=list)
    curve: list[Point] = field(default_factory=list)

    def train(self, *, steps: float = math.inf, seconds: float = math.inf) -> None:
        """Trains for so many steps or seconds, whichever is over first."""
        first, start, passed = self.step, self.clock(), 0.0
        while self.step - first < steps and passed < seconds:
            self.model.step(*random_windows(self.words, BATCH, CONTEXT, seed=0, step=self.step))
            self.step += 1
            passed = self.clock() - start
        self.seconds += passed

    def measure(self, sample: Sample) -> None:
        """Adds a point to the curve, unless it is there already."""
        if not self.curve or self.curve[-1].step < self.step:
            self.curve.append(Point(self.step, self.seconds, perplexity(self.model, *sample)))


@torch.no_grad()
def perplexity(model: Model, context_NW: torch.Tensor, target_N: torch.Tensor) -> float:
    """The exponential of the mean loss with all words scored; that of a guess among k equally likely words is k."""
    return math.exp(model.exact_loss(model.encoder(context_NW), target_N))


def seconds_to(curve: list[Point], target: float) -> float:
    """Seconds at which the perplexity first falls to `target`, along straight lines; infinity if it never does."""
    for i, point in enumerate(curve):
        if point.perplexity <= target:
            if i == 0:
                return point.seconds
            last = curve[i - 1]
            share = (last.perplexity - target) / (last.perplexity - point.perplexity)
            return last.seconds + share * (point.seconds - last.seconds)
    return math.inf


def after_steps(curve: list[Point], step: int) -> float:
    """The perplexity measured after exactly `step` steps; NaN if none was."""
    return next((point.perplexity for point in curve if point.step == step), math.nan)


def make_model(name: str, start: nn.Linear, counts: np.ndarray) -> Model:
    """The model of a line of the table."""
    if name == DENSE:
        precision = "bfloat16" if has_native_bf16() is True else "float32"
        return DenseModel(start, BATCH, precision, HEAD_RATE, ENCODER_RATE)
    if name == ADAPTIVE:
        return AdaptiveModel(start.out_features, ADAPTIVE_CUTOFFS, HEAD_RATE, ENCODER_RATE)
    options = SamplingOptions(optimizer="adam", learning_rate=HEAD_RATE, class_counts=counts, **SAMPLED[name])
    return SampledModel(start, options, ENCODER_RATE)


def run_race(
    text: Text, race: Race, notify: Callable[[str], None], clock: Clock = time.perf_counter
) -> dict[str, Run]:
    """Trains all of them by turns; the dense softmax is the first."""
    start, steps = first_layer(text.counts), race.laps * race.dense_steps
    sample = random_windows(text.test, race.test_rows, CONTEXT, seed=TEST_SEED, step=0)
    runs = {}
    for name in (DENSE, *race.lines):
        Run(make_model(name, start, text.counts), text.train).train(steps=2)  # compiles, warms up
        runs[name] = Run(make_model(name, start, text.counts), text.train, clock)
        if name in SAMPLED:  # starts with the same weights as the dense softmax
            runs[name].curve += runs[DENSE].curve
        else:
            runs[name].measure(sample)
    for lap in range(race.laps):
        for name, run in runs.items():
            before = run.step, run.seconds
            if name == DENSE:
                run.train(steps=race.dense_steps)
            else:
                catch_up(run, runs[DENSE].seconds, steps, sample)
            run.laps.append(1e3 * (run.seconds - before[1]) / (run.step - before[0]))
            if (race.laps - lap - 1) % race.measure_every == 0:
                run.measure(sample)
            last = run.curve[-1]
            notify(
                f"lap {lap + 1}, {name}: {run.step:,} steps, {run.seconds:.1f} s, {run.laps[-1]:.1f} ms a step; "
                f"perplexity {last.perplexity:.1f} after {last.step:,} steps"
            )
    return runs


def catch_up(run: Run, seconds: float, steps: int, sample: Sample) -> None:
    """Trains until a run has had `seconds` in all; when it comes by so many `steps`, it is measured there too."""
    if run.step < steps:
        run.train(steps=steps - run.step, seconds=seconds - run.seconds)
        if run.step == steps:
            run.measure(sample)
    run.train(seconds=seconds - run.seconds)


def estimates(model: SampledModel, text: Text, batches: int = 10) -> list[dict[str, Any]]:
    """Loss of training batches by each way of sampling, without and with correction, beside their exact loss.

    Args:
        model: Whose weights score; they stay as they are.
        text: Batches are drawn from its training part.
        batches: Of 256 rows.
    """
    head = model.head
    layer = nn.Linear(head.in_features, head.num_classes, device="meta")
    layer.weight, layer.bias = head.weight, head.bias
    samples, exact = [], []
    for i in range(batches):
        context_NW, target_N = random_windows(text.train, BATCH, CONTEXT, seed=ESTIMATE_SEED, step=i)
        with torch.no_grad():
            samples.append((model.encoder(context_NW), target_N))
        exact.append(model.exact_loss(*samples[-1]))
    results = []
    for name, settings in SAMPLED.items():
        for correction in ("none", "stratified", "logq"):
            options = SamplingOptions(correction=correction, class_counts=text.counts, **settings)
            sampled = LSHSoftmaxLoss.from_linear(layer, options=options)
            with torch.no_grad():
                off = np.array([float(sampled(*sample)) for sample in samples]) - exact
            results.append(
                {
                    "line": name,
                    "correction": correction,
                    "exact loss": statistics.fmean(exact),
                    "sampled loss": statistics.fmean(exact) + float(off.mean()),
                    "difference": float(off.mean()),
                    "standard error": float(off.std(ddof=1)) / math.sqrt(batches),
                }
            )
    return results


def table_lines(text: Text, runs: Mapping[str, Run]) -> list[Comparison]:
    """What ``make bench`` shows: time of a step, time to what dense ends with, and perplexity after equal time."""
    dense, found = runs[DENSE], []
    reached = dense.curve[-1].perplexity
    for name, run in runs.items():
        if name not in SAMPLED:
            continue
        what = f"text8, C = {text.num_classes:,}, shared, {name}"
        same_steps = f"perplexity {after_steps(run.curve, dense.step):.0f} after as many steps"
        found += [
            Comparison(f"step, {what}", DENSE, "ms", run.laps, dense.laps),
            Comparison(
                f"seconds to perplexity {reached:.0f}, {what}",
                f"{DENSE}, {dense.step:,} steps",
                "s",
                [seconds_to(run.curve, reached)],
                [dense.seconds],
                same_steps,
            ),
            Comparison(
                f"perplexity after {dense.seconds:.0f} s, {what}",
                f"{DENSE}, {dense.step:,} steps",
                "",
                [run.curve[-1].perplexity],
                [reached],
                f"{run.step:,} steps",
            ),
        ]
    return found


def compare(data: Path, race: Race = SHORT) -> list[Comparison]:
    """A part of ``make bench``: fit for a process of its own."""
    text = load_text8(data)
    return table_lines(text, run_race(text, race, lambda line: click.echo(f"  {line}", err=True)))


def summary(name: str, run: Run, steps: int) -> dict[str, Any]:
    """A line of this benchmark's own table, for the JSON file."""
    return {
        "line": name,
        "ms a step": run.laps,
        "steps": run.step,
        "seconds": run.seconds,
        "perplexity after as many steps as dense": after_steps(run.curve, steps),
        "perplexity": run.curve[-1].perplexity,
        "curve": [(point.step, point.seconds, point.perplexity) for point in run.curve],
    }


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path), default=SHARED, help="Directory of the raw sets.")
@click.option("--laps", default=LONG.laps, show_default=True)
@click.option(
    "--dense-steps", default=LONG.dense_steps, show_default=True, help="Of the dense softmax, a lap."
)
@click.option("--measure-every", default=LONG.measure_every, show_default=True, help="Laps, up to the last.")
@click.option("--lines", default=",".join(LONG.lines), show_default=True, help="Who runs against it.")
@click.option("--threads", type=int, help="Default: all cores.")
@click.option("--cpu", is_flag=True, help="Count CPU seconds: for --threads 1 on cores that others use too.")
def main(
    data: Path, laps: int, dense_steps: int, measure_every: int, lines: str, threads: int | None, cpu: bool
) -> None:
    """Print the tables and write them as JSON."""
    set_threads(threads)
    facts, text = {**machine(), "seconds": "CPU" if cpu else "wall clock"}, load_text8(data)
    click.echo(", ".join(f"{name} {value}" for name, value in facts.items()))
    runs = run_race(
        text,
        Race(laps, measure_every, dense_steps, lines=tuple(lines.split(","))),
        lambda line: click.echo(f"  {line}", err=True),
        time.process_time if cpu else time.perf_counter,
    )
    steps, seconds = runs[DENSE].step, runs[DENSE].seconds
    results = [summary(name, run, steps) for name, run in runs.items()]
    print_row("", ("ms a step", "from", "to", "steps", f"at {steps}", f"at {seconds:.0f} s"))
    for line in results:
        times, after = line["ms a step"], line["perplexity after as many steps as dense"]
        cells = (statistics.median(times), min(times), max(times), line["steps"], after, line["perplexity"])
        print_row(line["line"], [f"{cell:,.5g}" for cell in cells])
    print_row("loss by sampling", ("correction", "exact", "sampled", "difference", "s.e."))
    scoring = next(run.model for run in runs.values() if isinstance(run.model, SampledModel))
    for line in estimates(scoring, text):
        cells = [f"{line[key]:.3f}" for key in ("exact loss", "sampled loss", "difference", "standard error")]
        print_row(line["line"], (line["correction"], *cells))
        results.append(line)
    write_results("language_model", facts, results)


if __name__ == "__main__":
    main()
