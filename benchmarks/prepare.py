"""Preparing text against scikit-learn's reader, on the same synthetic file: MB/s of source text.

Run ``python -m benchmarks.prepare``. The two are interleaved and medians taken, so that a busy machine slows both.
Wall time is what a person waits; CPU time tells how much of it was this program's own work. scikit-learn only
parses into memory on one core; slidex also checks, writes, checksums and syncs a data set.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from sklearn.datasets import load_svmlight_file

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


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of one call, over all threads of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=60.0, help="size of the file (default: 60)")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats (default: 5)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="slidex-bench-") as folder:
        source, out = Path(folder) / "source.txt", Path(folder) / "data"
        write_source(source, options.megabytes)
        size = source.stat().st_size / 1e6

        def read() -> object:
            return load_svmlight_file(source, multilabel=True, zero_based=True, dtype=np.float32)

        def prepare(threads: int) -> object:
            return prepare_svmlight(source, out, zero_based=True, threads=threads, overwrite=True)

        prepare(1)  # compiles the kernels
        contestants = {"scikit-learn, 1 thread": read}
        for count in options.threads:
            contestants[f"slidex, {count} thread{'s' * (count > 1)}"] = lambda count=count: prepare(count)
        times = {name: [] for name in contestants}
        for _ in range(options.repeats):
            for name, action in contestants.items():
                times[name].append(timed(action))
    wall, cpu = (
        {name: statistics.median(t[i] for t in pairs) for name, pairs in times.items()} for i in (0, 1)
    )
    reference = next(iter(contestants))
    print(f"{size:.0f} MB of svmlight text, medians of {options.repeats}\n")
    print("| reader | wall s | MB/s | ratio | CPU s | CPU ratio |\n|---|---|---|---|---|---|")
    for name in contestants:
        print(
            f"| {name} | {wall[name]:.2f} | {size / wall[name]:.0f} | {wall[reference] / wall[name]:.1f} "
            f"| {cpu[name]:.2f} | {cpu[reference] / cpu[name]:.1f} |"
        )


if __name__ == "__main__":
    main()
