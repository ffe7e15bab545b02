"""What every benchmark prints and keeps: the machine it ran on, lines of a table, and a JSON file with the commit."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch

from slidex.doctor import has_native_bf16
from slidex.threads import set_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A line of the one table of ``make bench``: what slidex needs and what a rival needs for the same work.

    Args:
        what: The work, and the way slidex does it.
        rival: Who else does it.
        unit: Of the figures; less is better.
        ours: One figure for each repeat; infinite for what slidex did not reach.
        theirs: The rival's, taken by turns with ours: as many.
        note: What else belongs to the line.
    """

    what: str
    rival: str
    unit: str
    ours: Sequence[float]
    theirs: Sequence[float]
    note: str = ""

    def ratios(self) -> list[float]:
        """How many times as much the rival needs, for each repeat."""
        return [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    def facts(self) -> dict[str, Any]:
        """The line for a JSON file, which has no number for what was not reached: None."""
        ours = [value if math.isfinite(value) else None for value in self.ours]
        return {**asdict(self), "ours": ours, "ratio": statistics.median(self.ratios())}

    def cells(self) -> list[str]:
        """What the table shows, under `HEADINGS`."""
        ratios = self.ratios()
        spread = f"{min(ratios):.3g} to {max(ratios):.3g}" if len(ratios) > 1 else ""
        ours, theirs = statistics.median(self.ours), statistics.median(self.theirs)
        return [
            self.what,
            self.rival,
            self.unit,
            f"{ours:.4g}" if math.isfinite(ours) else "not reached",
            f"{theirs:.4g}",
            f"{statistics.median(ratios):.3g}",
            spread,
            str(len(ratios)),
            self.note,
        ]


HEADINGS = ("slidex", "rival", "unit", "slidex's", "rival's", "ratio", "range", "repeats", "")


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table whose first line is the headings."""
    head, *body = lines
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body))


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns in a new process, with this one's number of threads.

    No memory, thread pool or cache is left over from what ran before, so that peaks and times are its own.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_with_threads, torch.get_num_threads(), function, arguments).result()


def _with_threads(threads: int, function: Callable[..., Any], arguments: tuple) -> Any:
    set_threads(threads)
    return function(*arguments)


def machine() -> dict[str, Any]:
    """Processor, threads, versions and commit."""
    names = Path("/proc/cpuinfo")
    models = (
        [line for line in names.read_text().splitlines() if line.startswith("model name")]
        if names.exists()
        else []
    )
    processor = models[0].partition(": ")[2] if models else platform.processor()
    return {
        "processor": processor,
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "native bfloat16": has_native_bf16() is True,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": numba.__version__,
        "numpy": np.__version__,
        "commit": commit(),
    }


def commit(folder: Path = ROOT) -> str:
    """The commit of the working tree, ``-dirty`` if tracked files have changed that benchmarks do not write.

    Of a copy without history the environment variable SLIDEX_COMMIT tells it.
    """

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)

    unversioned = os.environ.get("SLIDEX_COMMIT", "unknown")
    found = git("describe", "--always")
    written = (":(exclude)benchmarks/results", ":(exclude)docs/accuracy.md")
    changed = git("diff", "--quiet", "HEAD", "--", ".", *written).returncode
    return found.stdout.strip() + "-dirty" * bool(changed) if found.returncode == 0 else unversioned


def print_row(label: str, cells: Sequence[str]) -> None:
    """One line: the label, then cells of equal width."""
    print(f"{label:<34}" + "".join(f"{cell:>11}" for cell in cells), flush=True)


def write_results(name: str, facts: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Writes ``benchmarks/results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"machine": facts, "results": results}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
