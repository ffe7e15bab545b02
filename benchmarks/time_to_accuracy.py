"""Seconds of training to a given P@1: by index, and by rehash schedule. This decides the defaults.

For every set the lines differ in nothing but the index (or the schedule). The P@1 to reach is 97 % of the best that any
line ends with; a line that never reaches it shows a dash. Accuracy is measured on the same test rows with all classes
scored, and its time not counted. Run it as ``python -m benchmarks.time_to_accuracy [--part indexes|schedules]``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from benchmarks.datasets import SHARED, load
from benchmarks.report import machine, print_row, write_results
from benchmarks.training import Point, learning_curve, seconds_to
from slidex.threads import set_threads
from slidex.train.config import TrainConfig

SETS: dict[str, dict[str, Any]] = {
    "eurlex-4k": {"batch_size": 128, "epochs": 6, "pool_size": 1000, "active_size": 200},
    "npm-deps-2017": {"epochs": 2},
    "deb-files-283k": {"epochs": 1},
    "site-packages": {"max_steps": 1500, "normalize": False},
}
"""What all lines of a set share."""
PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "indexes": {
        "random classes only": {"index": "none"},
        "simhash, 8 tables": {"index_options": {"tables": 8}},
        "simhash, 16 tables": {"index_options": {"tables": 16}},
        "simhash, 50 tables": {"index_options": {"tables": 50}},
        "simhash, 16, labels inserted": {"index_options": {"tables": 16, "insert": 32}},
        "dwta, 16 tables": {"index": "dwta", "index_options": {"tables": 16}},
        "learned, 16 tables": {"index": "learned", "index_options": {"tables": 16}},
        "faiss-ivf": {"index": "faiss-ivf"},
        "faiss-pq": {"index": "faiss-pq"},
    },
    "schedules": {
        "fixed, every 50 steps": {"rehash": "fixed"},
        "exponential": {"rehash": "exponential"},
        "drift of 10 %": {"rehash": "drift", "rehash_drift": 0.1},
        "drift of 20 %": {"rehash": "drift", "rehash_drift": 0.2},
        "drift of 30 %": {"rehash": "drift", "rehash_drift": 0.3},
    },
}
MODES = {"indexes": ("shared", "per_sample"), "schedules": ("per_sample",)}
COLUMNS = ("steps", "ms/step", "rehash s", "final P@1", "target", "seconds", "CPU s")


def cells(curve: list[Point], target: float) -> dict[str, float | None]:
    """What the table shows of a curve."""
    last = curve[-1]
    return {
        "steps": last.step,
        "ms/step": 1e3 * last.wall / last.step,
        "rehash s": last.rehash,
        "final P@1": last.p1,
        "target": target,
        "seconds": seconds_to(curve, target),
        "CPU s": seconds_to(curve, target, what="cpu"),
    }


@click.command(help=__doc__)
@click.option("--sets", default=",".join(SETS), show_default=True)
@click.option("--part", type=click.Choice(list(PARTS)), default="indexes", show_default=True)
@click.option("--lines", help="Lines of the table; default: all.")
@click.option("--modes", help="Default: the modes in which the part matters.")
@click.option("--data", type=click.Path(path_type=Path), default=SHARED, help="Directory of the raw sets.")
@click.option("--threads", type=int, help="Default: all cores.")
@click.option("--points", default=6, show_default=True, help="Measurements of accuracy in a run.")
@click.option("--test-rows", default=2048, show_default=True, help="Rows that accuracy is measured on.")
def main(
    sets: str,
    part: str,
    lines: str | None,
    modes: str | None,
    data: Path,
    threads: int | None,
    points: int,
    test_rows: int,
) -> None:
    """Print the table and write it as JSON."""
    set_threads(threads)
    facts = machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    chosen = lines.split(";") if lines else list(PARTS[part])
    results: list[dict[str, Any]] = []
    for name in sets.split(","):
        dataset = load(name, data)
        for mode in modes.split(",") if modes else MODES[part]:
            curves: dict[str, list[Point]] = {}
            for label in chosen:
                settings = PARTS[part][label]
                config = TrainConfig.from_mapping(
                    {**SETS[name], "mode": mode, "threads": threads, **settings}
                )
                learning_curve(dataset, replace(config, max_steps=2), points=1, test_rows=1)  # compiles
                curves[label] = learning_curve(dataset, config, points=points, test_rows=test_rows)
                last = curves[label][-1]
                click.echo(f"  {label}: {last.wall:.1f} s, P@1 {last.p1:.2f}", err=True)
            target = 0.97 * max(curve[-1].p1 for curve in curves.values())
            print_row(f"{name}, C = {dataset.num_classes:,}, {mode}", COLUMNS)
            for label, curve in curves.items():
                line = cells(curve, target)
                results.append({"set": name, "mode": mode, "line": label, **line})
                print_row(label, ["-" if value is None else f"{value:.4g}" for value in line.values()])
    write_results(f"time_to_accuracy_{part}", facts, results)


if __name__ == "__main__":
    main()
