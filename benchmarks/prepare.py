"""Preparing text against scikit-learn's reader, on the same synthetic file: MB/s of source text.

scikit-learn only parses into memory on one core; slidex also checks, writes, checksums and syncs a data set. Run it as
``python -m benchmarks --only prepare``.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from sklearn.datasets import load_svmlight_file

from benchmarks.report import Comparison
from slidex.data import prepare_svmlight

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_FEATURES, NUM_CLASSES = 100_000, 50_000
ROWS_PER_CHUNK = 1000


def write_source(path: Path, megabytes: float, seed: int = 0) -> None:
    """Write about so many MB of multilabel svmlight text: 30 features and 4 labels a row on average."""
    rng = np.random.default_rng(seed)
    with path.open("w", encoding="ascii") as file:
        while file.tell() < megabytes * 1e6:
            for _ in range(ROWS_PER_CHUNK):
                ids = np.unique(rng.integers(0, NUM_FEATURES, rng.integers(10, 51)))
                labels = np.unique(rng.integers(0, NUM_CLASSES, rng.integers(1, 8)))
                values = rng.random(len(ids))
                features = " ".join(f"{i}:{v:.5g}" for i, v in zip(ids, values, strict=True))
                file.write(f"{','.join(map(str, labels))} {features}\n")


def timed(action: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def compare(megabytes: float = 60.0, repeats: int = 5) -> list[Comparison]:
    """Wall seconds of scikit-learn's reader, one thread, and of slidex with one and two threads."""
    with tempfile.TemporaryDirectory(prefix="slidex-bench-") as folder:
        source, out = Path(folder) / "source.txt", Path(folder) / "data"
        write_source(source, megabytes)

        def read() -> object:
            return load_svmlight_file(source, multilabel=True, zero_based=True, dtype=np.float32)

        def prepare(threads: int) -> object:
            return prepare_svmlight(source, out, zero_based=True, threads=threads, overwrite=True)

        prepare(1)  # compiles the kernels
        times = [(timed(read), timed(lambda: prepare(1)), timed(lambda: prepare(2))) for _ in range(repeats)]
    theirs, *ours = zip(*times, strict=True)
    return [
        Comparison(
            f"prepare {megabytes:.0f} MB of svmlight text, {threads} thread{'s' * (threads > 1)}",
            "scikit-learn's reader",
            "s",
            taken,
            theirs,
            f"{megabytes / statistics.median(taken):.0f} MB/s",
        )
        for threads, taken in enumerate(ours, start=1)
    ]
