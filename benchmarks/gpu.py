"""The output layer on a GPU: `slidex.nn.LSHSoftmaxLoss` against a dense softmax, a chunked one, and a sampled one.

``python -m benchmarks.gpu`` on a machine with a GPU, a torch built for it and ``slidex[cuda]``; `make gpu-check` runs
a part. A step is loss, gradients and update of the layer, and the gradient of what comes before it, on random hidden
vectors and classes of frequency 1 / rank. Ways are measured one after the other, each alone in memory, so that peaks
are its own; times are those of CUDA events, the median of repeats, or where a step takes long that of one. What does
not fit is said, not left out. Before that comes the share of a device copy's rate that each kernel makes. The JSON file
is written after every line. All weights are bfloat16: slidex's updates of them are rounded stochastically, those of
torch's optimisers to nearest.

``host`` is the time until a step is enqueued, ``device`` what the GPU needs for it where the host is ahead; where the
first is longer, the device waits for the difference in every step. Where FAISS has a GPU, slidex's steps are also taken
with candidates from it (`benchmarks.gpu_faiss`), in which host and device wait for each other.
Letters: N rows in a batch, C classes, D hidden width.
"""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import torch

from benchmarks import gpu_faiss, gpu_kernels, gpu_rivals
from benchmarks.gpu_clock import Clock
from benchmarks.gpu_faiss import AbsentError
from benchmarks.gpu_results import (
    GOAL_ROWS,
    GOALS,
    HEADINGS,
    Case,
    Result,
    goals,
    index_goals,
    kernel_goal,
    kernel_rows,
    launch_goal,
    rows_of,
    size_of,
)
from benchmarks.report import machine, markdown, write_results
from slidex.errors import ConfigError, DeviceError, SlidexError
from slidex.kernels.cuda import environment
from slidex.nn import LSHSoftmaxLoss, SamplingOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.gpu_rivals import Step

BATCHES = 8
POOL, ACTIVE = 4096, 512
FULL_STATE = 3_000_000 * 768
"""Up to so many weights slidex keeps Adam's state in float32, beyond row-wise Adagrad's."""
ADAGRAD_RATE = 0.01
SLOW = 0.5
"""Seconds: a step that takes longer is timed once, and on `FEW` batches."""
FEW = 2

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
    sampled: dict[str, dict[str, Any]] = {
        "shared": {"mode": "shared", "pool_size": POOL},
        "per_sample": {"mode": "per_sample", "active_size": ACTIVE},
    }
    return {
        "dense": rival(gpu_rivals.dense),
        **{
            f"slidex, {mode}": lambda options=options: slidex_step(case, device, dtype, **options)
            for mode, options in sampled.items()
        },
        "sampled softmax in torch": rival(gpu_rivals.sampled, POOL),
        torchs: rival(gpu_rivals.chunked),
        **{
            f"slidex, {mode}, FAISS": lambda options=options: faiss_step(case, device, dtype, **options)
            for mode, options in sampled.items()
        },
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


def faiss_step(case: Case, device: torch.device, dtype: torch.dtype, **options: Any) -> Step:
    """As `slidex_step`, with candidates from FAISS on the GPU; it waits for the device.

    Raises:
        AbsentError: There is no FAISS for a GPU, or it cannot have so many classes there.
    """
    gpu_faiss.require_faiss(case.classes)
    gpu_faiss.register()
    step = slidex_step(case, device, dtype, index=gpu_faiss.INDEX, **options)

    def told(hidden_ND: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        try:
            return step(hidden_ND, target_N)
        except ConfigError as error:
            raise AbsentError(str(error)) from error

    told.head = step.head  # pyrefly: ignore[missing-attribute]
    told.waits = True  # pyrefly: ignore[missing-attribute]
    return told


def measure(
    case: Case, way: str, make: Callable[[], Step], device: torch.device, dtype: torch.dtype, clock: Clock
) -> Result:
    """One way alone in memory: its times and its peak, or why there are none."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    drawn, outside = batches(case, device, dtype), gpu_faiss.outside_bytes(device)
    try:
        step = make()

        def call() -> torch.Tensor:
            hidden_ND, target_N = next(data)
            loss = step(hidden_ND.requires_grad_(), target_N)
            hidden_ND.grad = None
            return loss

        data = iter(drawn)
        losses = [float(call())]  # compiles
        started = time.perf_counter()
        losses.append(float(call()))
        milliseconds, host, busy = 1e3 * (time.perf_counter() - started), None, None
        slow, waits = milliseconds > 1e3 * SLOW, hasattr(step, "waits")
        used = drawn[:FEW] if slow else drawn
        losses += [float(call()) for _ in used[FEW:]]
        data = itertools.cycle(used)
        if not slow:
            milliseconds = 1e3 * clock.seconds(call)
        if not slow and not waits:
            host, busy = 1e6 * clock.host_seconds(call), 1e6 * clock.device_seconds(call)
        first, last = (sum(of) / len(used) for of in (losses, [float(call()) for _ in used]))
        parts = _parts(step, data, clock, milliseconds) if hasattr(step, "head") else None
    except (torch.OutOfMemoryError, DeviceError) as error:
        return Result(case, way, None, 0, f"does not fit: {str(error).splitlines()[0][:90]}")
    except AbsentError as error:
        return Result(case, way, None, 0, f"not measured: {error}")
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    if waits:  # and has its index outside torch's memory; others have no more there than libraries' code
        peak += gpu_faiss.outside_bytes(device) - outside
    note, share = parts or ("", None)
    return Result(case, way, milliseconds, peak, note, (first, last), host, busy, share)


class Parts(NamedTuple):
    """Of a slidex step.

    Args:
        note: Of classes, layer and index.
        index_share: See `Result`.
    """

    note: str
    index_share: float


def _parts(
    step: Any, data: Iterator[tuple[torch.Tensor, torch.Tensor]], clock: Clock, milliseconds: float
) -> Parts:
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
    return Parts(f"{active}; {layer}; query {1e3 * asked:.2f} ms, rehash {rehash:.0f} ms: {share:.0%}", share)


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
    facts = machine() | {"gpu": torch.cuda.get_device_name(where), "driver": driver()}
    click.echo(", ".join(f"{name} {value}" for name, value in facts.items()))
    rate = gpu_kernels.copy_rate(where, clock)
    shares = gpu_kernels.shares(gpu_kernels.Sizes(), where, torch.bfloat16, clock, rate)
    click.echo(f"\na copy on the device: {rate / 1e9:.0f} GB/s\n")
    click.echo(markdown([("kernel", "MB", "µs", "of a copy's rate"), *kernel_rows(shares)]) + "\n")
    facts |= {"copy bytes a second": rate, "kernels": [share._asdict() for share in shares]}
    results, left = [], []
    for case in CASES:
        for way, make in ways(case, where, torch.bfloat16).items():
            if time.monotonic() - started > 60 * minutes:
                left.append(f"{way} at {size_of(case)}")
                continue
            results.append(measure(case, way, make, where, torch.bfloat16, clock))
            click.echo("  " + "  ".join(rows_of([results[-1]])[0]), err=True)
            _keep(facts, results)
    click.echo(markdown([HEADINGS, *rows_of(results)]))
    reached = [*goals(results), *index_goals(results), *launch_goal(results)]
    click.echo("\n".join([kernel_goal(shares, gpu_kernels.HOT), *reached]))
    if left:
        click.echo(f"not begun within {minutes:g} minutes: " + "; ".join(left))
    _keep(facts, results)
    click.echo("benchmarks/results/gpu.json")


def _keep(facts: dict[str, Any], results: list[Result]) -> None:
    """Writes what is known so far."""
    kept = [{**result._asdict(), "case": result.case._asdict()} for result in results]
    write_results("gpu", facts, kept)


def driver() -> str:
    """Version of the NVIDIA driver, and what it supports."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    supports = environment.driver()
    try:
        told = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return supports
    return f"{told[0]}, {supports}" if told else supports


if __name__ == "__main__":
    main()
