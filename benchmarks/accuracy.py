"""Accuracy and cost of slidex's presets beside other packages, on the same rows, machine and metrics.

For every set, preset and seed slidex trains in a process of its own with the preset's settings and nothing else, and
predicts all test rows with the default scorer; the peers of `benchmarks.peers` do the same with one seed. Every line is
written to ``benchmarks/results/accuracy.json`` when it is done, and is taken from there by a later run on the same kind
of processor, unless something has changed that it depends on: the set, the settings, and slidex's code or the peer's
version. At the end the tables of all lines there are printed and written into docs/accuracy.md. Run it as
``python -m benchmarks.accuracy``.
"""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
import tempfile
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch

import slidex
from benchmarks import report
from benchmarks.datasets import ROOT, SHARED, MissingDataError, load
from benchmarks.peer_worker import peak_mb, used
from benchmarks.peers import BY_NAME, MINUTES, PEERS, K, Peer, PeerError, digest, peer_key, run_peer
from benchmarks.report import in_child, machine, markdown
from slidex.data import CsrArrays
from slidex.errors import SlidexError
from slidex.kernels.cpu import linear_fit, linear_scores
from slidex.metrics import MetricAccumulator
from slidex.nn.class_groups import distinct_groups
from slidex.nn.ranker import class_pairs, neighbor_search, row_tensors
from slidex.threads import set_threads
from slidex.train.config import PRESETS, TrainConfig
from slidex.train.run import fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from slidex.data import Dataset

    Line = dict[str, Any]

SETS = ("eurlex-4k", "npm-deps-2017", "deb-deps-trixie", "deb-files-283k")
METRICS = ("P@1", "P@3", "P@5", "nDCG@5", "PSP@1", "PSP@3", "PSP@5", "recall@10")
MEASURES = {
    "train_cpu_s": "train CPU s",
    "peak_mb": "peak MB",
    "model_mb": "model MB",
    "predict_cpu_us": "predict µs/row",
}
HEADINGS = ("", *(name.replace("recall", "R") for name in METRICS), *MEASURES.values(), "measured")
MODES = ("preset", "exact", "shared")
"""How slidex scores classes in training: as the preset has it (by a cost model), all of them, or a pool for a batch."""
TRAINING_ONLY = ("optimizer", "progress", "index")
"""Files of a checkpoint that prediction with the default scorer does not read."""


DOCUMENT = ROOT / "docs" / "accuracy.md"
MARKS = ("<!-- tables: written by python -m benchmarks.accuracy -->\n", "<!-- end of tables -->\n")


def judged(dataset: Dataset, ids_NK: np.ndarray) -> dict[str, float]:
    """`METRICS` in per cent of predictions for all test rows, with the propensities of the training rows."""
    accumulator = MetricAccumulator(dataset.class_counts(), dataset.split("train").num_rows, ks=(1, 3, 5, 10))
    accumulator.update(ids_NK.astype(np.int64), dataset.split("test").y)
    found = accumulator.compute()
    return {name: 100 * found[name] for name in METRICS}


def train_slidex(name: str, data: Path, settings: dict[str, Any]) -> Line:
    """Metrics and measures of one training; meant for a process of its own."""
    dataset, config = load(name, data), TrainConfig.from_mapping(settings)
    folder = Path(tempfile.mkdtemp(prefix="slidex-accuracy-"))
    try:
        wall, cpu = time.perf_counter(), used()
        run = slidex.fit(dataset, folder / "run", config)
        line = {"train_wall_s": time.perf_counter() - wall, "train_cpu_s": used() - cpu, "peak_mb": peak_mb()}
        line["model_mb"] = model_bytes(run.path, run.checkpoint().path) / 1e6
        model, test = run.model(), dataset.split("test")
        wall, cpu = time.perf_counter(), used()
        ids_NK = np.concatenate([ids.numpy() for _, ids in model.topk(test.x, K)])
        line["predict_wall_us"] = 1e6 * (time.perf_counter() - wall) / test.num_rows
        line["predict_cpu_us"] = 1e6 * (used() - cpu) / test.num_rows
        return {**line, **judged(dataset, ids_NK)}
    finally:
        shutil.rmtree(folder)


def compile_kernels(name: str, data: Path, settings: dict[str, Any]) -> None:
    """Two steps, and a ranker of one class for two rows, so that no measured process has to compile."""
    dataset = load(name, data)
    no_ranker = {"ranker_candidates": 0, "ranker_neighbors": 0, "ranker_groups": 0}
    config = replace(TrainConfig.from_mapping(settings), max_steps=2, **no_ranker)
    two = CsrArrays(np.arange(3), np.zeros(2, dtype=np.int32), None, 1)
    pairs, x = class_pairs(two, np.zeros((2, 1), dtype=np.int32)), row_tensors(two.unit_rows())
    linear_scores(linear_fit(*pairs, *x, 1, cost=1.0), *x, torch.zeros(2, 1, dtype=torch.int64))
    neighbor_search(two, two).classes(two, 1, torch.zeros(2, dtype=torch.int64))
    for dtype in (torch.int32, torch.int64):
        distinct_groups(torch.zeros(1, dtype=torch.int32), torch.zeros(2, 1, dtype=dtype), 1)
    with tempfile.TemporaryDirectory(prefix="slidex-accuracy-") as folder:
        run = slidex.fit(dataset, Path(folder) / "run", config)
        for _ in run.model().topk(dataset.split("test").x.slice(0, 1), K):
            pass


def model_bytes(run: Path, checkpoint: Path) -> int:
    """Bytes on disk of what prediction needs: the run without its other checkpoints, and what only training reads."""
    files = [path for path in run.rglob("*") if path.is_file() and path.suffix != ".jsonl"]
    kept = [path for path in files if path.parent == checkpoint or checkpoint.parent not in path.parents]
    return sum(path.stat().st_size for path in kept if not path.name.startswith(TRAINING_ONLY))


def source_digest() -> str:
    """Changes with slidex's code."""
    package = Path(slidex.__file__).parent
    return digest(
        {str(path.relative_to(package)): path.read_text() for path in sorted(package.rglob("*.py"))}
    )


class Book:
    """The lines in a file, and which of them still hold.

    Args:
        path: JSON as `benchmarks.report.write_results` writes it; made when the first line is added.
        facts: Of this machine.
        retry: Lines that failed do not hold.
        again: No line holds.
    """

    def __init__(
        self, path: Path, facts: dict[str, Any], *, retry: bool = False, again: bool = False
    ) -> None:
        self.facts, self.again, self._retry, self._path = facts, again, retry, path
        # Two generations of a server's processors can have one name, and differ by a factor in speed.
        self._processor = f"{facts['processor']}, {facts['vector instructions']}"
        self.lines: list[Line] = json.loads(path.read_text())["results"] if path.exists() else []

    def line(self, identity: Line, key: str, measure: Callable[[], Line]) -> Line:
        """The line of this set, method and seed: the one in the file if it holds, else measured now and written.

        Args:
            identity: ``set``, ``method`` and ``seed``.
            key: Of all that the line depends on but the processor.
            measure: Returns its metrics and measures, and ``failed``, a reason, if there are none.
        """
        same = [line for line in self.lines if identity.items() <= line.items()]
        for line in same:
            holds = (line["key"], line["processor"]) == (key, self._processor)
            if holds and not self.again and not (self._retry and "failed" in line):
                return line
        line = {
            **identity,
            "key": key,
            "processor": self._processor,
            "commit": self.facts["commit"],
            "day": datetime.now(UTC).date().isoformat(),
            **measure(),
        }
        self.lines = [other for other in self.lines if other not in same] + [line]
        report.write_results(self._path.stem, self.facts, self.lines)
        return line


def slidex_line(
    book: Book, name: str, data: Path, preset: str, changes: dict[str, Any], seed: int, threads: int
) -> Line:
    """One training of slidex, with the preset's settings but for `changes`, which its name in the table tells."""
    settings = TrainConfig.from_mapping(
        {**changes, "seed": seed, "threads": threads}, preset=preset
    ).to_mapping()
    dataset = load(name, data)
    key = digest([fingerprint(dataset), settings, source_digest(), K])

    def measure() -> Line:
        try:
            in_child(compile_kernels, name, data, settings)
            return in_child(train_slidex, name, data, settings)
        except (
            SlidexError,
            BrokenProcessPool,
        ) as error:  # the latter if the process was killed, as for memory
            return {"failed": str(error)}

    method = ", ".join([f"slidex {preset}", *(f"{setting} {value}" for setting, value in changes.items())])
    return book.line({"set": name, "method": method, "seed": seed}, key, measure)


def peer_line(book: Book, name: str, data: Path, peer: Peer, threads: int, minutes: float) -> Line:
    """One training of a peer."""
    dataset = load(name, data)

    def measure() -> Line:
        try:
            measured, ids_NK = run_peer(
                peer, name, dataset, threads=threads, minutes=minutes, again=book.again
            )
        except PeerError as error:
            return {"failed": str(error)}
        return {**measured, **judged(dataset, ids_NK)}

    return book.line(
        {"set": name, "method": peer.label, "seed": 0}, peer_key(peer, dataset, threads), measure
    )


def tables(lines: Iterable[Line]) -> str:
    """A Markdown table for each set: means over seeds, with their standard deviation where there are several."""
    by_set: dict[str, dict[str, list[Line]]] = {}
    for line in lines:
        by_set.setdefault(line["set"], {}).setdefault(line["method"], []).append(line)
    order = [*SETS, *(name for name in by_set if name not in SETS)]
    parts = []
    for name in order:
        if name in by_set:
            methods = sorted(by_set[name].items(), key=lambda item: place(item[0]))
            rows = [cells(method, found) for method, found in methods]
            parts.append(f"### {name}\n\n{markdown([HEADINGS, *rows])}")
    return "\n\n".join(parts)


def place(method: str) -> int:
    """Where a method stands in a table: peers in the order of `PEERS`, then presets in the order of `PRESETS`."""
    known = [*(peer.label for peer in PEERS), *(f"slidex {preset}" for preset in PRESETS)]
    if method.startswith("slidex "):
        method = method.partition(", ")[0]
    return known.index(method) if method in known else len(known)


def cells(method: str, lines: Sequence[Line]) -> list[str]:
    """A line of a table, from one line of results for each seed."""
    done = [line for line in lines if "failed" not in line]
    days = sorted({line["day"] for line in lines})
    day = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    if not done:
        return [method, lines[0]["failed"], *[""] * (len(HEADINGS) - 3), day]
    seeds = f", {len(done)} seeds" if len(done) > 1 else ""
    lost = f", {len(lines) - len(done)} failed: {lines[-1].get('failed')}" if len(done) < len(lines) else ""
    metrics = [mean([line[name] for line in done]) for name in METRICS]
    return [
        method + seeds + lost,
        *metrics,
        *(number([line[name] for line in done]) for name in MEASURES),
        day,
    ]


def mean(values: Sequence[float]) -> str:
    """Per cent with two digits, and the standard deviation of several."""
    text = f"{statistics.fmean(values):.2f}"
    return f"{text} ± {statistics.stdev(values):.2f}" if len(values) > 1 else text


def number(values: Sequence[float]) -> str:
    """The mean with three significant digits or all digits before the point."""
    value = statistics.fmean(values)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def names_in(text: str, known: Sequence[str], option: str) -> list[str]:
    """The names in a comma-separated list; ``all`` and ``none`` are lists too.

    Raises:
        click.UsageError: if one is not known.
    """
    if text in {"all", "none"}:
        return list(known) if text == "all" else []
    names = text.split(",")
    for name in names:
        if name not in known:
            raise click.UsageError(
                f"{option}: must be all, none or some of {','.join(known)}. Got {name!r} instead."
            )
    return names


@click.command(help=__doc__)
@click.option("--sets", default=",".join(SETS), show_default=True)
@click.option("--presets", default="fast,accurate", show_default=True, help="Of slidex; all, none or names.")
@click.option(
    "--modes",
    default="preset",
    show_default=True,
    help=f"Of slidex's training: {', '.join(MODES)}; comma-separated.",
)
@click.option(
    "--seeds", default=3, show_default=True, type=click.IntRange(min=1), help="Of slidex: 0, 1, ..."
)
@click.option("--epochs", type=click.IntRange(min=1), help="Of slidex. Default: the preset's.")
@click.option("--peers", default="all", show_default=True, help=f"all, none or some of {','.join(BY_NAME)}.")
@click.option(
    "--minutes", default=MINUTES, show_default=True, help="Wall time that a peer may take for a set."
)
@click.option("--retry", is_flag=True, help="Run again what failed before.")
@click.option("--again", is_flag=True, help="Measure everything asked for anew, whatever is there.")
@click.option("--print", "only_print", is_flag=True, help="Measure nothing: only the tables.")
@click.option("--data", type=click.Path(path_type=Path), default=SHARED, help="Directory of the raw sets.")
@click.option("--threads", type=click.IntRange(min=1), help="Of slidex and the peers. Default: all cores.")
def main(
    sets: str,
    presets: str,
    modes: str,
    seeds: int,
    epochs: int | None,
    peers: str,
    minutes: float,
    retry: bool,
    again: bool,
    only_print: bool,
    data: Path,
    threads: int | None,
) -> None:
    """Measure what is missing, print the tables."""
    chosen_presets = names_in(presets, list(PRESETS), "--presets")
    chosen_modes = names_in(modes, MODES, "--modes")
    chosen_peers = [BY_NAME[name] for name in names_in(peers, list(BY_NAME), "--peers")]
    set_threads(threads)
    facts = machine()
    book = Book(report.RESULTS / "accuracy.json", facts, retry=retry, again=again)
    skipped = []
    for name in [] if only_print else sets.split(","):
        try:
            load(name, data)
        except MissingDataError as error:
            skipped.append(f"skipped: {error.format_message()}")
            continue
        for peer in chosen_peers:
            if not peer.only or name in peer.only:
                show(peer_line(book, name, data, peer, facts["threads"], minutes))
        for preset, mode, seed in itertools.product(chosen_presets, chosen_modes, range(seeds)):
            changes = ({} if mode == "preset" else {"mode": mode}) | ({"epochs": epochs} if epochs else {})
            show(slidex_line(book, name, data, preset, changes, seed, facts["threads"]))
    click.echo(", ".join(f"{name} {value}" for name, value in facts.items()))
    found = tables(book.lines)
    click.echo("\n".join([found, *skipped]))
    before, mark, after = DOCUMENT.read_text(encoding="utf-8").partition(MARKS[0])
    after = after.partition(MARKS[1])[2]
    DOCUMENT.write_text(f"{before}{mark}\n{found}\n\n{MARKS[1]}{after}", encoding="utf-8")


def show(line: Line) -> None:
    """A line as soon as it is done."""
    text = "  ".join([line["set"], *cells(f"{line['method']}, seed {line['seed']}", [line])])
    click.echo(f"  {text}", err=True)


if __name__ == "__main__":
    main()
