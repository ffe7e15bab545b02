"""The output layer on a GPU: `slidex.nn.LSHSoftmaxLoss` against a dense softmax, a chunked one, and a sampled one.

``python -m benchmarks.gpu`` on a machine with a GPU, a torch built for it and ``slidex[cuda]``; `make gpu-check` runs
a part. A step is loss, gradients and update of the layer, and the gradient of what comes before it, on random hidden
vectors and classes of frequency 1 / rank. Ways are measured one after the other, each alone in memory, so that peaks
are its own; times are those of CUDA events, the median of repeats. What does not fit is said, not left out. Before that
comes the share of a device copy's rate that each kernel makes. All weights are bfloat16: slidex's updates of them are
rounded stochastically, those of torch's optimisers to nearest.
Letters: N rows in a batch, C classes, D hidden width.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import torch

from benchmarks import gpu_kernels, gpu_rivals
from benchmarks.report import machine, markdown, write_results
from slidex.errors import DeviceError, SlidexError
from slidex.kernels.cuda import environment
from slidex.nn import LSHSoftmaxLoss, SamplingOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from benchmarks.gpu_rivals import Step

WARM_UP, STEPS, REPEATS = 3, 10, 5
HOST_STEPS = 3
"""Few enough that the queue of a GPU does not fill up, which would make the host wait."""
BATCHES = 8
POOL, ACTIVE = 4096, 512
FULL_STATE = 3_000_000 * 768
"""Up to so many weights slidex keeps Adam's state in float32, beyond row-wise Adagrad's."""
ADAGRAD_RATE = 0.01
HEADINGS = ("C", "D", "N", "way", "step, ms", "peak, GB", "times as fast as dense", "of its memory", "")

GOAL_ROWS = 256
GOALS: dict[tuple[int, int], tuple[int | None, float | None]] = {
    (1_000_000, 768): (5, None),
    (10_000_000, 768): (30, 1 / 3),
    (30_000_000, 768): (None, None),
}
"""By C and D: times as fast as the dense softmax, in what share of its memory; None where it is to train at all."""


class Case(NamedTuple):
    """A size of layer and batch: C, D and N."""

    classes: int
    width: int
    rows: int


CASES = sorted(
    (
        Case(classes, width, rows)
        for width, classes, rows in itertools.product(
            (768, 128), (1_000_000, 10_000_000, 30_000_000, 131_072, 3_000_000), (256, 2048)
        )
    ),
    key=lambda case: (case.classes, case.width) not in GOALS or case.rows != GOAL_ROWS,
)
"""Those that the goals are about come first, also where there is time for few."""


class Result(NamedTuple):
    """What one way needs for a step.

    Args:
        case: Of what size.
        way: Its name.
        milliseconds: The median; None where it does not fit.
        peak_bytes: Of memory, layer included.
        note: What else belongs to it.
        losses: Means over the first batches and, after all steps, over the same ones again, where it fits.
    """

    case: Case
    way: str
    milliseconds: float | None
    peak_bytes: int
    note: str
    losses: tuple[float, float] | None = None

    @property
    def learns(self) -> bool:
        """Whether the loss fell."""
        return self.losses is not None and self.losses[1] < self.losses[0]


class Clock:
    """Times calls on a device.

    Args:
        device: A GPU; on a CPU it takes the host's time, for tests.
        steps: Calls that are timed together.
        repeats: How often; the median counts.
    """

    def __init__(self, device: torch.device, steps: int = STEPS, repeats: int = REPEATS) -> None:
        self._device, self._steps, self._repeats = device, steps, repeats

    def seconds(self, call: Callable[[], Any]) -> float:
        """Of one call, after some that are not counted."""
        for _ in range(WARM_UP):
            call()
        return statistics.median(self._once(call) for _ in range(self._repeats)) / self._steps

    def host_seconds(self, call: Callable[[], Any]) -> float:
        """Of one call, the time until the host has enqueued its work; on a CPU that of the work."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        started = time.perf_counter()
        for _ in range(HOST_STEPS):
            call()
        return (time.perf_counter() - started) / HOST_STEPS

    def _once(self, call: Callable[[], Any]) -> float:
        if self._device.type != "cuda":
            started = time.perf_counter()
            for _ in range(self._steps):
                call()
            return time.perf_counter() - started
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(self._steps):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def batches(case: Case, device: torch.device, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Hidden vectors (N, D) after a ReLU, and class ids (N,) of frequency 1 / rank, of some batches."""
    generator = torch.Generator().manual_seed(1)
    drawn = []
    for _ in range(BATCHES):
        hidden_ND = torch.randn(case.rows, case.width, generator=generator).relu_()
        ranks_N = (torch.rand(case.rows, generator=generator) * torch.tensor(float(case.classes)).log()).exp()
        target_N = ranks_N.long().clamp(max=case.classes) - 1
        drawn.append((hidden_ND.to(device, dtype), target_N.to(device)))
    return drawn


def ways(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Step]]:
    """What is compared, by name; each makes its layer when it is called."""

    def rival(make: Callable[..., Step], *arguments: Any) -> Callable[[], Step]:
        return lambda: make(gpu_rivals.layer(case.classes, case.width, device, dtype), *arguments)

    torchs = (
        "torch's linear_cross_entropy" if hasattr(torch.nn.functional, "linear_cross_entropy") else "chunked"
    )
    return {
        "dense": rival(gpu_rivals.dense),
        torchs: rival(gpu_rivals.chunked),
        "sampled softmax in torch": rival(gpu_rivals.sampled, POOL),
        "slidex, shared": lambda: slidex_step(case, device, dtype, mode="shared", pool_size=POOL),
        "slidex, per_sample": lambda: slidex_step(case, device, dtype, mode="per_sample", active_size=ACTIVE),
    }


def slidex_options(case: Case, **options: Any) -> SamplingOptions:
    """Of the head: Adam's state where there is room for it, else one number a row."""
    rule: dict[str, Any] = {"optimizer": "adam"}
    if case.classes * case.width > FULL_STATE:
        rule = {"optimizer": "rowwise_adagrad", "learning_rate": ADAGRAD_RATE}
    return SamplingOptions(rehash="fixed", rehash_every=1_000_000, **rule, **options)


def slidex_step(case: Case, device: torch.device, dtype: torch.dtype, **options: Any) -> Step:
    """A fused step; the head is its attribute `head`."""
    chosen = slidex_options(case, **options)
    head = LSHSoftmaxLoss(case.width, case.classes, device=device, dtype=dtype, options=chosen)

    def step(hidden_ND: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        loss = head(hidden_ND, target_N)
        loss.backward()
        return loss.detach()

    step.head = head  # pyrefly: ignore[missing-attribute]
    return step


def measure(
    case: Case, way: str, make: Callable[[], Step], device: torch.device, dtype: torch.dtype, clock: Clock
) -> Result:
    """One way alone in memory: its time and its peak, or that it does not fit."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    drawn = batches(case, device, dtype)
    data = itertools.cycle(drawn)
    try:
        step = make()

        def call() -> torch.Tensor:
            hidden_ND, target_N = next(data)
            loss = step(hidden_ND.requires_grad_(), target_N)
            hidden_ND.grad = None
            return loss

        first = sum(float(call()) for _ in drawn) / len(drawn)
        milliseconds = 1e3 * clock.seconds(call)
        note = f"enqueued in {1e3 * clock.host_seconds(call):.2f} ms"
        last = sum(float(call()) for _ in drawn) / len(drawn)
        if hasattr(step, "head"):
            note += f"; {_parts(step, data, clock, milliseconds)}"
    except (torch.OutOfMemoryError, DeviceError) as error:
        return Result(case, way, None, 0, f"does not fit: {str(error).splitlines()[0][:90]}")
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Result(case, way, milliseconds, peak, note, (first, last))


def _parts(
    step: Any, data: Iterator[tuple[torch.Tensor, torch.Tensor]], clock: Clock, milliseconds: float
) -> str:
    """What of a slidex step is the index's: asking it, and a rehash by the default schedule's longest gap."""
    head = step.head
    hidden_ND, _ = next(data)
    hidden_ND = hidden_ND.detach().float()
    sampling = head._sampling
    selector = sampling.scorer.selector
    if head.options.mode == "shared":
        asked = clock.seconds(lambda: sampling.index.padded_pool(hidden_ND, selector.retrieved))
    else:
        asked = clock.seconds(lambda: sampling.index.query(hidden_ND, selector.retrieved))
    started = time.perf_counter()
    head.rehash()
    head.stats()  # waits for it
    rehash = 1e3 * (time.perf_counter() - started)
    share = (1e3 * asked + rehash / SamplingOptions().rehash_max_gap) / milliseconds
    active = f"{head.stats().active_classes:,.0f} active classes"
    layer = f"{str(head.weight.dtype).removeprefix('torch.')}, {head.options.optimizer}"
    return f"{active}; {layer}; query {1e3 * asked:.2f} ms, rehash {rehash:.0f} ms: {share:.0%}"


def ratios(result: Result, dense: Result | None) -> tuple[float | None, float | None]:
    """How many times as fast as the dense softmax a way is, and its share of the dense softmax's peak of memory."""
    if dense is None or dense.milliseconds is None or result.milliseconds is None:
        return None, None
    share = result.peak_bytes / dense.peak_bytes if dense.peak_bytes else None
    return dense.milliseconds / result.milliseconds, share


def goals(results: Iterable[Result]) -> list[str]:
    """What of the goals was reached, by the faster of slidex's ways; no word of sizes that were not measured."""
    results = list(results)
    lines = []
    for (classes, width), (speed, memory) in GOALS.items():
        here = [r for r in results if r.case == Case(classes, width, GOAL_ROWS)]
        ours = [r for r in here if r.way.startswith("slidex") and r.milliseconds]
        if not here:
            continue
        best = min(ours, key=lambda r: r.milliseconds or 0.0) if ours else None
        dense = next((r for r in here if r.way == "dense"), None)
        words = f"goal at C = {classes:,}, D = {width}, N = {GOAL_ROWS}: "
        if best is None:
            lines.append(f"{words}does not fit")
        elif speed is None:
            lines.append(words + _trains(best))
        else:
            faster, share = ratios(best, dense)
            asked = f"{speed} times as fast as dense" + (f" in {memory:.2f} of its memory" if memory else "")
            got = (
                "dense does not fit"
                if faster is None
                else f"{faster:.3g} times, {share or 0:.2f} of its memory"
            )
            lines.append(f"{words}{asked}; got {got}")
    return lines


def _trains(result: Result) -> str:
    """Of a size that is to train at all."""
    first, last = result.losses or (math.nan, math.nan)
    losses = f"loss {first:.3f}, then {last:.3f}"
    if not result.learns:
        return f"runs, but does not learn: {losses}"
    return f"trains, as it should: {losses}, in {result.peak_bytes / 1e9:.1f} GB"


def rows_of(results: Iterable[Result]) -> list[list[str]]:
    """Cells of the table, under `HEADINGS`."""
    results = list(results)
    dense = {result.case: result for result in results if result.way == "dense" and result.milliseconds}
    table = []
    for result in results:
        size = [f"{result.case.classes:,}", str(result.case.width), f"{result.case.rows:,}", result.way]
        if result.milliseconds is None:
            table.append([*size, "", "", "", "", result.note])
            continue
        time_ratio, peak_ratio = ratios(result, dense.get(result.case))
        shown = ["" if ratio is None else f"{ratio:.3g}" for ratio in (time_ratio, peak_ratio)]
        figures = [f"{result.milliseconds:.4g}", f"{result.peak_bytes / 1e9:.2f}", *shown]
        table.append([*size, *figures, result.note])
    return table


def kernel_rows(found: Iterable[gpu_kernels.Share]) -> list[list[str]]:
    """Cells of the kernels' table."""
    return [
        [share.kernel, f"{share.nbytes / 1e6:.1f}", f"{1e6 * share.seconds:.1f}", f"{share.share:.0%}"]
        for share in found
    ]


@click.command(help=__doc__)
@click.option("--minutes", default=60.0, help="Begin no further size after so long.")
@click.option("--device", default="cuda", help="Which GPU.")
def main(minutes: float, device: str) -> None:
    """Print the tables and write them as JSON."""
    try:
        environment.require_device(device)
    except SlidexError as error:
        click.echo(f"Nothing was measured. {error}", err=True)
        sys.exit(1)
    where, clock, started = torch.device(device), Clock(torch.device(device)), time.monotonic()
    facts = machine() | {"gpu": torch.cuda.get_device_name(where), "driver": environment.driver()}
    click.echo(", ".join(f"{name} {value}" for name, value in facts.items()))
    rate = gpu_kernels.copy_rate(where, clock)
    shares = gpu_kernels.shares(gpu_kernels.Sizes(), where, torch.bfloat16, clock, rate)
    click.echo(f"\na copy on the device: {rate / 1e9:.0f} GB/s\n")
    click.echo(markdown([("kernel", "MB", "µs", "of a copy's rate"), *kernel_rows(shares)]) + "\n")
    results, left = [], []
    for case in CASES:
        if time.monotonic() - started > 60 * minutes:
            left.append(case)
            continue
        for way, make in ways(case, where, torch.bfloat16).items():
            results.append(measure(case, way, make, where, torch.bfloat16, clock))
            click.echo("  " + "  ".join(rows_of([results[-1]])[0]), err=True)
    click.echo(markdown([HEADINGS, *rows_of(results)]))
    click.echo("\n".join(goals(results)))
    if left:
        click.echo(f"not begun within {minutes:g} minutes: " + ", ".join(map(str, left)))
    kept = [{**result._asdict(), "case": result.case._asdict()} for result in results]
    kernels_kept = [share._asdict() for share in shares]
    write_results("gpu", facts | {"copy bytes a second": rate, "kernels": kernels_kept}, kept)
    click.echo("benchmarks/results/gpu.json")


if __name__ == "__main__":
    main()
